"""Checks of a stage's first rollout, where the policy is still the reference.

Letters: B episodes, P prompt length, N response length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.doctor.check import Check, below, zero
from jaxgpt.doctor.trial import Trial
from jaxgpt.mesh import batch_spec
from jaxgpt.models.net import joined
from jaxgpt.train.step import Batch

PADS = 7
"""Padding that is put in front of prompts beside what is there."""
RATIO = (
    "the policy that learns is not the one that sampled: log-probabilities must be of the same temperature, padding "
    "and tokens on both sides"
)
SAME = (
    "reference and policy must begin as one model, and their log-probabilities must be taken at one temperature: the "
    "penalty would pull the policy elsewhere from the first update on"
)


def first_rollout(trial: Trial, figures: Mapping[str, float]) -> list[Check]:
    """Ratio, KL, and the sampler's log-probabilities; `figures` are the loss's on the first minibatch."""
    told = {name: float(x) for name, x in trial.drawn.metrics.items()}
    checks = []
    if "val/ratio_gap" in figures:
        checks.append(below("largest |ratio - 1|, first minibatch", figures["val/ratio_gap"], _bar(trial, 1e-4), RATIO))
    if "objective/kl" in told:
        checks += [_kl(trial, "KL at step 0, k1", told["objective/kl"])]
        checks += [_kl(trial, "KL at step 0, k3", told["objective/kl_k3"])]
    else:
        checks.append(Check("KL at step 0", "no reference: kl.coef is 0"))
    checks += [
        below(
            "sampler - trainer, nats a token", told["val/sampler_gap"], trial.bar(1e-3),
            "what samples is not what is trained, so every ratio is wrong: look at model.attention.kernel and "
            "model.dtype",
        ),
        below("left padding - none, nats a token", padding(trial), trial.bar(1e-4, 0.05),
            "log-probabilities depend on the padding before a prompt: look at model.attention.kernel and "
            "model.positions"),
        ends(trial, told["objective/eos_rate"]),
        Check("scores, mean and deviation", f"{told['objective/scores']:.2f}, {told['objective/scores_std']:.2f}"),
        Check("entropy, nats a token", f"{told['objective/entropy']:.2f}"),
    ]  # fmt: skip
    return checks


def _bar(trial: Trial, float32: float) -> float | None:
    return trial.bar(float32, 0.05)


def _kl(trial: Trial, name: str, figure: float) -> Check:
    """KL is 0 bit for bit where reference and policy are the same numbers in the same arithmetic."""
    if trial.float32 and trial.config.lora is None and trial.config.frozen_dtype == "float32":
        return zero(name, figure, SAME)
    return below(name, abs(figure), 0.05 * trial.config.response_length, SAME)


def ends(trial: Trial, rate: float) -> Check:
    """Whether sampled responses end; asked of a trained start alone."""
    name, figure = "responses that end", f"{rate:.0%}, of at most {trial.config.response_length} tokens"
    if trial.run.lacks(trial.run.parent(trial.name)):
        return Check(name, figure, change="not asked: the start is not trained")
    return Check(
        name, figure, "above 0", rate > 0,
        f"raise {trial.name}.response_length, or mend what the start was trained on: the end token has to be among the "
        f"trained ones, and {trial.name}.stop unset or a token that it says",
    )  # fmt: skip


def padding(trial: Trial) -> float:
    """The largest difference of log-probabilities that PADS columns before the prompts make, nats."""
    source, batch = trial.stage.source, trial.drawn.batch
    params = joined(source.frozen(), trial.state.params)
    actors = dataclasses.replace(source.actors, reference=None, critic=None)
    wider = dataclasses.replace(actors, prompt=actors.prompt + PADS)

    @jax.jit
    def largest(params: Mapping[str, Any], batch: Batch) -> jax.Array:
        with jax.numpy_dtype_promotion("strict"):
            shifted = {
                name: jax.sharding.reshard(jnp.pad(batch[name], ((0, 0), (PADS, 0))), batch_spec(2))
                for name in ("tokens", "segments")
            }
            gap_BN = jnp.abs(actors.measure(params, batch)["logp"] - wider.measure(params, shifted)["logp"])
            return jnp.max(jnp.where(batch["mask"] > 0, gap_BN, 0.0))

    return float(largest(params, {name: batch[name] for name in ("tokens", "segments", "mask")}))
