"""Advantages: generalized estimates from a critic, or scores compared within the group of one prompt; and whitening."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxgpt.advantages.kl import unmasked

VARIANCE_FLOOR = 1e-8
"""Added to a variance before its root is taken (lm-human-preferences)."""


def gae(
    rewards_BT: jax.Array, values_BT: jax.Array, mask_BT: jax.Array, gamma: float, lam: float
) -> tuple[jax.Array, jax.Array]:
    """Generalized advantage estimation (arXiv 1506.02438) by a scan from the last token to the first.

        delta_t = R_t + gamma V_{t+1} - V_t,   A_t = delta_t + gamma lam A_{t+1},   G_t = A_t + V_t

    V and A after the last real token are 0, for truncated episodes too (lm-human-preferences). A masked position in
    the middle is passed over as if it were not there. No gradient flows into any input.

    Args:
        rewards_BT: R of each token, as `token_rewards` gives them.
        values_BT: V before each token, read at the position of the token before it.
        mask_BT: 1 on the tokens of the response; see `value_mask`.
        gamma: discount per token.
        lam: lambda, 1 for the whole future and 0 for one step of it.

    Returns:
        advantages_BT and returns_BT, float32, the returns from the advantages before any whitening.
    """
    real_BT = jnp.asarray(mask_BT).astype(bool)
    rewards_BT, values_BT = unmasked(rewards_BT, mask_BT), unmasked(values_BT, mask_BT)

    def back(later: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        later_advantage_B, later_value_B = later
        reward_B, value_B, real_B = now
        delta_B = reward_B + gamma * later_value_B - value_B
        advantage_B = jnp.where(real_B, delta_B + gamma * lam * later_advantage_B, later_advantage_B)
        return (advantage_B, jnp.where(real_B, value_B, later_value_B)), advantage_B

    zero_B = jnp.zeros_like(jnp.sum(values_BT, axis=-1))
    steps = tuple(jnp.moveaxis(x_BT, -1, 0) for x_BT in (rewards_BT, values_BT, real_BT))
    _, advantages_TB = jax.lax.scan(back, (zero_B, zero_B), steps, reverse=True)
    advantages_BT = jnp.where(real_BT, jnp.moveaxis(advantages_TB, 0, -1), 0.0)
    return jax.lax.stop_gradient(advantages_BT), jax.lax.stop_gradient(advantages_BT + values_BT)


def whiten(
    x_BT: jax.Array,
    mask_BT: jax.Array,
    shift_mean: bool = True,
    variance: Literal["biased", "unbiased"] = "biased",
) -> jax.Array:
    """(x - mean) / sqrt(variance + 1e-8) over the masked tokens of the global batch; float32, 0 elsewhere.

    Advantages: shift_mean=True; rewards: shift_mean=False, which adds the mean back. The variance divides by the number
    of tokens n ("biased": lm-human-preferences, OpenRLHF) or by n - 1 ("unbiased": TRL, verl).
    """
    if variance not in ("biased", "unbiased"):
        raise ValueError(f"whiten: variance is {variance!r}; it must be 'biased' or 'unbiased'")
    real_BT, x_BT = jnp.asarray(mask_BT).astype(bool), unmasked(x_BT, mask_BT)
    count = jnp.sum(real_BT.astype(jnp.float32))
    mean = jnp.sum(x_BT) / jnp.maximum(count, 1.0)
    centred_BT = jnp.where(real_BT, x_BT - mean, 0.0)
    divisor = jnp.maximum(count if variance == "biased" else count - 1.0, 1.0)
    white_BT = centred_BT * jax.lax.rsqrt(jnp.sum(jnp.square(centred_BT)) / divisor + VARIANCE_FLOOR)
    return white_BT if shift_mean else jnp.where(real_BT, white_BT + mean, 0.0)


def group_relative(
    scores_PG: jax.Array, std: Literal["unbiased", "biased", "none"] = "unbiased", eps: float = 1e-4
) -> jax.Array:
    """Advantage of each response over the others of its prompt (GRPO, arXiv 2402.03300, section 4.1.2); float32 [P, G].

    (r - mean) / (std + eps) in each group of G. The deviation divides by G - 1 ("unbiased": TRL, verl), by G
    ("biased"), or is left out, eps too ("none": Dr. GRPO, arXiv 2503.20783). A group whose scores are all equal has
    advantages of exactly 0. TRL has eps = 1e-4, verl 1e-6. No gradient flows into the scores.
    """
    scores_PG = jax.lax.stop_gradient(jnp.asarray(scores_PG).astype(jnp.float32))
    size = scores_PG.shape[-1]
    equal_P1 = jnp.max(scores_PG, axis=-1, keepdims=True) == jnp.min(scores_PG, axis=-1, keepdims=True)
    centred_PG = jnp.where(equal_P1, 0.0, scores_PG - jnp.mean(scores_PG, axis=-1, keepdims=True))
    match std:
        case "unbiased":
            divisor = max(size - 1, 1)
        case "biased":
            divisor = size
        case "none":
            return centred_PG
        case _:
            raise ValueError(f"group_relative: std is {std!r}; it must be 'unbiased', 'biased' or 'none'")
    std_P1 = jnp.sqrt(jnp.sum(jnp.square(centred_PG), axis=-1, keepdims=True) / divisor)
    return centred_PG / jnp.where(equal_P1, 1.0, std_P1 + eps)


def leave_one_out(scores_PG: jax.Array) -> jax.Array:
    """Each score less the mean of the others of its prompt (RLOO, arXiv 2402.14740, eq. 8); float32 [P, G].

    They sum to 0 in each group, and are exactly 0 where all scores are equal. RLOO takes the KL into the score first.
    No gradient flows into the scores. Raises ValueError where G is 1.
    """
    scores_PG = jax.lax.stop_gradient(jnp.asarray(scores_PG).astype(jnp.float32))
    size = scores_PG.shape[-1]
    if size < 2:
        raise ValueError("leave_one_out: a prompt has 1 response; it needs at least 2")
    return group_relative(scores_PG, std="none") * (size / (size - 1))
