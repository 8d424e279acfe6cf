"""The one training step: the only gradient and the only optimizer update of the package."""

from __future__ import annotations

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
Loss = Callable[[Params, Batch], tuple[Terms, Metrics]]
"""(params, batch) -> (what to minimise, figures to report); pure. The terms' weights depend on the batch alone."""


def _parts(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], every row staying on its device."""
    rows = x.shape[0] // count
    return jnp.moveaxis(x.reshape(rows, count, *x.shape[1:], out_sharding=batch_spec(x.ndim + 1)), 1, 0)


def _terms(loss: Terms) -> tuple[Ratio, ...]:
    return (loss,) if isinstance(loss, Ratio) else loss


def _divisors(weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(jax.lax.stop_gradient(jnp.where(weight == 0.0, 1.0, weight)) for weight in weights)


def make_step(loss: Loss, tx: optax.GradientTransformation, schedule: optax.Schedule, accumulate: int = 1) -> Step:
    """The jitted, state-donating update.

    The weights of the loss's terms are summed over the `accumulate` parts of a batch first (they need no model), and
    each part's sums are divided by them, so that the result does not depend on how the batch is cut. A batch with a
    non-finite loss, gradient or update leaves parameters and optimizer bit for bit as they were and is counted; so
    does one without any weight, which is idle.

    The step takes, beside state and batch, the stage's frozen parameters: `loss` sees both as one tree.
    Metrics are float32 scalars, with lr (of this update), grad_norm (before clipping), skipped and idle.
    """

    def evaluate(params: Params, frozen: Params, batch: Batch) -> tuple[tuple[Ratio, ...], Metrics]:
        with jax.numpy_dtype_promotion("strict"):
            terms, metrics = loss(joined(frozen, params), batch)
        return _terms(terms), metrics

    def gradients(params: Params, frozen: Params, batch: Batch, weights: tuple[jax.Array, ...] | None) -> Any:
        def objective(params: Params) -> tuple[jax.Array, Any]:
            terms, metrics = evaluate(params, frozen, batch)
            divisors = _divisors(tuple(term.weight for term in terms) if weights is None else weights)
            total = sum(term.total / divisor for term, divisor in zip(terms, divisors, strict=True))
            return total, (terms, metrics)

        return jax.grad(objective, has_aux=True)(params)

    def accumulated(params: Params, frozen: Params, batch: Batch) -> Any:
        if accumulate == 1:
            return gradients(params, frozen, batch, None)
        parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
        first = jax.tree.map(lambda x: x[0], parts)

        def weigh(total: tuple[jax.Array, ...], part: Batch) -> tuple[tuple[jax.Array, ...], None]:
            terms, _ = evaluate(params, frozen, part)
            return tuple(sum_ + term.weight for sum_, term in zip(total, terms, strict=True)), None

        count = len(jax.eval_shape(evaluate, params, frozen, first)[0])
        weights = jax.lax.scan(weigh, (jnp.zeros((), jnp.float32),) * count, parts)[0]
        # all of the first loop before any of the second: devices must meet in their collectives in one order
        weights, params, frozen, parts = jax.lax.optimization_barrier((weights, params, frozen, parts))
        shapes = jax.eval_shape(gradients, params, frozen, first, weights)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            (grads, figures), (more, others) = total, gradients(params, frozen, part, weights)
            figures = jax.tree.map(operator.add, figures, others, is_leaf=lambda x: hasattr(x, "reported"))
            return (jax.tree.map(jnp.add, grads, more), figures), None

        return jax.lax.scan(add, zeros, parts)[0]

    def step(state: State, batch: Batch, frozen: Params) -> tuple[State, dict[str, jax.Array]]:
        grads, (terms, metrics) = accumulated(state.params, frozen, batch)
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
        state = state.replace(
            step=state.step + 1,
            skipped=skipped,
            idle=idled,
            params=keep[0],
            opt=keep[1],
        )
        return state, report

    return jax.jit(step, donate_argnums=0)
