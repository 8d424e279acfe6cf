"""Losses as pure functions of arrays; every mean is kept as a sum and its weight.

Dimension key: B batch, T time, V vocabulary, K responses of one prompt (twice for pairs: winner, loser). Everything is
float32 inside. Position t of a token array stands for one predicted token: its log-probability, advantage and mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Ratio:
    """A mean kept as (sum, weight), so that means over parts of a batch add up exactly to the mean of the whole."""

    total: jax.Array
    """Weighted sum, float32 []."""
    weight: jax.Array
    """Sum of the weights, float32 []."""

    @classmethod
    def of(cls, x: jax.Array, weight: jax.Array) -> Ratio:
        """The mean of `x` under `weight`, arrays of one shape; where the weight is 0, `x` may even be NaN."""
        if jnp.shape(x) != jnp.shape(weight):
            raise ValueError(f"Ratio.of: x is {jnp.shape(x)} and weight is {jnp.shape(weight)}; they must be equal")
        weight = jnp.asarray(weight).astype(jnp.float32)
        x = jnp.where(weight != 0.0, jnp.asarray(x).astype(jnp.float32), 0.0)
        return cls(jnp.sum(x * weight), jnp.sum(weight))

    def __add__(self, other: Ratio) -> Ratio:
        return Ratio(self.total + other.total, self.weight + other.weight)

    def scaled(self, factor: float | jax.Array) -> Ratio:
        """The mean times `factor`: the sum is scaled, the weight is not."""
        return Ratio(self.total * factor, self.weight)

    @property
    def mean(self) -> jax.Array:
        """total / weight, and 0 where the weight is 0."""
        return self.total / jnp.where(self.weight == 0.0, 1.0, self.weight)

    reported = mean
    """The figure that is logged."""


@struct.dataclass
class Largest:
    """The largest of values that are not negative, over any number of parts of a batch."""

    value: jax.Array
    """float32 []."""

    @classmethod
    def of(cls, x: jax.Array, mask: jax.Array) -> Largest:
        """The largest of `x` where the mask is not 0; 0 where there is none."""
        return cls(jax.lax.stop_gradient(jnp.max(jnp.where(mask.astype(bool), x.astype(jnp.float32), 0.0))))

    def __add__(self, other: Largest) -> Largest:
        return Largest(jnp.maximum(self.value, other.value))

    @property
    def reported(self) -> jax.Array:
        """The figure that is logged."""
        return self.value


Metrics = dict[str, Ratio | Largest]


def _centred(logits_BTV: jax.Array, temperature: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits / temperature less their maximum, float32, and logsumexp of that: small numbers keep their digits."""
    logits_BTV = logits_BTV.astype(jnp.float32) / temperature
    logits_BTV = logits_BTV - jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
    return logits_BTV, jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))


def token_logp(logits_BTV: jax.Array, tokens_BT: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """log softmax(logits / temperature) at the given tokens: nats, float32 [B, T].

    `logits_BTV[:, t]` must predict `tokens_BT[:, t]`: shifting is the caller's. The vocabulary may be sharded, since
    the gather is a comparison and a sum. A token outside it gives a finite number that means nothing: mask it.
    """
    logits_BTV, norm_BT = _centred(logits_BTV, temperature)
    vocabulary_V = jnp.arange(logits_BTV.shape[-1], dtype=tokens_BT.dtype)
    chosen_BTV = tokens_BT[..., None] == vocabulary_V
    return jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0.0), axis=-1) - norm_BT


