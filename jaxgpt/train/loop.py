"""The one training loop: batch, step, metrics, evaluation, checkpoint.

Reads the clock, handles signals, writes the stage's folder.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import signal
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.console import Console

from jaxgpt import hosts
from jaxgpt.config.schema import StageConfig
from jaxgpt.errors import UserError
from jaxgpt.health import Limits
from jaxgpt.models.net import Params, count, joined
from jaxgpt.places import write_whole
from jaxgpt.train.checkpoint import Checkpoints, save_params
from jaxgpt.train.metrics import Clock, ConsoleLine, JsonLines, Warnings, Writer
from jaxgpt.train.state import State, initial_state
from jaxgpt.train.step import Batch, Loss, make_step

RESUMABLE = 75
"""Exit code of a run that was asked to stop and can go on (EX_TEMPFAIL)."""


class Drawn(NamedTuple):
    """What a source gives for one step."""

    batch: Batch
    extras: dict[str, jax.Array]
    """The state's extras from now on."""
    metrics: Mapping[str, jax.Array] = types.MappingProxyType({})
    """Figures to log with the step, as device scalars of their own: the arrays of `extras` are used up by the step."""
    samples: tuple[Mapping[str, Any], ...] = ()
    """Episodes to keep for people to read: JSON objects, for samples.jsonl."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A training stage as a value: what makes pretraining, fine-tuning, reward modelling and PPO different."""

    name: str
    init: Callable[[], Params]
    """Makes or loads the first parameters, on the mesh."""
    abstract: Params
    """Their shapes and shardings."""
    loss: Loss
    source: Callable[[int, State], Drawn]
    """The batch of a step: pure in (step, state); called in order."""
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    """Learning rate by update, for the log."""
    steps: int
    tokens_per_step: int
    evaluate: Callable[[Params], dict[str, float]] | None = None
    quality: Callable[[dict[str, float]], float] | None = None
    """Of an evaluation; higher is better."""
    boundary: Callable[[int], bool] = lambda step: True
    """Whether a checkpoint may stand before this step: a source with a rollout in hand says no."""
    extras: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """First values of the state's extras."""
    frozen: Callable[[], Params] = dict
    """Makes or loads parameters that nothing trains; the loss sees them and the trained ones as one tree."""
    finish: Callable[[State], Params] = lambda state: state.params
    """The parameters that are handed on."""
    beside: Callable[[State], Mapping[str, Params]] = lambda state: {}
    """Others to keep, each in a folder of its name beside params/."""
    known: Callable[[], Mapping[str, Any]] = dict
    """What is kept beside those, as JSON; asked after `finish`."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """When a figure is worth a warning."""
    notes: tuple[str, ...] = ()
    """What there is to say of the data before training."""
    close: Callable[[], None] = lambda: None
    """Lets go of what the source holds."""


class Preempted(Exception):
    """The run was asked to stop; its state is saved."""


@dataclasses.dataclass
class _Stop:
    """Whether SIGTERM or SIGINT has come, to any host; a second one ends a process that is alone at once."""

    asked: bool = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self.asked:
            os._exit(RESUMABLE)
        self.asked = True


def train(stage: Stage, folder: Path, config: StageConfig, meta: Mapping[str, Any], console: Console) -> dict[str, Any]:
    """Runs a stage to its end, from its newest checkpoint where there is one; call under `jax.set_mesh`.

    Writes metrics.jsonl, warnings.jsonl, samples.jsonl, checkpoints/ and, at the end, params/, what is kept beside it,
    and done.json (returned).
    `meta` goes into params/.
    Raises Preempted once the state is saved after SIGTERM or SIGINT.
    """
    checkpoints = Checkpoints(
        folder / "checkpoints", config.checkpoint.keep, lambda text: console.print(text, highlight=False)
    )
    stop = _Stop()
    # Several hosts agree on a step, and jax listens for the signal.
    listens = (signal.SIGTERM, signal.SIGINT) if hosts.count() == 1 else ()
    handlers = {number: signal.signal(number, stop) for number in listens}
    session = None
    for note in stage.notes:
        console.print(f"  {note}", highlight=False)
    try:
        state, host = _first_state(stage, checkpoints)
        session = _Session(stage, config, folder, checkpoints, stop, console, int(state.step), host, meta)
        state = session.run(state)
        done = _finish(stage, folder, state, session, meta)
        if stop.asked:
            raise Preempted(f"{stage.name}: finished, and asked to stop; the same command goes on")
        return done
    finally:
        if session is not None:
            session.close()
        stage.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        checkpoints.close()


def _first_state(stage: Stage, checkpoints: Checkpoints) -> tuple[State, dict[str, Any]]:
    restored = checkpoints.restore(_target(stage)) if checkpoints.steps else None
    if restored is not None:
        return restored
    start = jax.jit(lambda params: initial_state(params, stage.tx, _extras(stage)), donate_argnums=0)
    return start(stage.init()), {}


def _extras(stage: Stage) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in stage.extras.items()}


def _target(stage: Stage) -> State:
    return jax.eval_shape(lambda params: initial_state(params, stage.tx, _extras(stage)), stage.abstract)


class _Session:
    """One start of a stage: the order of events, and what is remembered between steps outside the state."""

    def __init__(
        self,
        stage: Stage,
        config: StageConfig,
        folder: Path,
        checkpoints: Checkpoints,
        stop: _Stop,
        console: Console,
        start: int,
        host: dict[str, Any],
        meta: Mapping[str, Any],
    ):
        self.stage, self.config, self.checkpoints, self.stop = stage, config, checkpoints, stop
        self.meta = dict(meta)
        self.frozen: Params = {}
        self.clock = Clock(host.get("seconds", 0.0), stage.tokens_per_step)
        self.best: dict[str, Any] | None = host.get("best")
        self.saved = start
        self.skipped = 0
        self.late: list[tuple[int, dict[str, jax.Array]]] = []
        first = hosts.first()
        self.samples = JsonLines(folder / "samples.jsonl", after=start) if first else None
        self.writers = [JsonLines(folder / "metrics.jsonl", after=start)] if first else []
        self.writers += [ConsoleLine(console, stage.name, stage.steps, start, config.log_every)] if first else []
        self.writers += [Warnings(folder, start, stage.limits, console)] if first else []

    def run(self, state: State) -> State:
        """Steps to the end; the state whose parameters are handed on."""
        stage = self.stage
        step = make_step(stage.loss, stage.tx, stage.schedule, self.config.accumulate)
        self.frozen = stage.frozen()
        every = self.config.checkpoint.every
        for n in range(self.saved, stage.steps):
            since = self.clock.now()
            drawn = stage.source(n, state)
            self.clock.waited(since)
            with jax.transfer_guard("disallow"):
                state, metrics = step(state.replace(extras=drawn.extras), drawn.batch, self.frozen)
            self.late.append((n + 1, {**metrics, **drawn.metrics}))
            for sample in drawn.samples if self.samples is not None else ():
                self.samples.write({"step": n + 1, **sample})
            self.stop.asked = hosts.preempted() or self.stop.asked
            last, stopping = n + 1 == stage.steps, self.stop.asked
            measures = stage.evaluate is not None and (last or (n + 1) % self.config.eval_every == 0)
            stands = last or stage.boundary(n + 1)
            saves = stands and (last or stopping or (n + 1) // every > self.saved // every)
            self._report(ahead=0 if measures or saves else 1)
            if measures:
                self._evaluate(n + 1, state, stands)
            if saves or (self.config.best == "best" and self.best is not None and self.best["step"] == n + 1):
                self._checkpoint(n + 1, state)
            if saves and stopping and not last:
                self.checkpoints.wait()
                raise Preempted(f"{stage.name}: stopped after step {n + 1} of {stage.steps}; the same command goes on")
        self.checkpoints.wait()
        self.skipped = int(state.skipped)
        return self._best(state) if self.config.best == "best" else state

    def _best(self, state: State) -> State:
        if self.best is None or self.best["step"] == int(state.step):
            return state
        restored = self.checkpoints.restore(_target(self.stage), self.best["step"])
        if restored is None:
            raise UserError(f"{self.stage.name}: the best checkpoint, of step {self.best['step']}, is gone")
        return restored[0]

    def _evaluate(self, n: int, state: State, stands: bool) -> None:
        """Measures the parameters; they may become the best where a checkpoint can stand (`stands`)."""
        assert self.stage.evaluate is not None
        figures = self.stage.evaluate(joined(self.frozen, state.params))
        shown = {name: _finite(value) for name, value in figures.items()}
        self._emit({"step": n, "eval": shown, "time": {"seconds": round(self.clock.seconds, 3)}})
        self.clock.skip()
        quality = self.stage.quality(figures) if self.stage.quality and stands else math.nan
        if math.isfinite(quality) and (self.best is None or quality > self.best["quality"]):
            self.best = {"step": n, "quality": quality}

    def _checkpoint(self, n: int, state: State) -> None:
        best = self.best["step"] if self.best is not None else None
        for writer in self._files():
            writer.flush()
        self.checkpoints.save(state, {"seconds": self.clock.seconds, "best": self.best, "model": self.meta}, best)
        self.saved = n

    def _report(self, ahead: int) -> None:
        """Writes the figures of all steps but the last `ahead`: one is fetched only once the next step is under way.

        Steps that are written together share the time since the line before: each alone, the later ones would seem to
        have taken none.
        """
        due = self.late[: len(self.late) - ahead]
        if not due:
            return
        del self.late[: len(due)]
        fetched = [(n, jax.device_get(metrics)) for n, metrics in due]
        lap = self.clock.lap(len(due))
        for n, metrics in fetched:
            values = {name: _finite(value.item()) for name, value in metrics.items()}
            self._emit({"step": n, **values, "tokens": n * self.stage.tokens_per_step, "time": lap})

    def _emit(self, line: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(line)

    def _files(self) -> list[Writer]:
        return self.writers + ([self.samples] if self.samples is not None else [])

    def close(self) -> None:
        for writer in self._files():
            writer.close()


def _finite(value: float) -> float | None:
    """JSON has no NaN: null stands for a figure that is not finite."""
    return value if math.isfinite(value) else None


def _finish(stage: Stage, folder: Path, state: State, session: _Session, meta: Mapping[str, Any]) -> dict[str, Any]:
    """Hands on the parameters of `state`, the last one or the best."""
    params = stage.finish(state)
    for name, others in stage.beside(state).items():
        save_params(folder / name, others, {**meta, "kind": name})
    done = {
        "step": int(state.step),
        "trained": stage.steps,
        "fingerprint": save_params(folder / "params", params, {**meta, **stage.known()}),
        "seconds": round(session.clock.seconds, 3),
        "tokens": stage.steps * stage.tokens_per_step,
        "params": count(params),
        "skipped": session.skipped,
        "environment": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "hosts": hosts.count(),
            "devices": jax.device_count(),
            "platform": jax.devices()[0].device_kind,
            "cpus": os.cpu_count(),
        },
    }
    if hosts.first():
        write_whole(folder / "done.json", json.dumps(done, indent=1) + "\n")
    hosts.barrier(f"the end of {stage.name}")
    return done
