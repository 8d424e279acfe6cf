"""The state of a training run, as one tree of arrays: all that a checkpoint must hold."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxgpt.models.net import Params


@struct.dataclass
class State:
    """Everything that changes while training."""

    step: jax.Array
    """Batches used, int32 []."""
    skipped: jax.Array
    """Batches whose gradients were not finite and changed nothing, int32 []."""
    idle: jax.Array
    """Batches without weight, which changed nothing, int32 []."""
    params: Params
    opt: optax.OptState
    extras: dict[str, jax.Array]
    """What a source must remember between steps, such as the KL coefficient."""


def initial_state(params: Params, tx: optax.GradientTransformation, extras: dict[str, jax.Array]) -> State:
    """The state before the first step; traceable, so that eval_shape gives the target of a restore."""
    step, skipped, idle = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: the step takes them all
    return State(step=step, skipped=skipped, idle=idle, params=params, opt=tx.init(params), extras=extras)


def _words(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _mix(h: jax.Array, salt: int) -> jax.Array:
    h = h ^ jnp.uint32(salt)
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def _sums(x: jax.Array, first: jax.Array) -> jax.Array:
    """Two sums, [2] uint32, over the words of an array whose elements are numbered from `first` on."""
    words, index = _words(x), jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(
            jnp.uint32, x.shape, axis, out_sharding=jax.typeof(words).sharding
        )
    mixed = [_mix(words ^ _mix(first + index, salt), salt) for salt in (0, 0x9E3779B9)]
    return jnp.stack([jnp.sum(one, dtype=jnp.uint32) for one in mixed])


@jax.jit
def _leaf_fingerprint(x: jax.Array) -> jax.Array:
    """`_sums` of a whole array; row by row where rows are not split, for it takes copies of what it sees."""
    if x.ndim < 2 or jax.typeof(x).sharding.spec[0] is not None:
        return _sums(x, jnp.uint32(0))
    size = jnp.uint32(math.prod(x.shape[1:]) % 2**32)

    def row(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + _sums(at[0], at[1] * size), None

    return jax.lax.scan(row, jnp.zeros(2, jnp.uint32), (x, jnp.arange(x.shape[0], dtype=jnp.uint32)))[0]


def fingerprint(tree: Any) -> str:
    """64 bits, in hex, over every bit and place of a tree's arrays; the same on any mesh.

    Sums of mixed words modulo 2^32 do not depend on the order of adding, hence not on the sharding. The arrays are
    looked at one by one: all in one program would take memory for copies of all.
    """
    sums = jax.tree.map(lambda x: jax.block_until_ready(_leaf_fingerprint(x)), tree)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(sums))
    named = {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}/{i}": int(value)
        for path, pair in leaves
        for i, value in enumerate(pair)
    }
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(named.items()):  # by name: a tuple read back as a dict has its leaves in another order
        digest.update(name.encode())
        digest.update(value.to_bytes(4, "little"))
    return digest.hexdigest()


Step = Callable[[State, dict[str, Any], Params], tuple[State, dict[str, jax.Array]]]
"""One update: (state, batch, frozen parameters) -> (state, metrics); the state given is used up."""