def token_entropy(logits_BTV: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Entropy of softmax(logits / temperature): nats, float32 [B, T]; logits of -inf are allowed and add nothing."""
    logits_BTV, norm_BT = _centred(logits_BTV, temperature)
    finite_BTV = jnp.where(jnp.isfinite(logits_BTV), logits_BTV, 0.0)
    return norm_BT - jnp.sum(jnp.exp(logits_BTV - norm_BT[..., None]) * finite_BTV, axis=-1)


def next_token(logp_BT: jax.Array, mask_BT: jax.Array) -> tuple[Ratio, Metrics]:
    """Negative log-likelihood, nats per unmasked token of the global batch (pretraining and supervised fine-tuning)."""
    nll = Ratio.of(-logp_BT, mask_BT)
    return nll, {"nll": nll}


def ranking(scores_BK: jax.Array, ranks_BK: jax.Array, valid_BK: jax.Array) -> tuple[Ratio, Metrics]:
    """Bradley-Terry over all pairs of each ranking (InstructGPT, arXiv 2203.02155, eq. 1).

    Args:
        scores_BK: reward of each response.
        ranks_BK: integers, smaller is better; equal ranks are ties and make no pair.
        valid_BK: bool or 0/1; false where a prompt has fewer than K responses.

    Returns:
        The mean over prompts of each prompt's mean of -log sigmoid(winner - loser), nats. A prompt without a pair
        weighs 0, every other weighs 1 however many pairs it has. Metrics: "loss"; "accuracy", the share of all pairs
        in the right order, equal scores counting half; "margin", the mean of winner - loser over all pairs.
    """
    valid_BK = valid_BK.astype(bool)
    scores_BK = jnp.where(valid_BK, scores_BK.astype(jnp.float32), 0.0)
    better_BKK = ranks_BK[:, :, None] < ranks_BK[:, None, :]
    pair_BKK = (better_BKK & valid_BK[:, :, None] & valid_BK[:, None, :]).astype(jnp.float32)
    margin_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
    pairs_B = jnp.sum(pair_BKK, axis=(1, 2))
    sum_B = jnp.sum(-jax.nn.log_sigmoid(margin_BKK) * pair_BKK, axis=(1, 2))
    loss = Ratio.of(sum_B / jnp.maximum(pairs_B, 1.0), (pairs_B > 0.0).astype(jnp.float32))
    right_BKK = 0.5 * (1.0 + jnp.sign(margin_BKK))
    return loss, {"loss": loss, "accuracy": Ratio.of(right_BKK, pair_BKK), "margin": Ratio.of(margin_BKK, pair_BKK)}


def ppo_policy(
    logp_BT: jax.Array, old_logp_BT: jax.Array, advantages_BT: jax.Array, mask_BT: jax.Array, clip: float
) -> tuple[Ratio, Metrics]:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), to be minimised: token-mean over the global batch.

    max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = exp(logp - old_logp), both at the sampling temperature.
    No gradient flows into `old_logp_BT` and `advantages_BT`; masked positions may hold anything.

    Metrics: "loss/policy"; "policy/clipfrac", the share of tokens whose clipped term is the larger one (as
    lm-human-preferences counts); "policy/approxkl", k2 = (logp - old_logp)^2 / 2, nats; "policy/ratio", mean rho.
    """
    real_BT = mask_BT.astype(bool)
    old_logp_BT = jnp.where(real_BT, jax.lax.stop_gradient(old_logp_BT).astype(jnp.float32), 0.0)
    advantages_BT = jnp.where(real_BT, jax.lax.stop_gradient(advantages_BT).astype(jnp.float32), 0.0)
    change_BT = jnp.where(real_BT, logp_BT.astype(jnp.float32), 0.0) - old_logp_BT
    ratio_BT = jnp.exp(change_BT)
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * jnp.clip(ratio_BT, 1.0 - clip, 1.0 + clip)
    loss = Ratio.of(jnp.maximum(plain_BT, clipped_BT), mask_BT)
    return loss, {
        "loss/policy": loss,
        "policy/clipfrac": Ratio.of((clipped_BT > plain_BT).astype(jnp.float32), mask_BT),
        "policy/approxkl": Ratio.of(0.5 * jnp.square(change_BT), mask_BT),
        "policy/ratio": Ratio.of(ratio_BT, mask_BT),
    }


def ppo_value(
    values_BT: jax.Array, old_values_BT: jax.Array, returns_BT: jax.Array, mask_BT: jax.Array, clip: float
) -> tuple[Ratio, Metrics]:
    """Clipped value loss (lm-human-preferences), token-mean: max((V - G)^2, (clip(V, V_old +- clip) - G)^2) / 2.

    `values_BT[:, t]` is V before token t (read at the position of token t - 1). No gradient flows into
    `old_values_BT` and `returns_BT`; masked positions may hold anything.

    Metrics: "loss/value"; "value/clipfrac", the share of tokens whose clipped term is the larger one.
    """
    real_BT = mask_BT.astype(bool)
    old_values_BT = jnp.where(real_BT, jax.lax.stop_gradient(old_values_BT).astype(jnp.float32), 0.0)
    returns_BT = jnp.where(real_BT, jax.lax.stop_gradient(returns_BT).astype(jnp.float32), 0.0)
    values_BT = jnp.where(real_BT, values_BT.astype(jnp.float32), 0.0)
    near_BT = jnp.clip(values_BT, old_values_BT - clip, old_values_BT + clip)
    plain_BT, clipped_BT = jnp.square(values_BT - returns_BT), jnp.square(near_BT - returns_BT)
    loss = Ratio.of(0.5 * jnp.maximum(plain_BT, clipped_BT), mask_BT)
    return loss, {
        "loss/value": loss,
        "value/clipfrac": Ratio.of((clipped_BT > plain_BT).astype(jnp.float32), mask_BT),
    }
