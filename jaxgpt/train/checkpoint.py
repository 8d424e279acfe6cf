"""Checkpoints of a run and finished parameters, through Orbax; what is restored is checked bit for bit.

Reads and writes files.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import NamedSharding
from orbax.checkpoint import v1 as ocp

from jaxgpt.errors import UserError
from jaxgpt.train.state import State, fingerprint

_POLICIES = ocp.training.preservation_policies


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
        "params": state.params,
        "opt": state.opt,
        "extras": state.extras,
    }


class Checkpoints:
    """The checkpoints of one stage: saved asynchronously, the latest `keep` and the best of them kept."""

    def __init__(self, folder: Path, keep: int):
        best = _POLICIES.BestN(
            get_metric_fn=lambda metrics: metrics["quality"], n=1, keep_checkpoints_without_metrics=False
        )
        self._folder = folder.absolute()
        self._keep = _POLICIES.AnyPreservationPolicy([_POLICIES.LatestN(keep), best])
        self._pending: Any = None
        self._open()

    def _open(self) -> None:
        self._orbax = ocp.training.Checkpointer(
            str(self._folder), cleanup_tmp_directories=True, preservation_policy=self._keep
        )

    @property
    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending."""
        return sorted(c.step for c in self._orbax.checkpoints)

    def save(self, state: State, host: Mapping[str, Any], quality: float | None) -> None:
        """Begins a checkpoint of the state and of `host` (JSON); waits only for the copy off the device.

        Raises what an earlier save ran into.
        """
        self.wait()
        tree = _tree(state)
        meta = {**host, "fingerprint": fingerprint(tree)}
        metrics = None if quality is None else {"quality": quality}
        step = int(state.step)
        self._pending = self._orbax.save_async(step, tree, force=True, metrics=metrics, custom_metadata=meta)

    def wait(self) -> None:
        """Waits for the save under way, and raises what it ran into."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def restore(self, target: State, step: int | None = None) -> tuple[State, dict[str, Any]] | None:
        """The newest good checkpoint (or that of `step`), and the JSON saved with it; None where there is none.

        A damaged one is set aside with its name kept, and the one before is taken. Raises UserError where the
        checkpoint is of another architecture, or where all are damaged.
        """
        found = [s for s in reversed(self.steps) if step is None or s == step]
        for candidate in found:
            try:
                state, host = self._load(candidate, target)
            except DamagedCheckpoint:
                continue
            self._set_aside([s for s in self.steps if s > candidate] if step is None else [])
            return state, host
        if found:
            raise UserError(f"{self._folder}: every checkpoint ({', '.join(map(str, found))}) is damaged")
        return None

    def _load(self, step: int, target: State) -> tuple[State, dict[str, Any]]:
        where = f"{self._folder}/{step}"
        try:
            saved = self._orbax.metadata(step)
            wanted = abstract(_tree(target))
            check_same(saved.metadata, wanted, where)
            tree = self._orbax.load(step, wanted)
        except UserError:
            raise
        except Exception as error:
            raise DamagedCheckpoint(f"{where}: {error}") from error
        host = dict(saved.custom_metadata or {})
        if fingerprint(tree) != host.pop("fingerprint", None):
            raise DamagedCheckpoint(f"{where}: the arrays are not those that were saved")
        return State(**tree), host

    def _set_aside(self, steps: list[int]) -> None:
        if not steps or jax.process_index() != 0:
            return
        for step in steps:
            (self._folder / str(step)).rename(self._folder / f"damaged-{step}")
        self._orbax.close()
        self._open()

    def close(self) -> None:
        """Waits for the last save and lets go."""
        self.wait()
        self._orbax.close()


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}


def check_same(saved: Any, wanted: Any, where: str) -> None:
    """Raises UserError where names or shapes differ: what is saved there is of another architecture."""
    have, need = _shapes(saved), _shapes(wanted)
    problems = [
        f"{name} is {have[name]} there, {need[name]} here" for name in need if have.get(name, need[name]) != need[name]
    ]
    problems += [f"{name} is not there" for name in need.keys() - have.keys()]
    problems += [f"{name} is there and has no place here" for name in have.keys() - need.keys()]
    if problems:
        shown = "; ".join(sorted(problems)[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise UserError(
            f"{where} is of another architecture: {shown}. Use the model section it was trained with, or another name."
        )


def save_params(folder: Path, params: Any, meta: Mapping[str, Any]) -> str:
    """Writes parameters alone, with a JSON description; returns their fingerprint."""
    mark = fingerprint(params)
    ocp.save(str(folder.absolute()), params, overwrite=True, custom_metadata={**meta, "fingerprint": mark})
    return mark


def params_meta(folder: Path) -> dict[str, Any]:
    """The JSON description of finished parameters. Raises UserError where there are none."""
    try:
        return dict(ocp.metadata(str(folder.absolute())).custom_metadata or {})
    except Exception as error:
        raise UserError(f"{folder}: no parameters there ({type(error).__name__})") from error


def load_params(folder: Path, target: Any) -> Any:
    """Reads parameters onto the shardings of `target`.

    Raises UserError where they are of another architecture or damaged.
    """
    where = str(folder.absolute())
    meta = params_meta(folder)
    check_same(ocp.metadata(where).metadata, target, str(folder))
    params = ocp.load(where, abstract(target))
    if fingerprint(params) != meta.get("fingerprint"):
        raise UserError(f"{folder}: the parameters there are damaged; remove the stage's folder and train it again")
    return params


def clear(folder: Path) -> None:
    """Removes a folder that an unfinished write may have left."""
    shutil.rmtree(folder, ignore_errors=True)
