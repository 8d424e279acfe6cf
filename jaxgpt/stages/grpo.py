"""GRPO and its kin: each response is measured against the others of its prompt, without a critic.

GRPO (arXiv 2402.03300), Dr. GRPO (2503.20783: no deviation, a fixed norm), DAPO (2503.14476: clip-higher, dynamic
sampling, token mean, overlong penalty) are settings. Letters: B episodes, N response length, P prompts, G a group.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgpt.advantages import group_relative, overlong_penalty
from jaxgpt.config.schema import GrpoConfig
from jaxgpt.losses import Metrics, kl_penalty, ppo_policy
from jaxgpt.models.net import Params
from jaxgpt.optim import adamw, by_part
from jaxgpt.stages.episodes import Actors
from jaxgpt.stages.onpolicy import on_policy
from jaxgpt.stages.ppo import entropy_figure, ratio_figures
from jaxgpt.stages.rollouts import Estimate, Estimated
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage
from jaxgpt.train.step import Batch, Loss, Terms


def grpo_loss(config: GrpoConfig, actors: Actors) -> Loss:
    """Clipped surrogate, and the KL from the reference as a term of its own."""
    norm = float(config.response_length) if config.aggregation == "fixed-norm" else None

    def loss(params: Params, batch: Batch) -> tuple[Terms, Metrics]:
        logp_BN, entropy_BN, _ = actors.respond(params, batch)
        mask_BN = batch["mask"]
        policy, figures = ppo_policy(
            logp_BN, batch["logp"], batch["advantages"], mask_BN, config.clip,
            clip_high=config.clip_high, aggregation=config.aggregation, norm=norm,
        )  # fmt: skip
        figures = {**figures, **ratio_figures(logp_BN, batch["logp"], mask_BN), **entropy_figure(entropy_BN, mask_BN)}
        if not config.kl.coef:
            return policy, figures
        kl = kl_penalty(
            logp_BN, batch["reference_logp"], mask_BN, config.kl.estimator, aggregation=config.aggregation, norm=norm
        )
        return (policy, kl.scaled(config.kl.coef)), {**figures, "loss/kl": kl}

    return loss


def grpo_estimate(config: GrpoConfig) -> Estimate:
    """Advantages of each response in its group, the same for all its tokens."""

    def estimate(measured: Batch, scores_B: jax.Array, extras: dict[str, jax.Array]) -> Estimated:
        mask_BN = measured["mask"]
        if config.overlong_buffer:
            lengths_B = jnp.sum(mask_BN, axis=1)
            scores_B = scores_B + overlong_penalty(lengths_B, config.response_length, config.overlong_buffer)
        advantages_B, equal = grouped(scores_B, config)
        figures = {"objective/zero_std": equal, "objective/rlhf_reward": jnp.mean(scores_B)}
        names = ("tokens", "segments", "mask", "logp", "reference_logp")
        batch = {name: measured[name] for name in names if name in measured}
        return Estimated({**batch, "advantages": advantages_B[:, None] * mask_BN}, figures, extras)

    return estimate


def grouped(scores_B: jax.Array, config: GrpoConfig) -> tuple[jax.Array, jax.Array]:
    """Advantages [B], and the share of groups whose scores are all equal."""
    scores_PG = by_prompt(scores_B, config.responses)
    equal = jnp.mean((jnp.max(scores_PG, axis=1) == jnp.min(scores_PG, axis=1)).astype(jnp.float32))
    return by_episode(group_relative(scores_PG, config.std, config.std_eps)), equal


def by_prompt(x_B: jax.Array, responses: int) -> jax.Array:
    """[B] as [P, G], on every device."""
    return jax.sharding.reshard(x_B, jax.P(None)).reshape(-1, responses)


def by_episode(x_PG: jax.Array) -> jax.Array:
    """[P, G] as [B], split over the devices."""
    return jax.sharding.reshard(x_PG.reshape(-1), jax.P(("data", "fsdp")))


def stage(run: Run, config: GrpoConfig) -> Stage:
    """GRPO as a value; call under `jax.set_mesh`."""
    return on_policy(
        run, config, "grpo",
        estimate=grpo_estimate(config),
        loss=lambda actors: grpo_loss(config, actors),
        tx=by_part({"policy": adamw(config.optimizer, config.steps, config.updates_per_rollout)}),
        reference=config.kl.coef > 0,
        rounds=1 + config.dynamic_sampling,
    )  # fmt: skip
