"""Log-probabilities of tokens, the same for every stage, and the loss of a language model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgpt.advantages.kl import unmasked
from jaxgpt.losses.ratio import Metrics, Ratio


def _centred(logits_BTV: jax.Array, temperature: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    """logits / temperature less their maximum, float32, and logsumexp of that: small numbers keep their digits."""
    logits_BTV = jnp.asarray(logits_BTV).astype(jnp.float32) / temperature
    logits_BTV = logits_BTV - jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1, keepdims=True))
    return logits_BTV, jnp.log(jnp.sum(jnp.exp(logits_BTV), axis=-1))


def token_logp(logits_BTV: jax.Array, tokens_BT: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """log softmax(logits / temperature) at the given tokens: nats, float32 [B, T].

    `logits_BTV[:, t]` must predict `tokens_BT[:, t]`: shifting is the caller's. The vocabulary may be sharded, since
    the gather is a comparison and a sum. A token outside it gives a finite number that means nothing: mask it.
    """
    (logits_BTV, norm_BT), tokens_BT = _centred(logits_BTV, temperature), jnp.asarray(tokens_BT)
    vocabulary_V = jnp.arange(logits_BTV.shape[-1], dtype=tokens_BT.dtype)
    chosen_BTV = tokens_BT[..., None] == vocabulary_V
    return jnp.sum(jnp.where(chosen_BTV, logits_BTV, 0.0), axis=-1) - norm_BT


def token_entropy(logits_BTV: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Entropy of softmax(logits / temperature): nats, float32 [B, T]; logits of -inf are allowed and add nothing."""
    logits_BTV, norm_BT = _centred(logits_BTV, temperature)
    finite_BTV = jnp.where(jnp.isfinite(logits_BTV), logits_BTV, 0.0)
    return norm_BT - jnp.sum(jnp.exp(logits_BTV - norm_BT[..., None]) * finite_BTV, axis=-1)


def sequence_logp(logp_BT: jax.Array, mask_BT: jax.Array, mean: bool = False) -> jax.Array:
    """Log-probability of each row's unmasked tokens: their sum, nats, or with `mean` the mean of a token; float32 [B].

    0 for a row without a token.
    """
    sum_B = jnp.sum(unmasked(logp_BT, mask_BT), axis=-1)
    if not mean:
        return sum_B
    return sum_B / jnp.maximum(jnp.sum(jnp.asarray(mask_BT).astype(bool).astype(jnp.float32), axis=-1), 1.0)


def next_token(logp_BT: jax.Array, mask_BT: jax.Array) -> tuple[Ratio, Metrics]:
    """Negative log-likelihood, nats per unmasked token of the global batch (pretraining and supervised fine-tuning).

    `logp_BT` is `token_logp` of the targets. Returns the loss and {"nll": the loss}.
    """
    nll = Ratio.of(-logp_BT, mask_BT)
    return nll, {"nll": nll}
