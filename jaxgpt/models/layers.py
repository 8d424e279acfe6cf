"""The small parts of a block: initial weights, adapters, norms, feed-forward, dropout.

Letters: B batch, T time, D model width, F feed-forward width; of any matrix I inputs and O outputs, each of one
dimension or two, and L the rank of its adapter.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import P

from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.mesh import BATCH, LAYOUT, Axes, spec_axes
from jaxgpt.models.kernels import contract, once_computed, project

Names = tuple[str | None, ...]
"""The names of a weight's dimensions, None for one that is never split."""


def _axes(names: Names) -> tuple[Axes | None, ...]:
    return tuple(None if name is None else LAYOUT[name] for name in names)


@dataclasses.dataclass(frozen=True)
class Draw:
    """Makes initial weights; the names of their dimensions say how they are sharded (`jaxgpt.mesh.LAYOUT`)."""

    rngs: nnx.Rngs
    c: ModelConfig
    lora: LoraConfig | None = None

    def normal(self, shape: tuple[int, ...], names: Names, *, residual: bool = False) -> nnx.Param:
        """A Gaussian matrix: its first dimension is contracted, or all but the last where it is `residual`, which says
        that it writes to the residual stream."""
        std = self.c.init_std
        if std == "fan_in":
            std = math.prod(shape[:-1] if residual else shape[:1]) ** -0.5
        elif residual:
            std = std * (2 * self.c.layers) ** -0.5
        return self._gaussian(shape, names, std)

    def embedding(self, shape: tuple[int, ...], names: Names) -> nnx.Param:
        """Gaussian rows that are looked up."""
        plain = 1.0 if self.c.init_std == "fan_in" else self.c.init_std
        return self._gaussian(shape, names, self.c.embedding_std or plain)

    def _gaussian(self, shape: tuple[int, ...], names: Names, std: float) -> nnx.Param:
        return nnx.Param(jax.random.normal(self.rngs.params(), shape) * std, out_sharding=_axes(names))

    def zeros(self, shape: tuple[int, ...], names: Names) -> nnx.Param:
        """A bias."""
        return nnx.Param(jnp.zeros(shape), out_sharding=_axes(names))

    def ones(self, shape: tuple[int, ...], names: Names) -> nnx.Param:
        """A scale."""
        return nnx.Param(jnp.ones(shape), out_sharding=_axes(names))

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
            residual,
        )


class Adapter(nnx.Module):
    """What low-rank adaptation adds to x W: (x A) B alpha / rank (arXiv 2106.09685, section 4.1)."""

    def __init__(self, a_IL: nnx.Param, b_LO: nnx.Param, scale: float, residual: bool):
        self.a_IL, self.b_LO = a_IL, b_LO
        self.scale, self.residual = scale, residual

    def __call__(self, x_BTI: jax.Array) -> jax.Array:
        """[B, T, I] to [B, T, O]."""
        a_IL = self.a_IL[...]
        x_BTL = contract(x_BTI, a_IL) if self.residual else project(x_BTI, a_IL)[0]
        return project(x_BTL, self.b_LO[...], kept=False)[0] * self.scale


Affine = tuple[nnx.Param, nnx.Param | None, Adapter | None]
"""A matrix, and what stands beside it: its bias and its adapter."""


def affine(x_BTI: jax.Array, *matrices: Affine) -> list[jax.Array]:
    """x W with what stands beside W, of several matrices whose first dimension is contracted: [B, T, O] each."""
    products = project(x_BTI, *(weight[...] for weight, _, _ in matrices))
    return [_beside(y, x_BTI, bias, adapter) for y, (_, bias, adapter) in zip(products, matrices, strict=True)]


def affine_out(x_BTI: jax.Array, matrix: Affine) -> jax.Array:
    """The same of one matrix that writes to the residual stream: all its dimensions but the last are contracted."""
    weight, bias, adapter = matrix
    return _beside(contract(x_BTI, weight[...]), x_BTI, bias, adapter)


def _beside(y_BTO: jax.Array, x_BTI: jax.Array, bias_O: nnx.Param | None, adapter: Adapter | None) -> jax.Array:
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
        self.up_DF = draw.normal((D, F), ("width", "hidden"))
        self.gate_DF = draw.normal((D, F), ("width", "hidden")) if c.gated else None
        self.down_FD = draw.normal((F, D), ("hidden", "width"), residual=True)
        self.up_bias_F = draw.zeros((F,), ("hidden",)) if c.mlp.bias else None
        self.gate_bias_F = draw.zeros((F,), ("hidden",)) if c.mlp.bias and c.gated else None
        self.down_bias_D = draw.zeros((D,), (None,)) if c.mlp.bias else None
        self.lora_up = draw.adapter("up", self.up_DF)
        self.lora_gate = draw.adapter("gate", self.gate_DF)
        self.lora_down = draw.adapter("down", self.down_FD, residual=True)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] to the same shape."""
        act = ACTIVATIONS[self.activation]
        up = self.up_DF, self.up_bias_F, self.lora_up
        if self.gate_DF is None:
            h_BTF = act(affine(x_BTD, up)[0])
        else:
            up_BTF, gate_BTF = affine(x_BTD, up, (self.gate_DF, self.gate_bias_F, self.lora_gate))
            h_BTF = act(gate_BTF) * up_BTF
        return affine_out(h_BTF, (self.down_FD, self.down_bias_D, self.lora_down))


class Dropout(NamedTuple):
    """What a forward pass needs to drop activations."""

    rate: float
    seeds_B: jax.Array
    """uint32, one for each row."""
    slots_T: np.ndarray
    """Which token of its row each one is."""


def dropout(x_BTD: jax.Array, how: Dropout | None, site: jax.Array) -> jax.Array:
    """Inverted dropout whose mask depends on the row's own seed, the token's place and the site alone, not on how the
    batch or the sequence is cut.

    site: int32 that differs at every place of use.
    """
    if how is None or how.rate == 0.0:
        return x_BTD
    keep, time = 1.0 - how.rate, spec_axes(x_BTD, 1) or None

    def local(x_BTD: jax.Array, seeds_B: jax.Array, slots_T: jax.Array, site: jax.Array) -> jax.Array:
        def token(x_D: jax.Array, seed: jax.Array, slot: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), site), slot)
            return jnp.where(jax.random.bernoulli(key, keep, x_D.shape), x_D / keep, jnp.zeros_like(x_D))

        return jax.vmap(jax.vmap(token, in_axes=(0, None, 0)), in_axes=(0, 0, None))(x_BTD, seeds_B, slots_T)

    rows = P(BATCH, time, None)
    slots_T = jax.sharding.reshard(jnp.asarray(how.slots_T), P(time))
    given = rows, P(BATCH), P(time), P()
    return jax.shard_map(local, in_specs=given, out_specs=rows)(x_BTD, how.seeds_B, slots_T, site)
