"""Rejection sampling: fine-tuning on the best of n responses to each prompt (best-of-n, RAFT: arXiv 2304.06767).

Letters: B episodes, N response length, P prompts, G responses of one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgpt.advantages import episode_kl
from jaxgpt.config.schema import RejectionConfig
from jaxgpt.losses import Metrics, aggregate, next_token
from jaxgpt.models.net import Params
from jaxgpt.optim import adamw, by_part
from jaxgpt.stages.episodes import Actors
from jaxgpt.stages.grpo import by_prompt
from jaxgpt.stages.onpolicy import on_policy
from jaxgpt.stages.ppo import entropy_figure
from jaxgpt.stages.rollouts import Estimate, Estimated, pick
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage
from jaxgpt.train.step import Batch, Loss, Terms


def rejection_loss(config: RejectionConfig, actors: Actors) -> Loss:
    """Negative log-likelihood of the best responses, end token included."""
    norm = float(config.response_length) if config.aggregation == "fixed-norm" else None

    def loss(params: Params, batch: Batch) -> tuple[Terms, Metrics]:
        logp_BN, entropy_BN, _ = actors.respond(params, batch)
        _, figures = next_token(logp_BN, batch["mask"])
        figures = {**figures, **entropy_figure(entropy_BN, batch["mask"])}
        return aggregate(-logp_BN, batch["mask"], config.aggregation, norm), figures

    return loss


def rejection_estimate(config: RejectionConfig) -> Estimate:
    """The best response to each prompt, by its score less the KL penalty; the first of equals."""

    def estimate(measured: Batch, scores_B: jax.Array, extras: dict[str, jax.Array]) -> Estimated:
        if config.kl.coef:
            pair = (measured["logp"], measured["reference_logp"], measured["mask"])
            scores_B = scores_B - config.kl.coef * episode_kl(*pair, kind=config.kl.estimator)
        scores_PG = by_prompt(scores_B, config.responses)
        best_P = jnp.argmax(scores_PG, axis=1).astype(jnp.int32)
        rows_P = jnp.arange(config.learned, dtype=jnp.int32) * config.responses + best_P
        figures = {
            "objective/rlhf_reward": jnp.mean(scores_B),
            "objective/best_score": jnp.mean(jnp.max(scores_PG, axis=1)),
        }
        batch = pick({name: measured[name] for name in ("tokens", "segments", "mask")}, rows_P)
        return Estimated(batch, figures, extras)

    return estimate


def stage(run: Run, config: RejectionConfig) -> Stage:
    """Rejection sampling as a value; call under `jax.set_mesh`."""
    return on_policy(
        run, config, "rejection",
        estimate=rejection_estimate(config),
        loss=lambda actors: rejection_loss(config, actors),
        tx=by_part({"policy": adamw(config.optimizer, config.steps, config.updates_per_rollout)}),
        reference=config.kl.coef > 0,
    )  # fmt: skip
