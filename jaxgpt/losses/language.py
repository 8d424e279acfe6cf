"""Log-probabilities of responses and the loss of a language model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxgpt.advantages.kl import unmasked
from jaxgpt.losses.ratio import Metrics, Ratio


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
