"""PPO against the reward, with the KL from the SFT model in it (Ouyang et al. 2022; Ziegler et al. 2019).

The trainables are one tree, {"policy", "value"}; the frozen reference and reward models only help to build the batch.

Letters: B episodes, N response length, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.advantages import adaptive_kl, episode_kl, gae, kl_estimate, token_rewards, value_mask, whiten
from jaxgpt.config.schema import PpoConfig
from jaxgpt.losses import Largest, Metrics, aggregate, ppo_policy, ppo_value
from jaxgpt.models.net import Params
from jaxgpt.optim import adamw, averaged, by_part
from jaxgpt.stages.episodes import Actors, masked_mean
from jaxgpt.stages.onpolicy import on_policy
from jaxgpt.stages.pretrain import language_loss, text_batches
from jaxgpt.stages.rollouts import Estimate, Estimated
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage
from jaxgpt.train.step import Batch, Loss, Terms


def ppo_loss(config: PpoConfig, actors: Actors) -> Loss:
    """Clipped surrogate, clipped value loss, entropy and pretraining loss, each a mean of its own; their sum is
    minimised, so that the gradient of PPO-ptx is the sum of the two gradients (InstructGPT, eq. 2)."""
    norm = float(config.response_length) if config.aggregation == "fixed-norm" else None
    text_loss = language_loss(actors.policy)

    def loss(params: Params, batch: Batch) -> tuple[Terms, Metrics]:
        logp_BN, entropy_BN, values_BN = actors.respond(params, batch)
        assert values_BN is not None
        mask_BN, old_BN = batch["mask"], batch["logp"]
        policy, figures = ppo_policy(
            logp_BN, old_BN, batch["advantages"], mask_BN, config.clip, aggregation=config.aggregation, norm=norm
        )
        value, more = ppo_value(
            values_BN, batch["values"], batch["returns"], batch["value_mask"], config.value_clip,
            aggregation=config.aggregation, norm=norm,
        )  # fmt: skip
        terms = [policy, value.scaled(config.value_coef)]
        entropy = aggregate(entropy_BN, mask_BN, config.aggregation, norm)
        if config.entropy_coef:
            terms.append(entropy.scaled(-config.entropy_coef))
        figures = {**figures, **more, **ratio_figures(logp_BN, old_BN, mask_BN), **entropy_figure(entropy_BN, mask_BN)}
        if config.ptx is not None:
            text, _ = text_loss(params["policy"], batch["ptx"])
            assert not isinstance(text, tuple)
            terms.append(text.scaled(config.ptx.coef))
            figures["loss/ptx"] = text
        return tuple(terms), figures

    return loss


def ratio_figures(logp: jax.Array, old: jax.Array, mask: jax.Array) -> Metrics:
    """How far the policy is from the one that made the episodes, at most; of tokens [B, N], or of responses [B]."""
    ratio = jnp.exp(jnp.where(mask > 0, logp - old, 0.0))
    return {"val/ratio_max": Largest.of(ratio, mask), "val/ratio_gap": Largest.of(jnp.abs(ratio - 1.0), mask)}


def entropy_figure(entropy_BN: jax.Array, mask_BN: jax.Array) -> Metrics:
    """The policy's entropy, nats a token."""
    return {"policy/entropy_avg": aggregate(jax.lax.stop_gradient(entropy_BN), mask_BN)}


def ppo_estimate(config: PpoConfig) -> Estimate:
    """Rewards of every token, advantages by GAE and returns."""
    kl = config.kl

    def estimate(measured: Batch, scores_B: jax.Array, extras: dict[str, jax.Array]) -> Estimated:
        coef, mask_BN = extras["kl_coef"], measured["mask"]
        logp_BN, reference_BN, values_BN = measured["logp"], measured["reference_logp"], measured["values"]
        counted_BN = value_mask(mask_BN, config.score_at)
        rewards_BN = token_rewards(
            scores_B, logp_BN, reference_BN, mask_BN, coef, place=config.score_at, estimator=kl.estimator
        )
        if config.whiten_rewards:
            rewards_BN = whiten(rewards_BN, counted_BN, shift_mean=False, variance=config.whiten_variance)
        advantages_BN, returns_BN = gae(rewards_BN, values_BN, counted_BN, config.gamma, config.lam)
        if config.whiten_advantages:
            advantages_BN = whiten(advantages_BN, mask_BN, variance=config.whiten_variance)
        penalty_BN = jnp.where(mask_BN > 0, kl_estimate(logp_BN, reference_BN, kl.estimator), 0.0)
        penalty = coef * jnp.mean(jnp.sum(penalty_BN, axis=1))
        error_BN = returns_BN - values_BN
        unexplained = masked_mean(jnp.square(error_BN - masked_mean(error_BN, counted_BN)), counted_BN)
        spread = masked_mean(jnp.square(returns_BN - masked_mean(returns_BN, counted_BN)), counted_BN)
        figures = {
            "objective/rlhf_reward": jnp.mean(scores_B) - penalty,
            "objective/non_score_reward": -penalty,
            "objective/kl_coef": coef,
            "objective/returns": masked_mean(returns_BN, counted_BN),
            "val/explained_variance": 1.0 - unexplained / jnp.maximum(spread, 1e-8),
        }
        if kl.controller == "adaptive":
            measure = episode_kl(logp_BN, reference_BN, mask_BN, how=kl.measure)
            extras = {**extras, "kl_coef": adaptive_kl(coef, jnp.mean(measure), kl.target, kl.horizon, config.episodes)}
        batch = {name: measured[name] for name in ("tokens", "segments", "mask", "logp", "values")}
        batch |= {"advantages": advantages_BN, "returns": returns_BN, "value_mask": counted_BN}
        return Estimated(batch, figures, extras)

    return estimate


def policy_drift(actors: Actors) -> Any:
    """k2 of the policy from the one that made the episodes, nats a token; for `ppo.stop_kl`."""

    def drift(params: Mapping[str, Any], episodes: Batch) -> jax.Array:
        with jax.numpy_dtype_promotion("strict"):
            logp_BN, _, _ = actors.respond(params, episodes)
            return masked_mean(0.5 * jnp.square(logp_BN - episodes["logp"]), episodes["mask"])

    return drift


def optimizer(config: PpoConfig) -> optax.GradientTransformation:
    """Policy and critic each with their own; rates fall by rollouts, and the policy's may begin later."""
    per = config.updates_per_rollout
    critic = config.optimizer.model_copy(update={"lr": config.value_lr or config.optimizer.lr})
    policy = adamw(config.optimizer, config.steps, per, idle=config.critic_warmup * per)
    if config.ema is not None:
        policy = averaged(policy, config.ema)
    return by_part({"policy": policy, "value": adamw(critic, config.steps, per)})


def stage(run: Run, config: PpoConfig) -> Stage:
    """PPO as a value; call under `jax.set_mesh`."""
    return on_policy(
        run, config, "ppo",
        estimate=ppo_estimate(config),
        loss=lambda actors: ppo_loss(config, actors),
        tx=optimizer(config),
        text=None if config.ptx is None else text_batches(run, config.ptx.context, config.ptx.batch),
        drift=None if config.stop_kl is None else policy_drift,
    )  # fmt: skip
