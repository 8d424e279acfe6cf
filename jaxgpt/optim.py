"""Learning-rate schedules and optimizers, as optax values.

A transformation's update is called inside the step, where optax needs JAX's standard dtype promotion.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


def adamw(config: OptimizerConfig, steps: int, per: int = 1) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) with global-norm clipping before it, decay by leaf name, and `schedule`.

    The update is -lr (m / (sqrt(v) + eps) + weight_decay p) with bias-corrected m and v: eps stands outside the
    corrected root, as in torch and optax (lm-human-preferences has TensorFlow's form, whose first steps are smaller).
    The gradient must already be the mean over the global batch.
    """
    return optax.chain(
        optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule(config, steps, per)),
    )


def by_part(parts: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformation:
    """A transformation of its own for each top-level key of the parameters, as {"policy": ..., "value": ...}.

    Each part's gradients are clipped by that part's own norm. A key of the parameters without a transformation is an
    error of optax at init.
    """
    return optax.partition(dict(parts), lambda params: {name: name for name in params})
