"""The one training step: the only gradient and the only optimizer update of the package."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxgpt.losses import Ratio
from jaxgpt.mesh import batch_spec
from jaxgpt.models.net import Params
from jaxgpt.train.state import State, Step

Batch = dict[str, jax.Array]
Loss = Callable[[Params, Batch], tuple[Ratio, dict[str, Ratio]]]
"""(params, batch) -> (mean to minimise, means to report); pure."""


def _parts(x: jax.Array, count: int) -> jax.Array:
    """[B, ...] as [count, B / count, ...], every row staying on its device."""
    rows = x.shape[0] // count
    return jnp.moveaxis(x.reshape(rows, count, *x.shape[1:], out_sharding=batch_spec(x.ndim + 1)), 1, 0)


def make_step(loss: Loss, tx: optax.GradientTransformation, schedule: optax.Schedule, accumulate: int = 1) -> Step:
    """The jitted, state-donating update.

    The sum of the loss is differentiated, sums and weights are added over `accumulate` parts of the batch, and divided
    once, so that the result does not depend on how the batch is cut. A batch with a non-finite loss, gradient or
    update leaves parameters and optimizer bit for bit as they were and is counted.

    Metrics are means as float32 scalars, with lr (of this update), grad_norm (before clipping) and skipped.
    """

    def gradients(params: Params, batch: Batch) -> tuple[Params, tuple[Ratio, dict[str, Ratio]]]:
        def objective(params: Params) -> tuple[jax.Array, tuple[Ratio, dict[str, Ratio]]]:
            with jax.numpy_dtype_promotion("strict"):
                total, metrics = loss(params, batch)
            return total.total, (total, metrics)

        return jax.grad(objective, has_aux=True)(params)

    def accumulated(params: Params, batch: Batch) -> tuple[Params, tuple[Ratio, dict[str, Ratio]]]:
        if accumulate == 1:
            return gradients(params, batch)
        parts = jax.tree.map(lambda x: _parts(x, accumulate), batch)
        shapes = jax.eval_shape(gradients, params, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)

        def add(total: tuple, part: Batch) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, total, gradients(params, part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        grads, (total, metrics) = accumulated(state.params, batch)
        weight = jnp.where(total.weight == 0.0, 1.0, total.weight)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt = tx.update(grads, state.opt, state.params)
            finite = jnp.isfinite(total.total) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
            params = optax.apply_updates(state.params, updates)
        keep = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt), (state.params, state.opt))
        skipped = state.skipped + (~finite).astype(jnp.int32)
        report = {name: ratio.mean for name, ratio in metrics.items()}
        report |= {
            "loss": total.mean,
            "lr": jnp.asarray(schedule(state.step - state.skipped), jnp.float32),
            "grad_norm": norm,
            "skipped": skipped,
        }
        return state.replace(step=state.step + 1, skipped=skipped, params=keep[0], opt=keep[1]), report

    return jax.jit(step, donate_argnums=0)
