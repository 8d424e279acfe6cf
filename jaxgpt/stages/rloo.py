"""RLOO (arXiv 2402.14740): REINFORCE whose baseline is the mean reward of a prompt's other responses.

A response is one action: its reward is the score less the KL of all its tokens, its ratio that of all of them. On the
first update after a rollout the gradient is REINFORCE's. Letters: B episodes, N response length.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgpt.advantages import adaptive_kl, episode_kl, leave_one_out, whiten
from jaxgpt.config.schema import RlooConfig
from jaxgpt.losses import Metrics, ppo_policy, sequence_logp
from jaxgpt.models.net import Params
from jaxgpt.optim import adamw, by_part
from jaxgpt.stages.episodes import Actors
from jaxgpt.stages.grpo import by_episode, by_prompt
from jaxgpt.stages.onpolicy import on_policy
from jaxgpt.stages.ppo import entropy_figure, ratio_figures
from jaxgpt.stages.rollouts import Estimate, Estimated
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage
from jaxgpt.train.step import Batch, Loss, Terms


def rloo_loss(config: RlooConfig, actors: Actors) -> Loss:
    """Clipped surrogate of whole responses, mean over responses."""

    def loss(params: Params, batch: Batch) -> tuple[Terms, Metrics]:
        logp_BN, entropy_BN, _ = actors.respond(params, batch)
        mask_BN = batch["mask"]
        any_B = jnp.max(mask_BN, axis=1)
        new_B, old_B = sequence_logp(logp_BN, mask_BN), sequence_logp(batch["logp"], mask_BN)
        policy, figures = ppo_policy(new_B, old_B, batch["advantage"], any_B, config.clip)
        figures = {**figures, **ratio_figures(new_B, old_B, any_B)}
        return policy, {**figures, **entropy_figure(entropy_BN, mask_BN)}

    return loss


def rloo_estimate(config: RlooConfig) -> Estimate:
    """Each response's reward, KL included, over the mean of the others'."""
    kl = config.kl

    def estimate(measured: Batch, scores_B: jax.Array, extras: dict[str, jax.Array]) -> Estimated:
        coef, mask_BN = extras["kl_coef"], measured["mask"]
        pair = (measured["logp"], measured["reference_logp"], mask_BN)
        penalty_B = coef * episode_kl(*pair, kind=kl.estimator)
        advantage_B = by_episode(leave_one_out(by_prompt(scores_B - penalty_B, config.responses)))
        if config.whiten_advantages:
            advantage_B = whiten(advantage_B, jnp.ones_like(advantage_B))
        figures = {
            "objective/rlhf_reward": jnp.mean(scores_B - penalty_B),
            "objective/non_score_reward": -jnp.mean(penalty_B),
            "objective/kl_coef": coef,
        }
        if kl.controller == "adaptive":
            measure = jnp.mean(episode_kl(*pair, how=kl.measure))
            extras = {**extras, "kl_coef": adaptive_kl(coef, measure, kl.target, kl.horizon, config.episodes)}
        batch = {name: measured[name] for name in ("tokens", "segments", "mask", "logp")}
        return Estimated({**batch, "advantage": advantage_B}, figures, extras)

    return estimate


def stage(run: Run, config: RlooConfig) -> Stage:
    """RLOO as a value; call under `jax.set_mesh`."""
    return on_policy(
        run, config, "rloo",
        estimate=rloo_estimate(config),
        loss=lambda actors: rloo_loss(config, actors),
        tx=by_part({"policy": adamw(config.optimizer, config.steps, config.updates_per_rollout)}),
    )  # fmt: skip
