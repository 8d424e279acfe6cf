"""A stage's value on a small budget: few rows, a learning rate of 0, and untrained parents where there are none yet.

Reads files, writes none.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.config.schema import LoraConfig, PpoConfig, RolloutConfig, SftConfig, StageConfig
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import Net, Params, joined
from jaxgpt.models.transformer import compute_dtype
from jaxgpt.runs import RANDOM, STAGES, is_finished, is_foreign, parents, result_folder
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Drawn, Stage
from jaxgpt.train.state import State, initial_state

ROWS = 8
"""Rows or episodes of a trial, or as many as the devices need."""


@dataclasses.dataclass(frozen=True)
class TrialRun(Run):
    """A run whose stages can be made before their parents are trained: new parameters stand for those."""

    def lacks(self, init: str) -> bool:
        """Whether a parent is a stage of this run that has no result yet."""
        return init in STAGES and not is_finished(self.folder / init)

    def missing(self, name: str) -> list[str]:
        """The parents of a stage that are not trained yet. Raises UserError for one that is named and not there."""
        found = []
        for role, parent in parents(self.config, name).items():
            if self.lacks(parent):
                found.append(parent)
            elif parent != RANDOM and not is_foreign(parent):
                result_folder(self.config, parent, "language" if role == "start" else "scalar")
        return list(dict.fromkeys(found))

    def check_language(self, init: str) -> None:
        """As for any run; a stage to come will fit."""
        if not self.lacks(init):
            super().check_language(init)

    def load_language(self, init: str) -> Params:
        """A finished language model's parameters, or new ones, the same at every call."""
        if not self.lacks(init):
            return super().load_language(init)
        return jax.jit(language_model(self.config.model, self.vocab).init)(self.key(init))

    def reward_net(self, init: str, lora: LoraConfig | None = None) -> Net:
        """A reward model's computation; of one to come, of the run's own architecture."""
        return scalar_model(self.config.model, self.vocab, lora) if self.lacks(init) else super().reward_net(init, lora)

    def load_reward(self, init: str) -> tuple[Net, Params]:
        """A finished reward model, or a new one."""
        if not self.lacks(init):
            return super().load_reward(init)
        net = self.reward_net(init)
        return net, jax.jit(net.init)(self.key(init))


def small(config: StageConfig, ways: int) -> StageConfig:
    """The stage's settings with little to do for `ways` devices that share a batch, and a learning rate of 0."""
    still: dict[str, Any] = {"optimizer": config.optimizer.model_copy(update={"lr": 0.0}), "accumulate": 1}
    rows = -(-ROWS // ways) * ways
    if not isinstance(config, RolloutConfig):
        still |= {"batch": rows, "steps": 1, "eval_batches": 1}
        if isinstance(config, SftConfig):
            still["dropout"] = 0.0
        return config.model_copy(update=still)
    unit = config.responses * ways
    still |= {"episodes": -(-ROWS // unit) * unit, "rollout_batch": None, "epochs": 1, "iterations": 1, "samples": 0}
    if isinstance(config, PpoConfig):
        still |= {"value_lr": None, "ptx": config.ptx and config.ptx.model_copy(update={"batch": rows})}
    elif hasattr(config, "dynamic_sampling"):
        still["dynamic_sampling"] = 0
    made = config.model_copy(update=still)
    return made.model_copy(update={"batch": made.learned})


class Trial(NamedTuple):
    """A stage before its first update."""

    run: TrialRun
    name: str
    config: StageConfig
    stage: Stage
    state: State
    frozen: Params
    drawn: Drawn
    """What the stage's source gives for the first update."""

    @property
    def params(self) -> Params:
        """What the stage's loss sees."""
        return joined(self.frozen, self.state.params)

    @property
    def float32(self) -> bool:
        """Whether the blocks compute in float32 here, so that figures are tight."""
        return compute_dtype(self.run.config.model) == jnp.float32

    def bar(self, float32: float, bfloat16: float | None = None) -> float | None:
        """The bar for this machine's arithmetic; None where nothing is asked."""
        return float32 if self.float32 else bfloat16


def begin(run: TrialRun, name: str, config: StageConfig, stage: Stage) -> Trial:
    """The first state and batch of a stage; call under `jax.set_mesh`."""
    extras = {key: jnp.float32(value) for key, value in stage.extras.items()}
    state = jax.jit(functools.partial(initial_state, tx=stage.tx, extras=extras))(stage.init())
    return Trial(run, name, config, stage, state, stage.frozen(), stage.source(0, state))
