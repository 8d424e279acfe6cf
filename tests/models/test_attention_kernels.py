"""Splash attention, interpreted, against the reference in float32: packing, grouped keys, windows, soft caps, narrow
heads filled up, and queries split over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding
from tiny_models import assert_close, mesh_of

from jaxgpt.mesh import BATCH
from jaxgpt.models.attention import attend
from jaxgpt.models.attention_kernels import Shape, chosen
from jaxgpt.models.sequence import cut

B, T, H, K = 2, 256, 4, 24
SEGMENTS = np.repeat([[1, 2, 3], [0, 1, 2]], [100, 29, 127], axis=1).astype(np.int32)


def both(kernel: str, mesh: jax.sharding.Mesh, groups: int, window: int | None, softcap: float | None):
    """Attention and its gradients, in the sequence's order."""
    rng = np.random.default_rng(0)
    q, k, v, direction = (rng.standard_normal((B, T, n, K)).astype(np.float32) for n in (H, groups, groups, H))

    def value(q, k, v, segments, direction):
        order = cut(T)
        q, k, v, segments = (order.place(x) for x in (q, k, v, segments))
        q = jax.sharding.reshard(q, P(BATCH, order.axes, "tensor", None))
        shared = None if groups == 1 else "tensor"
        k, v = (jax.sharding.reshard(x.swapaxes(1, 2), P(BATCH, shared, order.axes, None)) for x in (k, v))
        out = attend(q, k, v, segments, segments, window=window, softcap=softcap, kernel=kernel)
        out = order.natural(jax.sharding.reshard(out, P(BATCH, order.axes, None, None)))
        return jnp.sum(out * direction), out

    with jax.set_mesh(mesh):
        given = [jax.device_put(x, NamedSharding(mesh, P(BATCH))) for x in (q, k, v, SEGMENTS, direction)]
        (_, out), gradient = jax.jit(jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True))(*given)
        return jax.device_get((out, gradient))


@pytest.mark.parametrize(
    ("shape", "groups", "window", "softcap"),
    [
        ((1, 1, 1, 1), 4, None, None),
        ((1, 1, 2, 2), 2, None, None),
        ((1, 2, 2, 2), 1, 70, None),
        ((2, 1, 1, 2), 2, 130, 2.0),
    ],
    ids=["one device", "context and tensor", "one key head, a window", "soft cap"],
)
def test_splash_attention_is_the_reference(shape, groups, window, softcap):
    settings = groups, window, softcap
    assert_close(both("splash", mesh_of(*shape), *settings), both("reference", mesh_of(), *settings))


def test_what_no_tile_holds_is_left_to_the_reference():
    with jax.set_mesh(mesh_of()):
        assert chosen("splash", jnp.float32, 64, Shape(256, 4, 4, 1, 1, None, None)) is not None
        assert chosen("splash", jnp.float32, 64, Shape(200, 4, 4, 1, 1, None, None)) is None
        assert chosen("auto", jnp.float32, 64, Shape(256, 4, 4, 1, 1, None, None)) is None  # not on a CPU
