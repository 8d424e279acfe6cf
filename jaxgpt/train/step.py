"""The one training step: the only gradient and the only optimizer update of the package."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.losses import Metrics, Ratio
from jaxgpt.mesh import batch_spec
from jaxgpt.models.net import Params, joined
from jaxgpt.train.state import State, Step

Batch = dict[str, Any]
"""Arrays by name, or by names in names; the first dimension of each is the batch's."""
Terms = Ratio | tuple[Ratio, ...]
"""A mean to minimise, or several, each over a number of its own, whose sum is to be minimised."""
Weights = tuple[jax.Array, ...]
"""The weight of each term over a whole batch."""
Loss = Callable[[Params, Batch], tuple[Terms, Metrics]]
"""(params, batch) -> (what to minimise, figures to report); pure. The terms' weights depend on the batch alone."""


def _parts(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], every row staying on its device."""
    rows = x.shape[0] // count
    return jnp.moveaxis(x.reshape(rows, count, *x.shape[1:], out_sharding=batch_spec(x.ndim + 1)), 1, 0)


def make_step(loss: Loss, tx: optax.GradientTransformation, schedule: optax.Schedule, accumulate: int = 1) -> Step:
    """The jitted, state-donating update.

    The weights of the loss's terms are summed over the whole batch first, and the sums of each of its `accumulate`
    parts are divided by them, so that the result does not depend on how the batch is cut. A batch with a non-finite
    loss, gradient or update leaves parameters and optimizer bit for bit as they were and is counted; so does one
    without any weight, which is idle.

    The step takes, beside state and batch, the stage's frozen parameters: `loss` sees both as one tree.
    Metrics are float32 scalars, with lr (of this update), grad_norm (before clipping), skipped and idle.
    """
    gradients = functools.partial(_gradients if accumulate == 1 else _accumulated(accumulate), loss)

    def step(
        state: State, batch: Batch, frozen: Params, weights: Weights | None = None
    ) -> tuple[State, dict[str, jax.Array]]:
        grads, (terms, metrics) = gradients(state.params, frozen, batch, weights)
        total = sum(term.mean for term in terms)
        norm = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt = tx.update(grads, state.opt, state.params)
            finite = jnp.isfinite(total) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
            params = optax.apply_updates(state.params, updates)
        idle = sum(term.weight for term in terms) == 0.0
        moves = finite & ~idle
        keep = jax.tree.map(lambda new, old: jnp.where(moves, new, old), (params, opt), (state.params, state.opt))
        skipped = state.skipped + (~finite).astype(jnp.int32)
        idled = state.idle + (finite & idle).astype(jnp.int32)
        report = {name: figure.reported for name, figure in metrics.items()}
        report |= {
            "loss": total,
            "lr": jnp.asarray(schedule(state.step - state.skipped - state.idle), jnp.float32),
            "grad_norm": norm,
            "skipped": skipped,
            "idle": idled,
        }
        state = state.replace(step=state.step + 1, skipped=skipped, idle=idled, params=keep[0], opt=keep[1])
        return state, report

    update = jax.jit(step, donate_argnums=0)
    return update if accumulate == 1 else _InParts(jax.jit(functools.partial(_weights, loss)), update)


@dataclasses.dataclass(frozen=True)
class _InParts:
    """An update that adds up parts of a batch, behind the program that weighs the whole of it.

    Two programs, for in one nothing would keep the collectives of the first from those of the second, and devices that
    meet in another order wait for ever. The first needs no model: the compiler drops it.
    """

    weigh: Callable[[Params, Params, Batch], Weights]
    update: Any

    def __call__(self, state: State, batch: Batch, frozen: Params) -> tuple[State, dict[str, jax.Array]]:
        return self.update(state, batch, frozen, self.weigh(state.params, frozen, batch))

    def _cache_size(self) -> int:
        return self.update._cache_size()


def _evaluate(loss: Loss, params: Params, frozen: Params, batch: Batch) -> tuple[tuple[Ratio, ...], Metrics]:
    with jax.numpy_dtype_promotion("strict"):
        terms, metrics = loss(joined(frozen, params), batch)
    return (terms,) if isinstance(terms, Ratio) else terms, metrics


def _weights(loss: Loss, params: Params, frozen: Params, batch: Batch) -> Weights:
    return tuple(term.weight for term in _evaluate(loss, params, frozen, batch)[0])


def _gradients(loss: Loss, params: Params, frozen: Params, batch: Batch, weights: Weights | None) -> Any:
    """The gradient of the sum of the terms' totals over `weights` (unset: their own); the terms; the figures."""

    def objective(params: Params) -> tuple[jax.Array, Any]:
        terms, metrics = _evaluate(loss, params, frozen, batch)
        whole = tuple(term.weight for term in terms) if weights is None else weights
        divisors = [jax.lax.stop_gradient(jnp.where(weight == 0.0, 1.0, weight)) for weight in whole]
        return sum(term.total / by for term, by in zip(terms, divisors, strict=True)), (terms, metrics)

    return jax.grad(objective, has_aux=True)(params)


def _accumulated(count: int) -> Callable[..., Any]:
    """`_gradients`, of `count` parts of the batch one after the other."""

    def gradients(loss: Loss, params: Params, frozen: Params, batch: Batch, weights: Weights | None) -> Any:
        one = functools.partial(_gradients, loss, params, frozen)
        parts = jax.tree.map(lambda x: _parts(x, count), batch)
        shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], parts), weights)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            (grads, figures), (more, others) = total, one(part, weights)
            # else the TPU compiler tries to sum over devices behind the loop, and fails where that sum is scattered
            more = jax.lax.optimization_barrier(more)
            figures = jax.tree.map(operator.add, figures, others, is_leaf=lambda x: hasattr(x, "reported"))
            return (jax.tree.map(jnp.add, grads, more), figures), None

        return jax.lax.scan(add, zeros, parts)[0]

    return gradients
