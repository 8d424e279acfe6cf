"""Checkpoints of a run and finished parameters, through Orbax; what is restored is checked bit for bit.

Reads and writes files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from jaxgpt import hosts
from jaxgpt.errors import UserError
from jaxgpt.places import absolute as absolute_path
from jaxgpt.places import remove
from jaxgpt.train.state import State, fingerprint


class DamagedCheckpoint(Exception):
    """A checkpoint whose contents are not what was written."""


def abstract(tree: Any) -> Any:
    """What a restore onto the current mesh needs to know of a tree: shapes, dtypes, shardings over real devices."""
    mesh = jax.sharding.get_mesh()

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        spec = jax.P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(leaf, tree)


def _tree(state: State) -> dict[str, Any]:
    return {
        "step": state.step,
        "skipped": state.skipped,
        "idle": state.idle,
        "params": state.params,
        "opt": state.opt,
        "extras": state.extras,
    }


class _Kept:
    """Orbax's question which checkpoints stay: the latest `keep`, and the one of step `best`."""

    def __init__(self, keep: int):
        self.keep = keep
        self.best: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """A verdict on each checkpoint, given in ascending order."""
        first = len(checkpoints) - self.keep
        return [i >= first or checkpoint.step == self.best for i, checkpoint in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one stage, saved asynchronously; `warn` is told of each that turns out to be damaged."""

    def __init__(self, folder: Path, keep: int, warn: Callable[[str], None] = print):
        self._folder, self._warn = absolute_path(folder), warn
        self._kept = _Kept(keep)
        self._pending: Any = None
        self._open()

    def _open(self) -> None:
        self._orbax = ocp.training.Checkpointer(
            str(self._folder), cleanup_tmp_directories=True, preservation_policy=self._kept
        )

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(c.step for c in self._orbax.checkpoints)

    def save(self, state: State, host: Mapping[str, Any], best: int | None = None) -> None:
        """Begins a checkpoint of the state and of `host` (JSON); waits only for the copy off the device.

        Beside the latest, the checkpoint of step `best` stays. Raises what an earlier save ran into.
        """
        self.wait()
        self._kept.best = best
        tree = _tree(state)
        meta = {"host": dict(host), "layout": _layout(tree), "seal": _seal(tree, host)}
        self._pending = self._orbax.save_async(int(state.step), tree, force=True, custom_metadata=meta)

    def wait(self) -> None:
        """Waits for the save under way, and raises what it ran into."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, target: State, step: int | None = None) -> tuple[State, dict[str, Any]] | None:
        """The newest good checkpoint (or that of `step`), and the JSON saved with it; None where there is none.

        A damaged one is set aside under another name, and the one before is taken. Raises UserError where the
        checkpoint is of another architecture, or where none can be read.
        """
        found = [s for s in reversed(self.steps) if step is None or s == step]
        damaged: dict[int, DamagedCheckpoint] = {}
        for candidate in found:
            try:
                state, host = self._load(candidate, target)
            except DamagedCheckpoint as error:
                damaged[candidate] = error
                continue
            self._set_aside(damaged)
            return state, host
        if damaged:
            reasons = "".join(f"\n  {error}" for error in damaged.values())
            raise UserError(f"{self._folder}: every checkpoint is damaged; remove it to begin again{reasons}")
        return None

    def _load(self, step: int, target: State) -> tuple[State, dict[str, Any]]:
        try:
            return self._read(step, target)
        except DamagedCheckpoint:  # or a disk that failed for a moment
            return self._read(step, target)

    def _read(self, step: int, target: State) -> tuple[State, dict[str, Any]]:
        where, wanted = f"{self._folder}/{step}", abstract(_tree(target))
        try:
            saved = self._orbax.metadata(step)
            meta = saved.custom_metadata or {}
            if meta.get("layout") != _layout(wanted):
                check_same(saved.metadata, wanted, where)
            tree = hosts.all_or_none(lambda: self._orbax.load(step, wanted))
            if _seal(tree, meta["host"]) != meta["seal"]:
                raise ValueError("the contents are not those that were saved")
        except (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:
            raise DamagedCheckpoint(f"{where}: {_first_line(error)}") from error
        return State(**tree), meta["host"]

    def _set_aside(self, damaged: Mapping[int, DamagedCheckpoint]) -> None:
        if not damaged:
            return
        hosts.lead(lambda: self._rename(damaged))
        self._orbax.close()
        self._open()

    def _rename(self, damaged: Mapping[int, DamagedCheckpoint]) -> None:
        for step, error in damaged.items():
            names = (self._folder / f"damaged-{step}{'+' * tries}" for tries in itertools.count())
            aside = next(name for name in names if not name.exists())
            (self._folder / str(step)).rename(aside)
            self._warn(f"damaged checkpoint, now called {aside.name}: {error}; the one before is taken")

    def close(self) -> None:
        """Waits for the last save and lets go."""
        self.wait()
        self._orbax.close()


def load_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """One checkpoint by its own description, whole on every device: (state tree, the JSON saved with it).

    Raises UserError where there is none, or it is damaged.
    """
    where, everywhere = str(absolute_path(folder)), NamedSharding(jax.sharding.get_mesh(), jax.P())
    try:
        saved = ocp.metadata(where)
        meta = saved.custom_metadata or {}
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), saved.metadata)
        tree = ocp.load(where, wanted)
        if _seal(tree, meta["host"]) != meta["seal"]:
            raise ValueError("the contents are not those that were saved")
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise UserError(f"{folder}: no checkpoint, or a damaged one ({_first_line(error)})") from error
    return tree, meta["host"]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _arrays(tree: Any) -> dict[str, str]:
    """What stands under each name of a tree, in words."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{tuple(leaf.shape)} {leaf.dtype}"
        for path, leaf in leaves
    }


def _layout(tree: Any) -> str:
    return _digest(_arrays(tree))


def _seal(tree: Any, host: Mapping[str, Any]) -> str:
    """A hash of all that a checkpoint says."""
    return _digest([_arrays(tree), fingerprint(tree), host])


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def check_same(saved: Any, wanted: Any, where: str) -> None:
    """Raises UserError where names, shapes or dtypes differ: what is saved there is of another architecture."""
    have, need = _arrays(saved), _arrays(wanted)
    problems = [
        f"{name} is {have[name]} there, {need[name]} here" for name in need if have.get(name, need[name]) != need[name]
    ]
    problems += [f"{name} is not there" for name in need.keys() - have.keys()]
    problems += [f"{name} is there and has no place here" for name in have.keys() - need.keys()]
    if problems:
        problems.sort(key=lambda text: (not text.startswith("params/"), text))
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise UserError(
            f"{where} is of another architecture: {shown}. Use the model section it was trained with, or another name."
        )


def save_params(folder: Path, params: Any, meta: Mapping[str, Any]) -> str:
    """Writes parameters alone, with a JSON description; returns their fingerprint."""
    mark = fingerprint(params)
    meta = {**meta, "layout": _layout(params), "fingerprint": mark}
    hosts.lead(lambda: _clear(folder))
    ocp.save(str(absolute_path(folder)), params, overwrite=True, custom_metadata=meta)
    return mark


def _clear(folder: Path) -> None:
    """Removes what a process left that was killed while it wrote."""
    for part in folder.parent.glob(f"{folder.name}.orbax-checkpoint-tmp*"):
        remove(part)


def params_meta(folder: Path) -> dict[str, Any]:
    """The JSON description of finished parameters. Raises UserError where there are none."""
    try:
        return dict(ocp.metadata(str(absolute_path(folder))).custom_metadata or {})
    except Exception as error:
        raise UserError(f"{folder}: no parameters there ({type(error).__name__})") from error


def load_params(folder: Path, target: Any) -> Any:
    """Reads parameters onto the shardings of `target`.

    Raises UserError where they are of another architecture or damaged.
    """
    where, meta = str(absolute_path(folder)), params_meta(folder)
    try:
        if meta.get("layout") != _layout(target):
            check_same(ocp.metadata(where).metadata, target, str(folder))
        params = ocp.load(where, abstract(target))
        if fingerprint(params) != meta["fingerprint"]:
            raise ValueError("the arrays are not those that were saved")
    except (UserError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        raise UserError(
            f"{folder}: damaged ({_first_line(error)}); remove {folder.parent} and train that stage again"
        ) from error
    return params
