"""The hot operations of a block, with the backward passes that XLA's CPU compiler does not find by itself.

On accelerators these are the plain operations. On the CPU, XLA recomputes exp and tanh inside transposed copies and
multiplies transposed operands at half speed, so there each operation has a hand-written gradient (tested against plain
autodiff) whose barriers say what is to be computed once.

Letters: N rows (batch and time), I inputs, O outputs, B batch, T queries, S keys, G key/value heads, R query heads per
key/value head, K head width, D model width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P
from jax.ad_checkpoint import checkpoint_name

from jaxgpt.mesh import BATCH

FAR = -1e30
"""Score of a pair that is not seen; finite, so that a row with nothing to see gives no NaN."""
PRODUCT = "product"
"""What remat policies know the results of `project` and `contract` by: they cannot see into hand-written gradients."""
_once = jax.lax.optimization_barrier
_product = functools.partial(checkpoint_name, name=PRODUCT)


def on_cpu() -> bool:
    """Whether the hand-written gradients are in use."""
    return jax.default_backend() == "cpu"


def _vary(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """A value that is the same along mesh axes, taken as different there, so that its gradient is summed over them."""
    return jax.lax.pcast(x, axes, to="varying")


def project(x_BTI: jax.Array, w: jax.Array, dtype: jax.typing.DTypeLike | None = None, kept: bool = True) -> jax.Array:
    """x @ w for weights [I, ...] whose outputs may be sharded over tensor: [B, T, ...], in `dtype` or that of x.

    One that is not `kept` is cheap: remat policies compute it again.
    """
    outputs, named = jax.typeof(w).sharding.spec[1:], _product if kept else lambda y: y
    out = P(BATCH, None, *outputs)
    if not on_cpu():
        return named(jnp.tensordot(x_BTI, w, axes=1, preferred_element_type=dtype, out_sharding=out))

    def local(x_BTI: jax.Array, w: jax.Array) -> jax.Array:
        x_BTI = _vary(x_BTI, ("tensor",)) if "tensor" in outputs else x_BTI
        y = _matmul(x_BTI, _vary(w, BATCH).reshape(w.shape[0], -1), dtype)
        return y.reshape(*y.shape[:2], *w.shape[1:])

    specs = (P(BATCH, None, None), P(None, *outputs))
    return named(jax.shard_map(local, in_specs=specs, out_specs=out)(x_BTI, w))


def contract(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [B, T, ...] times w [..., O] over all of w's other dimensions, the first of which tensor shards: [B, T, O]."""
    inner = w.ndim - 1
    rows, out = P(BATCH, None, "tensor", *(None,) * (inner - 1)), P(BATCH, None, None)
    if not on_cpu():
        return _product(jnp.tensordot(x, w, axes=inner, out_sharding=out))

    def local(x: jax.Array, w: jax.Array) -> jax.Array:
        x_BTI, w_IO = x.reshape(*x.shape[:2], -1), w.reshape(-1, w.shape[-1])
        return jax.lax.psum(_matmul(x_BTI, _vary(w_IO, BATCH), None), "tensor")

    specs = (rows, P("tensor", *(None,) * inner))
    return _product(jax.shard_map(local, in_specs=specs, out_specs=out)(x, w))


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
