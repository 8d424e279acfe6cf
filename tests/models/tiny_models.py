"""Tiny models, their parameters and batches, for the tests of this folder."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.losses import next_token, token_logp
from jaxgpt.mesh import make_mesh, put_batch
from jaxgpt.models.heads import LanguageModel, language_model
from jaxgpt.models.net import Net, Params

VOCAB = 32


def tiny(**changes: Any) -> ModelConfig:
    return ModelConfig(**({"width": 16, "layers": 2, "context": 16} | changes))


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor))


def drawn(net: Net, mesh: jax.sharding.Mesh, seed: int = 0) -> Params:
    """Parameters of which none is at its initial value: no scale is 1, no bias 0. The same on every mesh."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        value = 0.3 * rng.standard_normal(leaf.shape) + ("scale" in jax.tree_util.keystr(path))
        return jax.device_put(value.astype(leaf.dtype), NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree_util.tree_map_with_path(draw, net.abstract)


def exact(params: Params) -> dict[str, Any]:
    """The parameters in float64, for the reference."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)


def rows(count: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Plain rows: one document each, no padding."""
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (count, length)).astype(np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (count, 1))
    return {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}


def mixed(length: int = 8) -> dict[str, np.ndarray]:
    """Two rows: two packed documents, and one document behind left padding."""
    batch, cut, pad = rows(2, length), length // 2 + 1, 2
    batch["segments"][0, cut:] = 2
    batch["positions"][0, cut:] -= cut
    batch["segments"][1, :pad] = 0
    batch["positions"][1] = np.maximum(batch["positions"][1] - pad, 0)
    return batch


def place(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> tuple[jax.Array, ...]:
    """A batch's arrays on the devices: tokens, segments, positions and, where there are any, seeds."""
    return tuple(put_batch(batch, mesh).values())


def logits(net: Net, params: Params, batch: tuple[jax.Array, ...]) -> jax.Array:
    lm: LanguageModel = net.bind(params)
    return lm.logits(lm.hidden(*batch))


def loss_and_gradient(c: ModelConfig, mesh: jax.sharding.Mesh, batch: dict[str, np.ndarray]) -> tuple[float, Params]:
    """Next-token loss, nats per token, of the drawn parameters, and its gradient."""
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        net = language_model(c, VOCAB)
        targets = put_batch({"targets": np.roll(batch["tokens"], -1, axis=1)}, mesh)["targets"]

        def loss(params: Params, batch: tuple[jax.Array, ...], targets: jax.Array) -> jax.Array:
            logp_BT = token_logp(logits(net, params, batch), targets)
            return next_token(logp_BT, (batch[1] != 0).astype(jnp.float32))[0].mean

        value, gradient = jax.jit(jax.value_and_grad(loss))(drawn(net, mesh), place(batch, mesh), targets)
    return float(value), gradient


def assert_close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` of the largest number, leaf by leaf."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape, jax.tree_util.keystr(path)
        worst = np.max(np.abs(a - b), initial=0.0)
        assert worst <= tolerance * max(np.max(np.abs(b), initial=0.0), 1e-30), (jax.tree_util.keystr(path), worst)
