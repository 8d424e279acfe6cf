"""From a rollout's log-probabilities, scores and values to rewards, advantages and returns.

Dimension key: B batch (episodes), T time. Position t of every [B, T] array stands for token t of an episode; the mask
is 1 on response tokens, end token included, and 0 on prompt and padding. `values_BT[:, t]` is V before token t, read at
the position of token t - 1. Results are float32, and 0 where the mask is 0; what masked positions hold is ignored.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

VARIANCE_FLOOR = 1e-8
"""Added to a variance before its root is taken (lm-human-preferences)."""


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: Literal["k1", "k2", "k3"] = "k1") -> jax.Array:
    """Estimate KL(policy || reference) from tokens drawn from the policy: nats, float32, the inputs' shape.

    With log r = ref_logp - logp: k1 = -log r and k3 = r - 1 - log r are unbiased, k2 = (log r)^2 / 2 is not; k2 and k3
    are never negative (J. Schulman, "Approximating KL divergence"). Differentiable; callers stop gradients.
    """
    change = logp.astype(jnp.float32) - ref_logp.astype(jnp.float32)
    match kind:
        case "k1":
            return change
        case "k2":
            return 0.5 * jnp.square(change)
        case "k3":
            return jnp.expm1(-change) + change
    raise ValueError(f"kl_estimate: kind is {kind!r}; it must be 'k1', 'k2' or 'k3'")


def episode_kl(logp_BT: jax.Array, ref_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum of k1 over each episode's tokens: nats, float32 [B]; the mean is objective/kl, input of `adaptive_kl`."""
    real_BT = mask_BT.astype(bool)
    kl_BT = kl_estimate(jnp.where(real_BT, logp_BT, 0.0), jnp.where(real_BT, ref_logp_BT, 0.0))
    return jax.lax.stop_gradient(jnp.sum(kl_BT, axis=1))


def replace_missing_eos(scores_B: jax.Array, ended_B: jax.Array, value: float | None) -> jax.Array:
    """Scores with `value` in place of those of episodes that never ended; float32 [B]. None keeps every score.

    To be done before the KL penalty is added (lm-human-preferences: -1).
    """
    scores_B = scores_B.astype(jnp.float32)
    return scores_B if value is None else jnp.where(ended_B.astype(bool), scores_B, value)


def token_rewards(
    scores_B: jax.Array,
    logp_BT: jax.Array,
    ref_logp_BT: jax.Array,
    mask_BT: jax.Array,
    kl_coef: float | jax.Array,
) -> jax.Array:
    """Rewards of each token: -kl_coef * k1, and the score too at the last real token; float32 [B, T].

    Both log-probabilities are taken at the sampling temperature. Scores may be of any dtype; the result is float32.
    The score of an episode without a real token is lost. No gradient flows into any input.
    """
    real_BT = mask_BT.astype(bool)
    kl_BT = kl_estimate(jnp.where(real_BT, logp_BT, 0.0), jnp.where(real_BT, ref_logp_BT, 0.0), "k1")
    place_T = jnp.arange(mask_BT.shape[1], dtype=jnp.int32)
    last_B = jnp.max(jnp.where(real_BT, place_T, -1), axis=1)
    score_BT = jnp.where(place_T == last_B[:, None], scores_B.astype(jnp.float32)[:, None], 0.0)
    return jax.lax.stop_gradient(score_BT - kl_coef * kl_BT)


def gae(
    rewards_BT: jax.Array, values_BT: jax.Array, mask_BT: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (arXiv 1506.02438) by a scan from the last token to the first.

        delta_t = R_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   G_t = A_t + V_t

    V and A after the last real token are 0, for truncated episodes too (lm-human-preferences). A masked position in
    the middle is passed over as if it were not there. No gradient flows into any input.

    Returns:
        advantages_BT and returns_BT, float32, the returns from the advantages before any whitening.
    """
    real_BT = mask_BT.astype(bool)
    rewards_BT = jnp.where(real_BT, rewards_BT.astype(jnp.float32), 0.0)
    values_BT = jnp.where(real_BT, values_BT.astype(jnp.float32), 0.0)

    def back(later: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        later_advantage_B, later_value_B = later
        reward_B, value_B, real_B = now
        delta_B = reward_B + gamma * later_value_B - value_B
        advantage_B = jnp.where(real_B, delta_B + gamma * lam * later_advantage_B, later_advantage_B)
        return (advantage_B, jnp.where(real_B, value_B, later_value_B)), advantage_B

    zero_B = jnp.zeros_like(values_BT[:, 0])
    _, advantages_TB = jax.lax.scan(back, (zero_B, zero_B), (rewards_BT.T, values_BT.T, real_BT.T), reverse=True)
    advantages_BT = jnp.where(real_BT, advantages_TB.T, 0.0)
    return jax.lax.stop_gradient(advantages_BT), jax.lax.stop_gradient(advantages_BT + values_BT)


def whiten(x_BT: jax.Array, mask_BT: jax.Array, shift_mean: bool = True) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-8) over the masked tokens of the global batch; float32, 0 elsewhere.

    The variance is the biased one (lm-human-preferences). Advantages: shift_mean=True; rewards: shift_mean=False, which
    adds the mean back.
    """
    real_BT = mask_BT.astype(bool)
    count = jnp.maximum(jnp.sum(real_BT.astype(jnp.float32)), 1.0)
    x_BT = jnp.where(real_BT, x_BT.astype(jnp.float32), 0.0)
    mean = jnp.sum(x_BT) / count
    centred_BT = jnp.where(real_BT, x_BT - mean, 0.0)
    white_BT = centred_BT * jax.lax.rsqrt(jnp.sum(jnp.square(centred_BT)) / count + VARIANCE_FLOOR)
    return white_BT if shift_mean else jnp.where(real_BT, white_BT + mean, 0.0)


def adaptive_kl(
    coef: float | jax.Array,
    kl: float | jax.Array,
    target: float,
    horizon: float,
    episodes: int | jax.Array,
) -> jax.Array:
    """The KL coefficient after one rollout (Ziegler et al. 2019, section 2.2); float32 [].

        e = clip(kl / target - 1, -0.2, 0.2),   coef <- coef (1 + e episodes / horizon)

    Args:
        coef: the coefficient that this rollout was rewarded with.
        kl: nats summed over each episode's tokens, mean over the rollout's episodes (`episode_kl`).
        target: the wanted `kl`, nats.
        horizon: episodes.
        episodes: episodes of this rollout; call once per rollout, not per minibatch.
    """
    coef, kl, episodes = (jnp.asarray(x).astype(jnp.float32) for x in (coef, kl, episodes))
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jax.lax.stop_gradient(coef * (1.0 + error * episodes / horizon))
