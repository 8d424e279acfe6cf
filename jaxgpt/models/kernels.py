"""The hot operations of a block, with the backward passes that XLA's CPU compiler does not find by itself.

On accelerators these are the plain operations. On the CPU, XLA recomputes exp and tanh inside transposed copies and
multiplies transposed operands at half speed, so there each operation has a hand-written gradient (tested against plain
autodiff) whose barriers say what is to be computed once.

Letters: N rows (batch and time), I inputs, O outputs, B batch, T queries, S keys, G key/value heads, R query heads per
key/value head, K head width, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.mesh import BATCH, Axes, axis_size, platform, spec_axes

FAR = -1e30
"""Score of a pair that is not seen; finite, so that a row with nothing to see gives no NaN."""
PRODUCT = "product"
"""What remat policies know the results of `project` and `contract` by: they cannot see into hand-written gradients."""
ATTENDED = "attended"
"""What remat policies know the results of attention by."""
_once = jax.lax.optimization_barrier
_product = functools.partial(checkpoint_name, name=PRODUCT)


def on_cpu() -> bool:
    """Whether the hand-written gradients are in use."""
    return platform() == "cpu"


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """A value that is the same along mesh axes, taken as different there, so that its gradient is summed over them."""
    return jax.lax.pcast(x, tuple(axes), to="varying") if axes else x


def joined_width(w: jax.Array, spec: Sequence[Axes], along: Axes) -> jax.Array:
    """The share of a weight that products need, from what is kept: all but its `tensor` shards. Inside a shard_map.

    spec: the mesh axes of each of its dimensions; along: those that the products differ along, over which the
    gradient is summed: scattered to the shards where there are any.
    """
    seen = {axis for axes in spec for axis in axes}
    w = vary(w, [axis for axis in along if axis not in seen])  # before it is joined: then sums are of scattered parts
    for dimension, axes in enumerate(spec):
        if shards := tuple(axis for axis in axes if axis != "tensor"):
            w = jax.lax.all_gather(w, shards, axis=dimension, tiled=True)
    return w


def specs(w: jax.Array) -> tuple[Axes, ...]:
    """The mesh axes of each dimension of an array."""
    return tuple(spec_axes(w, i) for i in range(w.ndim))


def partition(axes: Iterable[Axes]) -> P:
    """Mesh axes of each dimension, as jax writes them."""
    return P(*(one or None for one in axes))


def used_along(w: jax.Array, dtype: jax.typing.DTypeLike, along: Axes) -> jax.Array:
    """The weight cast, and joined over those axes that what it meets is not split along: there is one product there."""
    way = [tuple(axis for axis in axes if axis in along or axis == "tensor") for axes in specs(w)]
    return jax.sharding.reshard(w.astype(dtype), partition(way))


def project(
    x_BTI: jax.Array, *weights: jax.Array, dtype: jax.typing.DTypeLike | None = None, kept: bool = True
) -> list[jax.Array]:
    """x @ w for each of several weights [I, ...], in `dtype` or that of x: [B, T, ...] each.

    Weights come as they are kept, sharded and in float32. Where their outputs are split over tensor, so is the result,
    and its time is whole there; else its time is split as that of x. Those that are not `kept` are cheap: remat
    policies compute them again.
    """
    time = spec_axes(x_BTI, 1)
    weights = [used_along(w, x_BTI.dtype, (*BATCH, *time)) for w in weights]
    ways, named = [specs(w) for w in weights], _product if kept else lambda y: y
    split = ["tensor" in sum(way[1:], ()) for way in ways]
    outputs = [tuple("tensor" if "tensor" in axes else None for axes in way[1:]) for way in ways]
    inner = tuple(axis for axis in time if axis != "tensor")
    along = (*BATCH, *time)

    def local(x_BTI: jax.Array, *weights: jax.Array) -> list[jax.Array]:
        whole_BTI = None
        if any(split):
            gathered = jax.lax.all_gather(x_BTI, "tensor", axis=1, tiled=True) if "tensor" in time else None
            whole_BTI = vary(x_BTI, ("tensor",)) if gathered is None else gathered
        results = []
        for w, way, tensor in zip(weights, ways, split, strict=True):
            w = joined_width(w, way, (*BATCH, *inner) if tensor else along)
            y = multiply(whole_BTI if tensor else x_BTI, w.reshape(w.shape[0], -1), dtype)
            results.append(y.reshape(*y.shape[:2], *w.shape[1:]))
        return results

    given = P(BATCH, time or None, None), *map(partition, ways)
    out = [P(BATCH, (inner if tensor else time) or None, *o) for o, tensor in zip(outputs, split, strict=True)]
    return [named(y) for y in jax.shard_map(local, in_specs=given, out_specs=out)(x_BTI, *weights)]


def contract(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, ...] times w [..., O] over all of w's other dimensions, the first of which tensor shards: [B, T, O].

    The sum over tensor leaves each device a part of its time, as the residual stream is kept, where that comes out
    even. The weight comes as it is kept.
    """
    time, inner = spec_axes(x, 1), w.ndim - 1
    w = used_along(w, x.dtype, (*BATCH, *time))
    way = specs(w)
    scattered = bool(time) and (x.shape[1] // axis_size(*time)) % axis_size("tensor") == 0

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        w = joined_width(w, way, (*BATCH, *time))
        y_BTO = multiply(x.reshape(*x.shape[:2], -1), w.reshape(-1, w.shape[-1]), None)
        if scattered:
            return jax.lax.psum_scatter(y_BTO, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(y_BTO, "tensor")

    rows = P(BATCH, time or None, "tensor", *(None,) * (inner - 1))
    out = P(BATCH, (*time, "tensor") if scattered else time or None, None)
    return _product(jax.shard_map(local, in_specs=(rows, partition(way)), out_specs=out)(x, w))


def lookup(table_VD: jax.Array, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Rows of a table whose rows tensor may shard, [B, T, D] in `dtype`; the gradient is summed in the table's dtype.

    The sum over tensor, of one row and zeros, leaves each device a part of its time, as in `contract`.
    """
    time = spec_axes(tokens_BT, 1)
    table_VD = used_along(table_VD, table_VD.dtype, (*BATCH, *time))
    way, tensor = specs(table_VD), axis_size("tensor")
    scattered = bool(time) and (tokens_BT.shape[1] // axis_size(*time)) % tensor == 0

    def local(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        table_VD = joined_width(table_VD, way, (*BATCH, *time))
        if "tensor" not in way[0]:
            return table_VD[tokens_BT].astype(dtype)
        place_BT = tokens_BT - jax.lax.axis_index("tensor").astype(jnp.int32) * jnp.int32(table_VD.shape[0])
        here_BT = (place_BT >= 0) & (place_BT < table_VD.shape[0])
        x_BTD = jnp.where(here_BT[..., None], table_VD[jnp.where(here_BT, place_BT, 0)], 0.0).astype(dtype)
        if scattered:
            return jax.lax.psum_scatter(x_BTD, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(x_BTD, "tensor")

    out = (*time, "tensor") if scattered and "tensor" in way[0] else time
    given = partition(way), P(BATCH, time or None)
    return jax.shard_map(local, in_specs=given, out_specs=P(BATCH, out or None, None))(table_VD, tokens_BT)


def multiply(x_BTI: jax.Array, w_IO: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    """x @ w on one device, [B, T, O], in `dtype` or that of x."""
    return _matmul(x_BTI, w_IO, dtype) if on_cpu() else jnp.matmul(x_BTI, w_IO, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _matmul(x_BTI: jax.Array, w_IO: jax.Array, dtype: jax.typing.DTypeLike | None) -> jax.Array:
    return jnp.matmul(x_BTI, w_IO, preferred_element_type=dtype)


def _matmul_forward(
    x_BTI: jax.Array, w_IO: jax.Array, dtype: jax.typing.DTypeLike | None
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _matmul(x_BTI, w_IO, dtype), (x_BTI, w_IO)


def _matmul_backward(
    dtype: jax.typing.DTypeLike | None, saved: tuple[jax.Array, jax.Array], dy_BTO: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The weight gradient transposes the narrower operand, explicitly: a product of two row-major matrices is fast."""
    x_BTI, w_IO = saved
    dy_BTO = dy_BTO.astype(x_BTI.dtype)
    x_NI, dy_NO = x_BTI.reshape(-1, x_BTI.shape[-1]), _once(dy_BTO.reshape(-1, dy_BTO.shape[-1]))
    dx_BTI = (dy_NO @ w_IO.T).reshape(x_BTI.shape)
    if x_NI.shape[1] <= dy_NO.shape[1]:
        return dx_BTI, _once(_once(x_NI).T) @ dy_NO
    return dx_BTI, _once(_once(dy_NO.T) @ x_NI).T


_matmul.defvjp(_matmul_forward, _matmul_backward)


def once_computed(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """An elementwise function whose value and gradient are each computed once, and not again where they are used."""

    @jax.custom_vjp
    def kept(x: jax.Array) -> jax.Array:
        return _once(function(x))

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kept(x), x

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        return (_once(jax.vjp(function, x)[1](dy)[0]),)

    kept.defvjp(forward, backward)
    return lambda x: kept(x) if on_cpu() else function(x)


def attention(
    q_BGRTK: jax.Array, k_BGSK: jax.Array, v_BGSK: jax.Array, seen_BTS: jax.Array, softcap: float | None = None
) -> jax.Array:
    """softmax(q k) v over the seen keys, [B, G, R, T, K]; scores and softmax are float32. Queries come scaled.

    Every query that is differentiated must see a key: one that sees none gives the mean of all values.
    """
    if on_cpu() and softcap is None:
        return _attention(q_BGRTK, k_BGSK, v_BGSK, seen_BTS)
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q_BGRTK, k_BGSK, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(seen_BTS[:, None, None], scores, FAR), axis=-1)
    return jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(v_BGSK.dtype), v_BGSK)


@jax.custom_vjp
def _attention(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    return _attention_forward(q, k, v, seen)[0]


def _attention_forward(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> tuple[jax.Array, tuple]:
    scores = jnp.einsum("bgrtk,bgsk->bgrts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores, FAR)
    weights = _once(jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True)))
    share = 1.0 / jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bgrts,bgsk->bgrtk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32) * share
    return out.astype(q.dtype), (q, k, v, weights, share, out)


def _attention_backward(saved: tuple, d_out: jax.Array) -> tuple:
    """With e = exp(scores) and l its sum, the gradient of the scores is e (d_out v - d_out out) / l."""
    q, k, v, weights, share, out = saved
    d_out = d_out.astype(jnp.float32)
    inner = jnp.sum(d_out * out, axis=-1, keepdims=True) * share
    d_out = d_out * share
    d_v = jnp.einsum("bgrts,bgrtk->bgsk", weights, d_out)
    d_weights = jnp.einsum("bgrtk,bgsk->bgrts", d_out, v.astype(jnp.float32))
    d_scores = _once(weights * (d_weights - inner))
    d_q = jnp.einsum("bgrts,bgsk->bgrtk", d_scores, k.astype(jnp.float32))
    d_k = jnp.einsum("bgrts,bgrtk->bgsk", d_scores, q.astype(jnp.float32))
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)
