"""The small parts of a block: initial weights, adapters, norms, feed-forward, dropout.

Letters: B batch, T time, D model width, F feed-forward width; of any matrix I inputs and O outputs, each of one
dimension or two, and L the rank of its adapter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.mesh import BATCH, gather
from jaxgpt.models.kernels import contract, once_computed, project


@dataclasses.dataclass(frozen=True)
class Draw:
    """Makes named, sharded initial weights."""

    rngs: nnx.Rngs
    c: ModelConfig
    lora: LoraConfig | None = None

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

    def adapter(self, target: str, weight_IO: nnx.Param | None, *, residual: bool = False) -> Adapter | None:
        """The adapter of a matrix, where there is to be one: split over the mesh as the matrix is, its rank whole.

        (x A) B begins at 0: A is uniform within +-1 / sqrt(inputs), as in loralib and PEFT, and B is 0.
        """
        if self.lora is None or weight_IO is None or target not in self.lora.targets:
            return None
        cut = weight_IO.ndim - 1 if residual else 1
        axes, rank = jax.typeof(weight_IO[...]).sharding.spec, self.lora.rank
        inputs, outputs = weight_IO.shape[:cut], weight_IO.shape[cut:]
        bound = math.prod(inputs) ** -0.5
        a_IL = jax.random.uniform(self.rngs.params(), (*inputs, rank), minval=-bound, maxval=bound)
        return Adapter(
            nnx.Param(a_IL, out_sharding=(*axes[:cut], None)),
            nnx.Param(jnp.zeros((rank, *outputs)), out_sharding=(None, *axes[cut:])),
            self.lora.scale,
            contract if residual else project,
        )


Product = Callable[[jax.Array, jax.Array], jax.Array]
"""`project` or `contract`."""


class Adapter(nnx.Module):
    """What low-rank adaptation adds to x W: (x A) B alpha / rank (arXiv 2106.09685, section 4.1)."""

    def __init__(self, a_IL: nnx.Param, b_LO: nnx.Param, scale: float, product: Product):
        self.a_IL, self.b_LO = a_IL, b_LO
        self.scale, self.product = scale, product

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """[B, T, I] to [B, T, O]."""
        x_BTL = self.product(x_BTI, gather(self.a_IL[...], x_BTI.dtype))
        return project(x_BTL, gather(self.b_LO[...], x_BTI.dtype), kept=False) * self.scale


def affine(
    product: Product, x_BTI: jax.Array, weight_IO: nnx.Param, bias_O: nnx.Param | None, adapter: Adapter | None
) -> jax.Array:
    """x W with what stands beside W, [B, T, O]."""
    y_BTO = product(x_BTI, gather(weight_IO[...], x_BTI.dtype))
    if adapter is not None:
        y_BTO = y_BTO + adapter(x_BTI)
    return y_BTO if bias_O is None else y_BTO + bias_O[...].astype(x_BTI.dtype)


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
        self.lora_up = draw.adapter("up", self.up_DF)
        self.lora_gate = draw.adapter("gate", self.gate_DF)
        self.lora_down = draw.adapter("down", self.down_FD, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to the same shape."""
        act = ACTIVATIONS[self.activation]
        h_BTF = affine(project, x_BTD, self.up_DF, self.up_bias_F, self.lora_up)
        if self.gate_DF is None:
            h_BTF = act(h_BTF)
        else:
            h_BTF = act(affine(project, x_BTD, self.gate_DF, self.gate_bias_F, self.lora_gate)) * h_BTF
        return affine(contract, h_BTF, self.down_FD, self.down_bias_D, self.lora_down)


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
