"""Blocks and the backbone that language, reward and value models share.

Letters: B batch, T time, S cache slots, D model width, G key/value heads, K head width, V vocabulary, N layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxgpt.config.schema import LearnedPositions, LoraConfig, ModelConfig, RopePositions
from jaxgpt.mesh import platform
from jaxgpt.models.attention import Attention, attend, rope_tables
from jaxgpt.models.kernels import ATTENDED, PRODUCT, lookup
from jaxgpt.models.layers import Draw, Dropout, Mlp, Norm, dropout
from jaxgpt.models.sequence import cut


class Place(NamedTuple):
    """Where the tokens of one forward pass stand: what every layer needs beside the activations."""

    segments_BT: jax.Array
    tables: tuple[jax.Array, jax.Array] | None
    """Rotations, where positions are rotary."""
    dropout: Dropout | None = None


class Slots(NamedTuple):
    """Keys and values of one layer, [B, G, S, K]."""

    k_BGSK: jax.Array
    v_BGSK: jax.Array


class Block(nnx.Module):
    """Attention and feed-forward, one after the other or side by side."""

    def __init__(self, c: ModelConfig, draw: Draw):
        self.c = c
        self.attention_norm = Norm(c, draw)
        self.attention = Attention(c, draw)
        shared = c.residual == "parallel" and c.shared_norm
        self.mlp_norm = None if shared else Norm(c, draw)
        self.mlp = Mlp(c, draw)

    def __call__(self, x_BTD: jax.Array, place: Place, layer: jax.Array, window: int | None) -> jax.Array:
        """The whole sequence at once."""
        h_BTD = self.attention_norm(x_BTD)
        q, k, v = self.attention.qkv(h_BTD, place.tables)
        segments = place.segments_BT
        c = self.c.attention
        out = attend(q, k, v, segments, segments, window=window, softcap=c.softcap, kernel=c.kernel)
        return self._residual(x_BTD, h_BTD, self.attention.output(out), place, layer)

    def extend(
        self, x_BTD: jax.Array, place: Place, slots: Slots, segments_BS: jax.Array, first: jax.Array, window: int | None
    ) -> tuple[jax.Array, Slots]:
        """New tokens behind those in the cache: they take the slots from `first` on."""
        h_BTD = self.attention_norm(x_BTD)
        q, k, v = self.attention.qkv(h_BTD, place.tables)
        at = (0, 0, first, 0)
        slots = Slots(*(jax.lax.dynamic_update_slice(old, new, at) for old, new in zip(slots, (k, v), strict=True)))
        cap = self.c.attention.softcap
        out = attend(q, *slots, place.segments_BT, segments_BS, first=first, window=window, softcap=cap)
        return self._residual(x_BTD, h_BTD, self.attention.output(out), place, jnp.int32(0)), slots

    def _residual(
        self, x_BTD: jax.Array, h_BTD: jax.Array, attended_BTD: jax.Array, place: Place, layer: jax.Array
    ) -> jax.Array:
        def drop(y_BTD: jax.Array, site: int) -> jax.Array:
            return dropout(y_BTD, place.dropout, 2 * layer + site)

        if self.c.residual == "parallel":
            inner_BTD = h_BTD if self.mlp_norm is None else self.mlp_norm(x_BTD)
            return x_BTD + drop(attended_BTD, 0) + drop(self.mlp(inner_BTD), 1)
        x_BTD = x_BTD + drop(attended_BTD, 0)
        return x_BTD + drop(self.mlp(self.mlp_norm(x_BTD)), 1)


def unstack(blocks: Block, count: int) -> list[Block]:
    """Stacked layers as a list; the gradient of a split is one concatenation."""
    leaves, treedef = jax.tree.flatten(blocks)
    parts = [[jnp.squeeze(part, 0) for part in jnp.split(leaf, count)] for leaf in leaves]
    return [treedef.unflatten(layer) for layer in zip(*parts, strict=True)]


def compute_dtype(c: ModelConfig) -> jnp.dtype:
    """Arithmetic of the blocks on this machine."""
    name = c.dtype if c.dtype != "auto" else ("float32" if platform() == "cpu" else "bfloat16")
    return jnp.dtype(name)


class Backbone(nnx.Module):
    """Token and position embeddings, blocks, output norm."""

    def __init__(
        self, c: ModelConfig, vocab: int, rngs: nnx.Rngs, dropout: float = 0.0, lora: LoraConfig | None = None
    ):
        self.c, self.dropout = c, dropout
        draw = Draw(rngs, c)
        self.embed_VD = draw.embedding((vocab, c.width), ("vocab", "width"))
        learned = isinstance(c.positions, LearnedPositions)
        self.positions_TD = draw.embedding((c.context, c.width), (None, "width")) if learned else None
        keys_N = jax.random.split(rngs.params(), c.layers)
        self.blocks = jax.vmap(lambda key: Block(c, Draw(nnx.Rngs(params=key), c, lora)))(keys_N)
        self.norm = Norm(c, draw)

    def embed(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Embeddings in the blocks' dtype, [B, T, D], as the residual stream lies."""
        dtype = compute_dtype(self.c)
        x_BTD = lookup(self.embed_VD[...], tokens_BT, dtype) * self.c.embedding_scale
        if self.positions_TD is not None:
            places_BTD = lookup(self.positions_TD[...], positions_BT, dtype)
            x_BTD = x_BTD + jax.sharding.reshard(places_BTD, jax.typeof(x_BTD).sharding.spec)
        return x_BTD

    def tables(self, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Rotations, where positions are rotary."""
        c = self.c
        return rope_tables(c.positions, c.head_dim, positions_BT) if isinstance(c.positions, RopePositions) else None

    def window(self, layer: int) -> int | None:
        """How far back a layer looks."""
        return self.c.attention.windows[layer % len(self.c.attention.windows)]

    def __call__(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        seeds_B: jax.Array | None = None,
    ) -> jax.Array:
        """Normalised hidden states, [B, T, D], in the order of `sequence.cut` and as the residual stream lies."""
        order = cut(tokens_BT.shape[1])
        tokens_BT, segments_BT, positions_BT = (order.place(x) for x in (tokens_BT, segments_BT, positions_BT))
        how = None if seeds_B is None else Dropout(self.dropout, seeds_B, order.slots_T)
        place = Place(segments_BT, self.tables(positions_BT), how)
        x_BTD = dropout(self.embed(tokens_BT, positions_BT), how, jnp.int32(2 * self.c.layers))
        return self.run(x_BTD, place)

    def run(self, x_BTD: jax.Array, place: Place) -> jax.Array:
        """Normalised hidden states from embeddings."""
        return self.norm(self._blocks(x_BTD, place))

    def _blocks(self, x_BTD: jax.Array, place: Place) -> jax.Array:
        """All blocks. A scan goes over whole periods of windows; where those do not divide the depth it is unrolled."""
        c, period = self.c, len(self.c.attention.windows)

        def layer(x_BTD: jax.Array, block: Block, number: jax.Array, window: int | None) -> jax.Array:
            with jax.named_scope("block"):
                return _remat(lambda x, b, n: b(x, place, n, window), c.remat)(x_BTD, block, number)

        if not c.scan_layers or c.layers % period:
            for i, block in enumerate(unstack(self.blocks, c.layers)):
                x_BTD = layer(x_BTD, block, jnp.int32(i), self.window(i))
            return x_BTD
        groups = jax.tree.map(lambda w: w.reshape(c.layers // period, period, *w.shape[1:]), self.blocks)
        firsts = jnp.arange(0, c.layers, period, dtype=jnp.int32)

        def body(x_BTD: jax.Array, stacked: tuple[Block, jax.Array]) -> tuple[jax.Array, None]:
            for i, block in enumerate(unstack(stacked[0], period)):
                x_BTD = layer(x_BTD, block, stacked[1] + i, self.window(i))
            return x_BTD, None

        return jax.lax.scan(body, x_BTD, (groups, firsts))[0]


def _remat(function: Callable[..., jax.Array], policy: str) -> Callable[..., jax.Array]:
    if policy == "none":
        return function
    policies = jax.checkpoint_policies
    saved = {
        "dots": policies.save_only_these_names(PRODUCT, ATTENDED),
        "attention": policies.save_only_these_names(ATTENDED),
        "offload": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=[PRODUCT, ATTENDED],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "full": None,
    }
    return jax.checkpoint(function, policy=saved[policy])
