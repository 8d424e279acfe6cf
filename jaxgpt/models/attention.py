"""Rotary positions, the attention function and the attention layer.

Letters: B batch, T queries, S keys, D model width, H query heads, G key/value heads, R query heads per key/value head,
K head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.config.schema import ModelConfig, RopePositions
from jaxgpt.mesh import BATCH, axis_size, spec_axes
from jaxgpt.models import attention_kernels
from jaxgpt.models.kernels import ATTENDED, attention, vary
from jaxgpt.models.layers import Draw, affine, affine_out, scales
from jaxgpt.models.sequence import local_slots, whole


def rope_frequencies(config: RopePositions, head_dim: int) -> jax.Array:
    """Angle per position of each rotated pair, [rotated / 2] float32 (RoFormer, arXiv 2104.09864, eq. 15)."""
    rotated = int(head_dim * config.fraction) // 2 * 2
    frequency = config.base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    scaling = config.scaling
    if scaling is None:
        return frequency
    if scaling.type == "linear":
        return frequency / scaling.factor
    turns = scaling.original_context * frequency / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return frequency * (keep + (1.0 - keep) / scaling.factor)


def rope_tables(config: RopePositions, head_dim: int, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of every rotation, [B, T, rotated / 2] float32."""
    angle = positions_BT[..., None].astype(jnp.float32) * rope_frequencies(config, head_dim)
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x_BTHK: jax.Array, tables: tuple[jax.Array, jax.Array], pairing: str) -> jax.Array:
    """Rotates the first dimensions of each head in float32; the others pass."""
    cos, sin = (table[:, :, None, :] for table in tables)
    rotated = 2 * cos.shape[-1]
    x, rest = x_BTHK[..., :rotated].astype(jnp.float32), x_BTHK[..., rotated:]
    if pairing == "half":
        a, b = x[..., : rotated // 2], x[..., rotated // 2 :]
        y = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    else:
        a, b = x[..., 0::2], x[..., 1::2]
        y = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return jnp.concatenate([y.astype(x_BTHK.dtype), rest], axis=-1)


def attend(
    q_BTHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    first: jax.Array | None = None,
    window: int | None = None,
    softcap: float | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Causal attention inside equal segments, [B, T, H, K]; queries come scaled. Scores and softmax are float32.

    A whole sequence attends to itself where `first` is unset; its tokens stand in the order of `sequence.cut` if
    the mesh splits their time, and keys and values are then gathered over it. Otherwise query t stands in slot
    `first` + t among the keys' slots. A query sees slots up to its own, at most `window` of them.
    Runs on each device's own rows, heads and queries.
    """
    time, heads = spec_axes(q_BTHK, 1), spec_axes(q_BTHK, 2)
    groups, ways, tokens = spec_axes(k_BGSK, 1), axis_size(*time), q_BTHK.shape[1]
    shape = attention_kernels.Shape(tokens, q_BTHK.shape[2], k_BGSK.shape[1], ways, axis_size(*heads), window, softcap)
    fast = attention_kernels.chosen(kernel, q_BTHK.dtype, q_BTHK.shape[-1], shape) if first is None else None
    extra = () if fast is None else fast.constants()

    def local(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        query_segments: jax.Array,
        key_segments: jax.Array,
        first: jax.Array,
        extra: tuple,
    ) -> jax.Array:
        if fast is None and groups != heads:  # one key head for all: its gradient is summed over those who share it
            k, v = (vary(x, heads) for x in (k, v))
        k, v, key_segments = whole(k, ways, 2), whole(v, ways, 2), whole(key_segments, ways, 1)
        if fast is not None:
            return fast(extra, q, k, v, query_segments, key_segments)
        slots_T = first + local_slots(q.shape[1], ways)
        return _attend(q, k, v, query_segments, key_segments, slots_T, window=window, softcap=softcap)

    rows, keys = P(BATCH, time or None), P(BATCH, groups or None, time or None, None)
    queries = P(BATCH, time or None, heads or None, None)
    given = queries, keys, keys, rows, rows, P(), () if fast is None else fast.specs()
    begin = jnp.int32(0) if first is None else jnp.asarray(first, jnp.int32)
    # a kernel of another compiler does not say along which axes its results differ
    result = jax.shard_map(local, in_specs=given, out_specs=queries, check_vma=fast is None)(
        q_BTHK, k_BGSK, v_BGSK, query_segments_BT, key_segments_BS, begin, extra
    )
    return checkpoint_name(result, ATTENDED)


def _attend(
    q_BTHK: jax.Array,
    k_BGSK: jax.Array,
    v_BGSK: jax.Array,
    query_segments_BT: jax.Array,
    key_segments_BS: jax.Array,
    slots_T: jax.Array,
    *,
    window: int | None,
    softcap: float | None,
) -> jax.Array:
    """`attend` on one device's share, all scores at once; slots_T: the queries' slots among the keys'."""
    (B, T, H, K), (_, G, S, _) = q_BTHK.shape, k_BGSK.shape
    q_BGRTK = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    behind_TS = slots_T[:, None] - jnp.arange(S)[None, :]
    near_TS = behind_TS >= 0 if window is None else (behind_TS >= 0) & (behind_TS < window)
    seen_BTS = near_TS & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :])
    out_BGRTK = attention(q_BGRTK, k_BGSK, v_BGSK, seen_BTS, softcap)
    return out_BGRTK.transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention with its projections."""

    def __init__(self, c: ModelConfig, draw: Draw):
        D, H, G, K = c.width, c.attention.heads, c.kv_heads, c.head_dim
        shared = None if G == 1 else "kv_heads"
        self.c = c
        self.q_DHK = draw.normal((D, H, K), ("width", "heads", None))
        self.k_DGK = draw.normal((D, G, K), ("width", shared, None))
        self.v_DGK = draw.normal((D, G, K), ("width", shared, None))
        self.o_HKD = draw.normal((H, K, D), ("heads", None, "width"), residual=True)
        biased = c.attention.qkv_bias
        self.q_bias_HK = draw.zeros((H, K), ("heads", None)) if biased else None
        self.k_bias_GK = draw.zeros((G, K), (shared, None)) if biased else None
        self.v_bias_GK = draw.zeros((G, K), (shared, None)) if biased else None
        self.o_bias_D = draw.zeros((D,), (None,)) if c.attention.out_bias else None
        self.q_scale_K = draw.ones((K,), (None,)) if c.attention.qk_norm else None
        self.k_scale_K = draw.ones((K,), (None,)) if c.attention.qk_norm else None
        self.lora_q = draw.adapter("q", self.q_DHK)
        self.lora_k = draw.adapter("k", self.k_DGK)
        self.lora_v = draw.adapter("v", self.v_DGK)
        self.lora_o = draw.adapter("o", self.o_HKD, residual=True)

    def qkv(self, x_BTD: jax.Array, tables: tuple[jax.Array, jax.Array] | None) -> tuple[jax.Array, ...]:
        """Scaled queries [B, T, H, K] and keys, values [B, G, T, K], positions applied."""
        c, dtype = self.c, x_BTD.dtype
        q_BTHK, k_BTGK, v_BTGK = affine(
            x_BTD,
            (self.q_DHK, self.q_bias_HK, self.lora_q),
            (self.k_DGK, self.k_bias_GK, self.lora_k),
            (self.v_DGK, self.v_bias_GK, self.lora_v),
        )
        time = spec_axes(q_BTHK, 1)
        if spec_axes(k_BTGK, 1) != time:  # one key head for all was computed where the residual stream lies
            k_BTGK, v_BTGK = (jax.sharding.reshard(x, P(BATCH, time or None, None, None)) for x in (k_BTGK, v_BTGK))
        if self.q_scale_K is not None:
            q_BTHK = scales(q_BTHK, self.q_scale_K[...], c.norm.eps)
            k_BTGK = scales(k_BTGK, self.k_scale_K[...], c.norm.eps)
        if tables is not None:
            q_BTHK, k_BTGK = (rotate(x, tables, c.positions.pairing) for x in (q_BTHK, k_BTGK))
        scale = c.attention.scale or c.head_dim**-0.5
        return (q_BTHK * scale).astype(dtype), k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)

    def output(self, out_BTHK: jax.Array) -> jax.Array:
        """The heads' results joined, [B, T, D]."""
        return affine_out(out_BTHK, (self.o_HKD, self.o_bias_D, self.lora_o))
