"""Distance from the reference: estimates per token, sums per episode, and the coefficient that follows them."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

KlKind = Literal["k1", "k2", "k3"]
"""The estimators of J. Schulman's "Approximating KL divergence"."""


def unmasked(x_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The numbers where the mask is not 0 and 0 elsewhere, float32; a masked NaN reaches neither value nor gradient."""
    return jnp.where(jnp.asarray(mask_BT).astype(bool), jnp.asarray(x_BT).astype(jnp.float32), 0.0)


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: KlKind = "k1") -> jax.Array:
    """Estimate KL(policy || reference) from tokens drawn from the policy: nats, float32, the inputs' shape.

    With log r = ref_logp - logp: k1 = -log r and k3 = r - 1 - log r are unbiased, k2 = (log r)^2 / 2 is not; k2 and k3
    are never negative (J. Schulman, "Approximating KL divergence"). Differentiable; callers stop gradients.
    """
    change = jnp.asarray(logp).astype(jnp.float32) - jnp.asarray(ref_logp).astype(jnp.float32)
    match kind:
        case "k1":
            return change
        case "k2":
            return 0.5 * jnp.square(change)
        case "k3":
            return jnp.expm1(-change) + change
    raise ValueError(f"kl_estimate: kind is {kind!r}; it must be 'k1', 'k2' or 'k3'")


def episode_kl(
    logp_BT: jax.Array,
    ref_logp_BT: jax.Array,
    mask_BT: jax.Array,
    kind: KlKind = "k1",
    how: Literal["sum", "token-mean"] = "sum",
) -> jax.Array:
    """Estimated KL of each episode: nats, float32 [B]; the mean over B is objective/kl, input of `adaptive_kl`.

    "sum" adds the estimates of an episode's tokens (lm-human-preferences). "token-mean" divides that by their number
    (verl): a target for the one means something else for the other. An episode without a token has 0. No gradient
    flows into any input.
    """
    kl_BT = kl_estimate(unmasked(logp_BT, mask_BT), unmasked(ref_logp_BT, mask_BT), kind)
    total_B = jax.lax.stop_gradient(jnp.sum(kl_BT, axis=-1))
    match how:
        case "sum":
            return total_B
        case "token-mean":
            return total_B / jnp.maximum(jnp.sum(jnp.asarray(mask_BT).astype(bool).astype(jnp.float32), axis=-1), 1.0)
    raise ValueError(f"episode_kl: how is {how!r}; it must be 'sum' or 'token-mean'")


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
        kl: nats, the mean of `episode_kl` over the rollout's episodes.
        target: the wanted `kl`, nats.
        horizon: episodes.
        episodes: episodes of this rollout; call once per rollout, not per minibatch.
    """
    coef, kl, episodes = (jnp.asarray(x).astype(jnp.float32) for x in (coef, kl, episodes))
    error = jnp.clip(kl / target - 1.0, -0.2, 0.2)
    return jax.lax.stop_gradient(coef * (1.0 + error * episodes / horizon))
