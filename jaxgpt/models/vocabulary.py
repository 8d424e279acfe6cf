"""Log-probabilities of tokens, the same for every stage, without ever holding all logits.

Letters: B batch, T time, N tokens of a device's share, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import P

from jaxgpt.mesh import BATCH, spec_axes
from jaxgpt.models.kernels import joined_width, multiply, partition, specs, used_along, vary

MOST = 2**28
"""Bytes of logits that a device holds at a time."""


def _centred(
    logits_BTV: jax.Array, temperature: float | jax.Array, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """logits / temperature less their maximum, float32, and logsumexp of that: small numbers keep their digits.

    axis: the mesh axis that splits the vocabulary, inside a shard_map.
    """
    logits_BTV = jnp.asarray(logits_BTV).astype(jnp.float32) / temperature
    largest_BT = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1))
    largest_BT = largest_BT if axis is None else jax.lax.pmax(largest_BT, axis)
    logits_BTV = logits_BTV - largest_BT[..., None]
    return logits_BTV, jnp.log(_sum(jnp.exp(logits_BTV), axis))


def _sum(x_BTV: jax.Array, axis: str | None) -> jax.Array:
    total_BT = jnp.sum(x_BTV, axis=-1)
    return total_BT if axis is None else jax.lax.psum(total_BT, axis)


def token_logp(
    logits_BTV: jax.Array,
    tokens_BT: jax.Array,
    temperature: float | jax.Array = 1.0,
    axis: str | None = None,
) -> jax.Array:
    """log softmax(logits / temperature) at the given tokens: nats, float32 [B, T].

    `logits_BTV[:, t]` must predict `tokens_BT[:, t]`: shifting is the caller's. The vocabulary may be sharded, since
    the gather is a comparison and a sum; inside a shard_map `axis` names the mesh axis that does. A token outside it
    gives a finite number that means nothing: mask it.
    """
    (logits_BTV, norm_BT), tokens_BT = _centred(logits_BTV, temperature, axis), jnp.asarray(tokens_BT)
    size = logits_BTV.shape[-1]
    vocabulary_V = jnp.arange(size, dtype=tokens_BT.dtype)
    if axis is not None:
        vocabulary_V = vocabulary_V + jax.lax.axis_index(axis).astype(tokens_BT.dtype) * size
    chosen_BTV = tokens_BT[..., None] == vocabulary_V
    return _sum(jnp.where(chosen_BTV, logits_BTV, 0.0), axis) - norm_BT


def token_entropy(logits_BTV: jax.Array, temperature: float | jax.Array = 1.0, axis: str | None = None) -> jax.Array:
    """Entropy of softmax(logits / temperature): nats, float32 [B, T]; logits of -inf are allowed and add nothing.

    axis: as of `token_logp`.
    """
    logits_BTV, norm_BT = _centred(logits_BTV, temperature, axis)
    finite_BTV = jnp.where(jnp.isfinite(logits_BTV), logits_BTV, 0.0)
    return norm_BT - _sum(jnp.exp(logits_BTV - norm_BT[..., None]) * finite_BTV, axis)


def predictions(
    hidden_BTD: jax.Array,
    unembed_VD: jax.Array,
    targets_BT: jax.Array,
    transform: Callable[[jax.Array], jax.Array],
    temperature: float | jax.Array = 1.0,
    *,
    entropy: bool = False,
) -> tuple[jax.Array, ...]:
    """log p of the targets and, where asked for, the entropy of each prediction: nats, float32 [B, T].

    The vocabulary stays split over tensor, and logits are made for so many tokens at a time as `MOST` holds, again in
    the backward pass. `transform` is what becomes of float32 logits (scale, soft cap). The matrix comes as it is kept.
    hidden_BTD may lie as the residual stream does: the result is split along time as that without `tensor`.
    """
    lies = spec_axes(hidden_BTD, 1)
    time = tuple(axis for axis in lies if axis != "tensor")
    unembed_VD = used_along(unembed_VD, hidden_BTD.dtype, (*BATCH, *time))
    way, axis = specs(unembed_VD), "tensor"

    def tokens(x_ND: jax.Array, w_VD: jax.Array, targets_N: jax.Array, temperature: jax.Array) -> tuple[jax.Array, ...]:
        logits_NV = transform(multiply(x_ND[None], w_VD.T, jnp.float32)[0])
        logp_N = token_logp(logits_NV, targets_N, temperature, axis)
        return (logp_N, token_entropy(logits_NV, temperature, axis)) if entropy else (logp_N,)

    def local(
        x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, temperature: jax.Array
    ) -> tuple[jax.Array, ...]:
        if "tensor" in lies:
            x_BTD = jax.lax.all_gather(x_BTD, "tensor", axis=1, tiled=True)
        else:
            x_BTD = vary(x_BTD, ("tensor",))
        w_VD = joined_width(w_VD, way, (*BATCH, *time))
        count = targets_BT.size
        chunks = next(n for n in range(1, count + 1) if count % n == 0 and count // n * w_VD.shape[0] * 4 <= MOST)
        over = chunked(tokens, chunks, (*BATCH, *time))
        found = over(x_BTD.reshape(count, -1), w_VD, targets_BT.reshape(-1), vary(temperature, (*BATCH, *time)))
        return tuple(x_N.reshape(targets_BT.shape) for x_N in found)

    targets_BT = jax.sharding.reshard(targets_BT, P(BATCH, time or None))
    rows = P(BATCH, time or None)
    given = P(BATCH, lies or None, None), partition(way), rows, P()
    out = (rows,) * (2 if entropy else 1)
    return jax.shard_map(local, in_specs=given, out_specs=out)(
        hidden_BTD, unembed_VD, targets_BT, jnp.asarray(temperature, jnp.float32)
    )


Tokens = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, ...]]
"""(hidden states [N, D], matrix [V, D], targets [N], temperature) -> figures [N] each."""


def chunked(function: Tokens, chunks: int, along: tuple[str, ...]) -> Tokens:
    """The same function over parts of the tokens one after the other; the gradient computes each part again and adds
    up the matrix's gradient in float32.

    along: the mesh axes that tokens differ along; the matrix differs along tensor too.
    """
    if chunks == 1:
        return function

    def parts(x: jax.Array) -> jax.Array:
        return x.reshape(chunks, -1, *x.shape[1:])

    @jax.custom_vjp
    def over(x_ND: jax.Array, w_VD: jax.Array, targets_N: jax.Array, temperature: jax.Array) -> tuple[jax.Array, ...]:
        found = jax.lax.map(lambda part: function(part[0], w_VD, part[1], temperature), (parts(x_ND), parts(targets_N)))
        return tuple(x.reshape(-1) for x in found)

    def forward(*given: jax.Array) -> tuple:
        return over(*given), given

    def backward(given: tuple, d_out: tuple[jax.Array, ...]) -> tuple:
        x_ND, w_VD, targets_N, temperature = given

        def add(total: tuple, part: tuple) -> tuple:
            x, targets, d_part = part
            pull = jax.vjp(lambda x, w, t: function(x, w, targets, t), x, w_VD, temperature)[1]
            dx, dw, dt = pull(d_part)
            return (total[0] + dw.astype(jnp.float32), total[1] + dt), dx

        zeros = vary(jnp.zeros(w_VD.shape, jnp.float32), (*along, "tensor")), vary(jnp.float32(0.0), along)
        (dw_VD, dt), dx = jax.lax.scan(add, zeros, (parts(x_ND), parts(targets_N), tuple(map(parts, d_out))))
        return dx.reshape(x_ND.shape), dw_VD.astype(w_VD.dtype), None, dt

    over.defvjp(forward, backward)
    return over
