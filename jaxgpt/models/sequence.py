"""How the tokens of one forward pass lie along the mesh's context axis.

With causal attention the last tokens see the most keys. So a sequence is cut into two pieces a device, and device i
of n has pieces i and 2n - 1 - i: all have the same work (Llama 3, arXiv 2407.21783, section 3.3.2). Inside the model
tokens stand in that order; whoever calls it sees them in their own.

Letters: B batch, T time.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxgpt.mesh import BATCH, TIME, Axes, axis_size


@dataclasses.dataclass(frozen=True)
class Cut:
    """The order and the mesh axes of a sequence's tokens."""

    length: int
    ways: int
    """Devices along the context axis."""
    axes: Axes | None
    """The axes that split time; None where nothing may."""

    @property
    def slots_T(self) -> np.ndarray:
        """The place in the sequence of each token in the model's order, int32 [T]."""
        pieces = np.arange(self.length, dtype=np.int32).reshape(2 * self.ways if self.ways > 1 else 1, -1)
        if self.ways == 1:
            return pieces[0]
        order = [piece for i in range(self.ways) for piece in (i, 2 * self.ways - 1 - i)]
        return pieces[np.array(order)].reshape(-1)

    def place(self, x_BT: jax.Array) -> jax.Array:
        """Tokens, or what belongs to each, [B, T, ...] in the model's order and on its devices."""
        if self.ways > 1:
            x_BT = x_BT.at[:, self.slots_T].get(out_sharding=_rows(x_BT.ndim))
        return jax.sharding.reshard(x_BT, P(BATCH, self.axes, *(None,) * (x_BT.ndim - 2)))

    def natural(self, x_BT: jax.Array) -> jax.Array:
        """The inverse of `place`: in the sequence's order, whole on each device that has the row."""
        x_BT = jax.sharding.reshard(x_BT, _rows(x_BT.ndim))
        if self.ways == 1:
            return x_BT
        return x_BT.at[:, np.argsort(self.slots_T)].get(out_sharding=_rows(x_BT.ndim), unique_indices=True)


def _rows(ndim: int) -> P:
    return P(BATCH, *(None,) * (ndim - 1))


def cut(length: int) -> Cut:
    """The cut of a sequence on the mesh in use: none where two pieces a device do not come out even."""
    ways = axis_size(*TIME)
    if length == 1 or (ways > 1 and length % (2 * ways)):
        return Cut(length, 1, None)
    return Cut(length, ways, TIME)


def local_slots(length: int, ways: int) -> jax.Array:
    """The places of this device's `length` tokens, int32; inside a shard_map."""
    if ways == 1:
        return jnp.arange(length, dtype=jnp.int32)
    half = jnp.arange(length // 2, dtype=jnp.int32)
    index = jax.lax.axis_index(TIME).astype(jnp.int32)
    return jnp.concatenate([index * (length // 2) + half, (2 * ways - 1 - index) * (length // 2) + half])


def whole(x: jax.Array, ways: int, axis: int) -> jax.Array:
    """All devices' tokens in the sequence's order, of this device's share along an axis; inside a shard_map."""
    if ways == 1:
        return x
    x = jax.lax.all_gather(x, TIME, axis=axis, tiled=True)
    order = np.argsort([piece for i in range(ways) for piece in (i, 2 * ways - 1 - i)])
    pieces = x.reshape(*x.shape[:axis], 2 * ways, -1, *x.shape[axis + 1 :])
    return jnp.take(pieces, order, axis=axis, unique_indices=True).reshape(x.shape)
