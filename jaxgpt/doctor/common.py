"""Checks of any stage: numbers that are numbers, a plausible first loss, and an update at rate 0 that moves nothing."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.doctor.check import Check, below, near, none_of
from jaxgpt.doctor.trial import Trial
from jaxgpt.losses import Metrics
from jaxgpt.models.net import Params
from jaxgpt.runs import RANDOM
from jaxgpt.train.state import fingerprint
from jaxgpt.train.step import Batch, make_step

RANDOM_WITHIN = 1.0
"""Nats that a language model's first loss may be from log(vocabulary)."""
FRESH_WITHIN = 1.0
"""Nats that a reward model's first loss may be from that of equal scores, log 2 for pairs."""


def first_figures(trial: Trial, *others: Params) -> list[dict[str, float]]:
    """The loss's own metrics on the first batch, before any update; and with other parameters."""

    @jax.jit
    def measure(params: Params, batch: Batch) -> Metrics:
        with jax.numpy_dtype_promotion("strict"):
            return trial.stage.loss(params, batch)[1]

    found = [measure(params, trial.drawn.batch) for params in (trial.params, *others)]
    return [{name: float(one.reported) for name, one in figures.items()} for figures in found]


def finite(name: str, params: Any) -> Check:
    """Whether every parameter is a number; `name` says whose they are."""
    counts = jax.tree.map(lambda leaf: jnp.sum(~jnp.isfinite(leaf)), params)
    bad = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), int(count))
        for path, count in jax.tree_util.tree_leaves_with_path(jax.device_get(counts))
        if count
    ]
    first = f"the first is in {bad[0][0]}: " if bad else ""
    return none_of(
        f"not finite: {name}", sum(count for _, count in bad),
        f"{first}the checkpoint is spoilt; take another, or train its stage again with a lower lr",
    )  # fmt: skip


def still(trial: Trial) -> list[Check]:
    """One update at learning rate 0; uses up the trial's state."""
    before = fingerprint(trial.state.params)
    step = make_step(trial.stage.loss, trial.stage.tx, trial.stage.schedule)
    state, figures = step(trial.state, trial.drawn.batch, trial.frozen)
    norm, moved = float(figures["grad_norm"]), fingerprint(state.params) != before
    return [
        Check(
            "first gradient's norm", f"{norm:.2g}", "a number", int(state.skipped) == 0,
            "loss or gradient is not finite: look for parameters or scores that are no numbers above, or for a "
            "model.dtype that is too narrow",
        ),
        Check(
            "drift at lr = 0", "moved" if moved else "none", "none, bit for bit", not moved,
            f"something besides the optimizer's rate changes parameters in {trial.name}: a fault of the program",
        ),
    ]  # fmt: skip


def reward_loss(trial: Trial) -> Check:
    """The first loss of a reward model against that of a head that prefers nothing."""
    equal = {**trial.params, "head_D": jnp.zeros_like(trial.params["head_D"])}
    first, indifferent = first_figures(trial, equal)
    return near(
        "loss at init, nats a prompt", first["loss"], indifferent["loss"], FRESH_WITHIN,
        "a new head should prefer little: its scores are far too wide; look at the model that reward.init names",
        "equal scores",
    )  # fmt: skip


def language_loss(trial: Trial, figure: float) -> Check:
    """The first loss against guessing: log of the vocabulary."""
    guess, start = math.log(trial.run.vocab), trial.run.parent(trial.name)
    if start == RANDOM or trial.run.lacks(start):
        return near(
            "loss at init, nats a token", figure, guess, RANDOM_WITHIN,
            "a new model should know nothing and be sure of nothing: look at model.embedding_scale, model.logit_scale "
            "and the initializer's settings", f"log {trial.run.vocab:,}",
        )  # fmt: skip
    return below(
        "loss at init, nats a token", figure, guess,
        f"the model that {trial.name} starts from is worse than guessing (log {trial.run.vocab:,}): another tokenizer "
        "or template than it was trained with, or spoilt parameters", f"log {trial.run.vocab:,}",
    )  # fmt: skip
