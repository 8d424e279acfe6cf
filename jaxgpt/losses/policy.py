"""Losses of a policy and its critic on sampled tokens: PPO's and those of its neighbours."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgpt.advantages.kl import KlKind, kl_estimate, unmasked
from jaxgpt.losses.ratio import Aggregation, Metrics, Ratio, aggregate


def ppo_policy(
    logp_BT: jax.Array,
    old_logp_BT: jax.Array,
    advantages_BT: jax.Array,
    mask_BT: jax.Array,
    clip: float,
    *,
    clip_high: float | None = None,
    aggregation: Aggregation = "token-mean",
    norm: float | None = None,
) -> tuple[Ratio, Metrics]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised; GRPO's too, whose advantages differ.

    max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high)) with rho = exp(logp - old_logp), both log-probabilities at the
    sampling temperature. No gradient flows into `old_logp_BT` and `advantages_BT`; masked positions may hold anything.

    Args:
        logp_BT: of the policy, nats.
        old_logp_BT: of the policy that sampled the tokens, nats.
        advantages_BT: of each token; GRPO's of a response are repeated over its tokens.
        mask_BT: 1 on the tokens that count.
        clip: range of the ratio below 1, and above it where `clip_high` is unset.
        clip_high: range above 1 (DAPO's clip-higher, arXiv 2503.14476, eq. 10).
        aggregation: how the tokens' losses become one; see `aggregate`.
        norm: of aggregation "fixed-norm", tokens.

    Returns:
        The loss, and metrics with TRL's names. All but the loss are means over the unmasked tokens, whatever the
        aggregation: "loss/policy_avg"; "policy/clipfrac_avg", the share of tokens whose clipped term is the larger one
        (as lm-human-preferences counts); "policy/approxkl_avg", k2 = (logp - old_logp)^2 / 2, nats; "val/ratio", rho.
    """
    advantages_BT = unmasked(jax.lax.stop_gradient(advantages_BT), mask_BT)
    change_BT = unmasked(logp_BT, mask_BT) - unmasked(jax.lax.stop_gradient(old_logp_BT), mask_BT)
    ratio_BT = jnp.exp(change_BT)
    plain_BT = -advantages_BT * ratio_BT
    high = clip if clip_high is None else clip_high
    clipped_BT = -advantages_BT * jnp.clip(ratio_BT, 1.0 - clip, 1.0 + high)
    loss = aggregate(jnp.maximum(plain_BT, clipped_BT), mask_BT, aggregation, norm)
    return loss, {
        "loss/policy_avg": loss,
        "policy/clipfrac_avg": Ratio.of((clipped_BT > plain_BT).astype(jnp.float32), mask_BT),
        "policy/approxkl_avg": Ratio.of(0.5 * jnp.square(change_BT), mask_BT),
        "val/ratio": Ratio.of(ratio_BT, mask_BT),
    }


def ratio_gap(logp_BT: jax.Array, old_logp_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """The largest |rho - 1| of any unmasked token, rho = exp(logp - old_logp); float32 [], 0 without a token.

    In the first minibatch after a rollout it says how far sampling and training disagree: below 1e-5 in float32.
    """
    change_BT = unmasked(logp_BT, mask_BT) - unmasked(old_logp_BT, mask_BT)
    return jax.lax.stop_gradient(jnp.max(jnp.abs(jnp.expm1(change_BT))))


def ppo_value(
    values_BT: jax.Array,
    old_values_BT: jax.Array,
    returns_BT: jax.Array,
    mask_BT: jax.Array,
    clip: float | None,
    *,
    aggregation: Aggregation = "token-mean",
    norm: float | None = None,
) -> tuple[Ratio, Metrics]:
    """Clipped value loss (lm-human-preferences): max((V - G)^2, (clip(V, V_old +- clip) - G)^2) / 2.

    No gradient flows into `old_values_BT` and `returns_BT`; masked positions may hold anything.

    Args:
        values_BT: V before each token (read at the position of the token before it).
        old_values_BT: the same from the critic that the rollout had.
        returns_BT: G, the second of what `gae` gives.
        mask_BT: 1 on the tokens that count.
        clip: how far V may go from the old value; None leaves (V - G)^2 / 2.
        aggregation: how the tokens' losses become one; see `aggregate`.
        norm: of aggregation "fixed-norm", tokens.

    Returns:
        The loss, the half in it and no coefficient; metrics with TRL's names: "loss/value_avg"; "val/clipfrac_avg", the
        share of tokens whose clipped term is the larger one.
    """
    values_BT = unmasked(values_BT, mask_BT)
    old_values_BT = unmasked(jax.lax.stop_gradient(old_values_BT), mask_BT)
    returns_BT = unmasked(jax.lax.stop_gradient(returns_BT), mask_BT)
    plain_BT = clipped_BT = jnp.square(values_BT - returns_BT)
    if clip is not None:
        near_BT = jnp.clip(values_BT, old_values_BT - clip, old_values_BT + clip)
        clipped_BT = jnp.square(near_BT - returns_BT)
    loss = aggregate(0.5 * jnp.maximum(plain_BT, clipped_BT), mask_BT, aggregation, norm)
    return loss, {
        "loss/value_avg": loss,
        "val/clipfrac_avg": Ratio.of((clipped_BT > plain_BT).astype(jnp.float32), mask_BT),
    }


def kl_penalty(
    logp_BT: jax.Array,
    ref_logp_BT: jax.Array,
    mask_BT: jax.Array,
    kind: KlKind = "k3",
    aggregation: Aggregation = "token-mean",
    norm: float | None = None,
) -> Ratio:
    """KL from the reference as a term of the loss: nats per token under "token-mean" (GRPO, arXiv 2402.03300, eq. 4).

    To be scaled by its coefficient. Only `logp_BT` is differentiated, at the sampled tokens alone: on-policy the
    expected gradient is that of KL(policy || reference) for k2, of KL(reference || policy) for k3, and 0 for k1.
    """
    ref_logp_BT = unmasked(jax.lax.stop_gradient(ref_logp_BT), mask_BT)
    return aggregate(kl_estimate(unmasked(logp_BT, mask_BT), ref_logp_BT, kind), mask_BT, aggregation, norm)
