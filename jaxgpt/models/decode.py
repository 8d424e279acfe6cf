"""A language model laid out for decoding: weights gathered and cast once, one block a layer, keys and values kept.

Letters: B batch, T new tokens, S cache slots, D model width, V vocabulary, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import P

from jaxgpt.mesh import BATCH, gather
from jaxgpt.models.heads import LanguageModel
from jaxgpt.models.transformer import Block, Place, Slots, compute_dtype, unstack

Cache = tuple[Slots, ...]
"""Keys and values of every layer."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The model's layers as a list; made inside a traced function by `decoder`."""

    lm: LanguageModel
    blocks: list[Block]

    def empty(self, rows: int, slots: int) -> Cache:
        """A cache for `rows` sequences of at most `slots` tokens."""
        c = self.lm.c
        groups = jax.typeof(self.blocks[0].attention.k_DGK[...]).sharding.spec[1]
        shape, spec = (rows, c.kv_heads, slots, c.head_dim), P(BATCH, groups, None, None)
        zeros = jnp.zeros(shape, compute_dtype(c), out_sharding=spec)
        return tuple(Slots(zeros, zeros) for _ in self.blocks)

    def extend(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Cache,
        segments_BS: jax.Array,
        first: jax.Array,
    ) -> tuple[jax.Array, Cache]:
        """Logits [B, V] behind the last of the new tokens, and the cache with them in slots `first`.. .

        segments_BS: 0 where a slot holds padding; slots not yet written are hidden by causality.
        """
        backbone = self.lm.backbone
        place = Place(segments_BT, backbone.tables(positions_BT))
        x_BTD = backbone.embed(tokens_BT, positions_BT)
        filled = []
        for i, (block, slots) in enumerate(zip(self.blocks, cache, strict=True)):
            x_BTD, slots = block.extend(x_BTD, place, slots, segments_BS, first, backbone.window(i))
            filled.append(slots)
        logits_B1V = self.lm.logits(backbone.norm(x_BTD[:, -1:]))
        return jax.sharding.reshard(logits_B1V[:, 0], P(BATCH, None)), tuple(filled)


def decoder(lm: LanguageModel) -> Decoder:
    """Gathers the weights over `fsdp` and casts matrices, once for all the tokens to come."""
    dtype = compute_dtype(lm.c)
    layers = unstack(lm.backbone.blocks, lm.c.layers)
    ready = jax.tree.map(lambda w: gather(w, dtype if w.ndim > 1 else None), (lm, layers))
    return Decoder(*ready)
