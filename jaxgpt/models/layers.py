"""The small parts of a block: initial weights, norms, feed-forward, dropout.

Letters: B batch, T time, D model width, F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from jaxgpt.config.schema import ModelConfig
from jaxgpt.mesh import BATCH, gather
from jaxgpt.models.kernels import contract, once_computed, project


@dataclasses.dataclass(frozen=True)
class Draw:
    """Makes named, sharded initial weights."""

    rngs: nnx.Rngs
    c: ModelConfig

    def normal(self, shape: tuple[int, ...], axes: tuple[str | None, ...], *, residual: bool = False) -> nnx.Param:
        """A Gaussian matrix: its first dimension is contracted, or all but the last where it is `residual`, which says
        that it writes to the residual stream."""
        std = self.c.init_std
        if std == "fan_in":
            std = math.prod(shape[:-1] if residual else shape[:1]) ** -0.5
        elif residual:
            std = std * (2 * self.c.layers) ** -0.5
        return self._gaussian(shape, axes, std)

    def embedding(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """Gaussian rows that are looked up."""
        plain = 1.0 if self.c.init_std == "fan_in" else self.c.init_std
        return self._gaussian(shape, axes, self.c.embedding_std or plain)

    def _gaussian(self, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float) -> nnx.Param:
        return nnx.Param(jax.random.normal(self.rngs.params(), shape) * std, out_sharding=axes)

    def zeros(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """A bias."""
        return nnx.Param(jnp.zeros(shape), out_sharding=axes)

    def ones(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """A scale."""
        return nnx.Param(jnp.ones(shape), out_sharding=axes)


def scales(x: jax.Array, scale: jax.Array | None, eps: float) -> jax.Array:
    """RMS norm over the last dimension in float32 (arXiv 1910.07467)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y if scale is None else y * scale).astype(x.dtype)


class Norm(nnx.Module):
    """rmsnorm or layernorm, with or without scale and bias; float32 inside."""

    def __init__(self, c: ModelConfig, draw: Draw):
        self.c = c.norm
        self.scale_D = draw.ones((c.width,), (None,)) if c.norm.scale else None
        self.bias_D = draw.zeros((c.width,), (None,)) if c.norm.bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to the same shape and dtype."""
        y_BTD = x_BTD.astype(jnp.float32)
        if self.c.type == "layernorm":
            y_BTD = y_BTD - jnp.mean(y_BTD, axis=-1, keepdims=True)
        y_BTD = scales(y_BTD, None if self.scale_D is None else self.scale_D[...], self.c.eps)
        return (y_BTD if self.bias_D is None else y_BTD + self.bias_D[...]).astype(x_BTD.dtype)


ACTIVATIONS = {
    "gelu": once_computed(lambda x: jax.nn.gelu(x, approximate=False)),
    "gelu_tanh": once_computed(lambda x: jax.nn.gelu(x, approximate=True)),
    "relu": jax.nn.relu,
    "swiglu": once_computed(jax.nn.silu),
    "geglu": once_computed(lambda x: jax.nn.gelu(x, approximate=True)),
}


class Mlp(nnx.Module):
    """Feed-forward layer, gated or not (arXiv 2002.05202)."""

    def __init__(self, c: ModelConfig, draw: Draw):
        D, F = c.width, c.hidden
        self.activation = c.mlp.type
        self.up_DF = draw.normal((D, F), ("fsdp", "tensor"))
        self.gate_DF = draw.normal((D, F), ("fsdp", "tensor")) if c.gated else None
        self.down_FD = draw.normal((F, D), ("tensor", "fsdp"), residual=True)
        self.up_bias_F = draw.zeros((F,), ("tensor",)) if c.mlp.bias else None
        self.gate_bias_F = draw.zeros((F,), ("tensor",)) if c.mlp.bias and c.gated else None
        self.down_bias_D = draw.zeros((D,), (None,)) if c.mlp.bias else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to the same shape."""
        act = ACTIVATIONS[self.activation]
        up_BTF = _expand(x_BTD, self.up_DF, self.up_bias_F)
        h_BTF = act(up_BTF) if self.gate_DF is None else act(_expand(x_BTD, self.gate_DF, self.gate_bias_F)) * up_BTF
        y_BTD = contract(h_BTF, gather(self.down_FD[...], x_BTD.dtype))
        return y_BTD if self.down_bias_D is None else y_BTD + self.down_bias_D[...].astype(x_BTD.dtype)


def _expand(x_BTD: jax.Array, weight_DF: nnx.Param, bias_F: nnx.Param | None) -> jax.Array:
    y_BTF = project(x_BTD, gather(weight_DF[...], x_BTD.dtype))
    return y_BTF if bias_F is None else y_BTF + bias_F[...].astype(x_BTD.dtype)


def dropout(x_BTD: jax.Array, seeds_B: jax.Array | None, site: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout whose mask depends on the row's own seed and the site alone, not on how the batch is cut.

    seeds_B: uint32 per row, None for none; site: int32 that differs at every place of use.
    """
    if seeds_B is None or rate == 0.0:
        return x_BTD

    def local(x_BTD: jax.Array, seeds_B: jax.Array, site: jax.Array) -> jax.Array:
        def row(x_TD: jax.Array, seed: jax.Array) -> jax.Array:
            kept = jax.random.bernoulli(jax.random.fold_in(jax.random.key(seed), site), 1.0 - rate, x_TD.shape)
            return jnp.where(kept, x_TD / (1.0 - rate), jnp.zeros_like(x_TD))

        return jax.vmap(row)(x_BTD, seeds_B)

    rows = P(BATCH, None, None)
    return jax.shard_map(local, in_specs=(rows, P(BATCH), P()), out_specs=rows)(x_BTD, seeds_B, site)
