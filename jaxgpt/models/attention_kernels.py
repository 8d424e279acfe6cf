"""Attention kernels that never hold all scores: splash attention on TPUs, cuDNN's on GPUs.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, K head width.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import P
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import NamedSharding

from jaxgpt.mesh import TIME, platform
from jaxgpt.models.kernels import ATTENDED
from jaxgpt.models.sequence import Cut

LANES = 128
"""Splash attention wants head widths and sequence pieces that are multiples of it."""
BLOCK = 512
"""Queries and keys of a tile: 512 x 512 is what MaxText's configs take for v5e and v5p."""


class Shape(NamedTuple):
    """What a kernel is compiled for."""

    tokens: int
    heads: int
    groups: int
    ways: int
    """Devices along which the queries' time is split."""
    head_ways: int
    window: int | None
    softcap: float | None


def chosen(kernel: str, dtype: jnp.dtype, head_dim: int, shape: Shape) -> Splash | Cudnn | None:
    """The fast kernel for this platform and shape; None where only the reference computes it.

    kernel: auto, reference, or splash, which off a TPU is interpreted (slow, for tests).
    """
    on = platform()
    if kernel == "splash" or (kernel == "auto" and on == "tpu"):
        return Splash(shape, on != "tpu") if (shape.tokens // shape.ways) % LANES == 0 else None
    if kernel == "auto" and on == "gpu" and shape.softcap is None and dtype == jnp.bfloat16 and head_dim <= 128:
        return Cudnn(shape) if shape.ways == 1 and cudnn_works() else None
    return None


@dataclasses.dataclass(frozen=True)
class Splash:
    """Pallas splash attention (jax.experimental): tiles that a mask hides are skipped; packing by segment ids."""

    shape: Shape
    interpret: bool

    @functools.cached_property
    def _kernel(self) -> splash.SplashAttentionKernel:
        s = self.shape
        square = s.tokens, s.tokens
        mask = masks.CausalMask(square) if s.window is None else masks.LocalMask(square, (s.window - 1, 0), 0)
        mask.q_sequence = Cut(s.tokens, s.ways, TIME).slots_T
        block = next(size for size in (BLOCK, 256, LANES) if (s.tokens // s.ways) % size == 0)
        blocks = splash.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
            block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        )  # fmt: skip
        return splash.make_splash_mha(
            mask=masks.MultiHeadMask([mask] * s.heads),
            block_sizes=blocks,
            head_shards=s.head_ways,
            q_seq_shards=s.ways,
            attn_logits_soft_cap=s.softcap,
            residual_checkpoint_name=ATTENDED,
            interpret=self.interpret,
        )

    def constants(self) -> tuple:
        """Which tiles are seen, as arrays on the mesh."""
        return jax.tree.map(jax.sharding.reshard, (self._kernel,), self.specs())

    def specs(self) -> tuple:
        """How they are split: by head and by query."""
        mesh = jax.sharding.get_abstract_mesh()
        return (self._kernel.manual_sharding_spec(NamedSharding(mesh, P("tensor", TIME))),)

    def __call__(
        self, constants: tuple, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, key_segments: jax.Array
    ) -> jax.Array:
        """q [B, T, H, K], k and v [B, G, S, K] to [B, T, H, K]; head widths are filled up with zeros."""
        (kernel,), width = constants, q.shape[-1]
        fill = ((0, 0), (0, 0), (0, -width % LANES))

        def row(q_THK: jax.Array, k_GSK: jax.Array, v_GSK: jax.Array, ids: jax.Array, key_ids: jax.Array) -> jax.Array:
            q_HTK, k_GSK, v_GSK = (jnp.pad(x, fill) for x in (q_THK.swapaxes(0, 1), k_GSK, v_GSK))
            out_HTK = kernel(q_HTK, k_GSK, v_GSK, segment_ids=splash.SegmentIds(ids, key_ids))
            return out_HTK[..., :width].swapaxes(0, 1)

        return jax.vmap(row)(q, k, v, segments, key_segments)


@dataclasses.dataclass(frozen=True)
class Cudnn:
    """cuDNN's flash attention; packing goes in as a mask of [B, 1, T, S]."""

    shape: Shape

    def constants(self) -> tuple:
        """None."""
        return ()

    def specs(self) -> tuple:
        """None."""
        return ()

    def __call__(
        self, constants: tuple, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, key_segments: jax.Array
    ) -> jax.Array:
        """As of `Splash`."""
        same = segments[:, None, :, None] == key_segments[:, None, None, :]
        window = None if self.shape.window is None else (self.shape.window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k.swapaxes(1, 2), v.swapaxes(1, 2), mask=same, scale=1.0, is_causal=True, local_window_size=window,
            implementation="cudnn",
        )  # fmt: skip


@functools.cache
def cudnn_works() -> bool:
    """Whether cuDNN attention compiles and runs here, forward and backward: tried once, for it does not with every
    version of CUDA."""
    x = jnp.ones((1, LANES, 1, 64), jnp.bfloat16)

    def total(x: jax.Array) -> jax.Array:
        out = jax.nn.dot_product_attention(x, x, x, is_causal=True, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    try:
        with jax.ensure_compile_time_eval():
            jax.block_until_ready(jax.jit(jax.grad(total))(x))
    except Exception:  # whatever it raises, the reference is there
        return False
    return True
