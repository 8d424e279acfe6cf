"""A mean kept as a sum and its weight, and the ways to take a mean over tokens."""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp
from flax import struct

from jaxgpt.config.schema import Aggregation


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


def aggregate(x_BT: jax.Array, mask_BT: jax.Array, how: Aggregation = "token-mean", norm: float | None = None) -> Ratio:
    """The mean of a loss of each token, as (sum, weight), so that parts of a batch add up to the whole.

    "token-mean": over all tokens of the global batch, long responses weigh more (PPO; DAPO, arXiv 2503.14476).
    "seq-mean-token-sum": the sum over each response's tokens, mean over responses.
    "seq-mean-token-mean": the mean over each response's tokens, mean over responses (GRPO, arXiv 2402.03300).
    "fixed-norm": the sum over all tokens, over `norm` and over the number of responses; `norm` is the same for every
    batch, the longest response in tokens (Dr. GRPO, arXiv 2503.20783).

    A row without a token weighs 0 in all of them (TRL counts it as a response with a loss of 0). Masked positions may
    hold anything. `norm` is for "fixed-norm" alone. Raises ValueError where it is missing there.
    """
    if how == "token-mean":
        return Ratio.of(x_BT, mask_BT)
    mask_BT = jnp.asarray(mask_BT).astype(jnp.float32)
    x_BT = jnp.where(mask_BT != 0.0, jnp.asarray(x_BT).astype(jnp.float32), 0.0)
    sum_B, tokens_B = jnp.sum(x_BT * mask_BT, axis=-1), jnp.sum(mask_BT, axis=-1)
    some_B = (tokens_B > 0.0).astype(jnp.float32)
    match how:
        case "seq-mean-token-sum":
            return Ratio.of(sum_B, some_B)
        case "seq-mean-token-mean":
            return Ratio.of(sum_B / jnp.where(tokens_B > 0.0, tokens_B, 1.0), some_B)
        case "fixed-norm":
            if norm is None:
                raise ValueError("aggregate: 'fixed-norm' needs norm, the longest response in tokens")
            return Ratio.of(sum_B / norm, some_B)
    raise ValueError(f"aggregate: how is {how!r}; it must be one of {', '.join(map(repr, get_args(Aggregation)))}")
