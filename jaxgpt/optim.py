"""Learning-rate schedules and optimizers, as optax values.

A transformation's update is called inside the step, where optax needs JAX's standard dtype promotion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config.schema import OptimizerConfig

UNDECAYED = ("scale", "bias")
"""Leaves whose name ends so (before its suffix of dimension letters) are not decayed."""


def schedule(config: OptimizerConfig, steps: int, per: int = 1) -> optax.Schedule:
    """Learning rate as a function of the number of updates made so far; float32 [].

    A warm-up of w points rises as lr / w, 2 lr / w, ... to lr; the decay runs from there to final * lr, which the last
    point has. The first rate is positive, and after the last point the rate stays.

    Args:
        config: peak, shape, warm-up (share of the points, rounded) and final share.
        steps: updates of the whole stage.
        per: updates that share one point: in PPO the rate falls per rollout, not per minibatch.
    """
    points = max(-(-steps // per), 1)
    warmup = round(config.warmup * points)
    peak = max(warmup - 1, 0)

    def rate(count: jax.Array | int) -> jax.Array:
        point = jnp.minimum(jnp.asarray(count) // per, points - 1).astype(jnp.float32)
        done = jnp.clip((point - peak) / max(points - 1 - peak, 1), 0.0, 1.0)
        match config.schedule:
            case "cosine":
                left = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
            case "linear":
                left = 1.0 - done
            case "constant":
                left = jnp.ones_like(done)
        share = config.final + (1.0 - config.final) * left
        return config.lr * jnp.where(point < warmup, (point + 1.0) / max(warmup, 1), share)

    return rate


def decayed(params: Any) -> Any:
    """Tree of bools like `params`: whether weight decay acts on the leaf, told by its name alone.

    A leaf is named by its last key less a suffix of dimension letters: "up_DF" is up, "attention_scale_D" is
    attention_scale. Names that end with "scale" or "bias" are not decayed.
    """

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        name = jax.tree_util.keystr(path[-1:], simple=True)
        stem, _, letters = name.rpartition("_")
        return not (stem if letters.isupper() else name).endswith(UNDECAYED)

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(config: OptimizerConfig, steps: int, per: int = 1, idle: int = 0) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with global-norm clipping before it, decay by leaf name, and `schedule`.

    The update is -lr (m / (sqrt(v) + eps) + weight_decay p) with bias-corrected m and v: eps stands outside the
    corrected root, as in torch and optax; with `eps_form` tf see `scale_by_tf_adam`. The gradient must already be the
    mean over the global batch. For the first `idle` updates the rate is 0.
    """
    rate = schedule(config, steps, per)
    adam = scale_by_tf_adam if config.eps_form == "tf" else optax.scale_by_adam
    return optax.chain(
        optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip),
        adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(lambda count: jnp.where(count < idle, 0.0, rate(count))),
    )


def scale_by_tf_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam in TensorFlow's form: sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps), with m and v not corrected.

    Its eps is optax's times sqrt(1 - b2^t), so that first steps are smaller: 3.8 times at eps 1e-5 and gradients of
    1e-4 (lm-human-preferences; arXiv 2403.17031).
    """
    plain = optax.scale_by_adam(b1=b1, b2=b2, eps=0.0)

    def update(grads: Any, state: optax.ScaleByAdamState, params: Any = None) -> tuple[Any, optax.ScaleByAdamState]:
        state = plain.update(grads, state, params)[1]
        steps = state.count.astype(jnp.float32)
        root = jnp.sqrt(1.0 - jnp.float32(b2) ** steps)
        factor = root / (1.0 - jnp.float32(b1) ** steps)
        return jax.tree.map(lambda m, v: factor * m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(plain.init, update)


class Averaged(NamedTuple):
    """State of `averaged`."""

    inner: optax.OptState
    average: Any
    """Average of the parameters, a tree like them."""


def averaged(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`inner`, and beside it an exponential average of the parameters it makes: a <- decay a + (1 - decay) p.

    The average begins as the first parameters, so that it needs no correction (InstructGPT's has a decay of 0.992).
    """

    def init(params: Any) -> Averaged:
        return Averaged(inner.init(params), jax.tree.map(jnp.copy, params))

    def update(grads: Any, state: Averaged, params: Any = None) -> tuple[Any, Averaged]:
        updates, new = inner.update(grads, state.inner, params)
        made = optax.apply_updates(params, updates)
        mixed = jax.tree.map(lambda a, p: decay * a + (1.0 - decay) * p, state.average, made)
        return updates, Averaged(new, mixed)

    return optax.GradientTransformation(init, update)


def by_part(parts: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """A transformation of its own for each top-level key of the parameters, as {"policy": ..., "value": ...}.

    Each part's gradients are clipped by that part's own norm. A key of the parameters without a transformation is an
    error of optax at init.
    """
    return optax.partition(dict(parts), lambda params: {name: name for name in params})


def average_of(state: Any, part: str) -> Any:
    """The averaged parameters of a part that `by_part` gave an `averaged` transformation."""
    return state.inner_states[part].inner_state.average[part]
