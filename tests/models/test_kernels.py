"""Both ways of computing a kernel, the CPU's by hand and the accelerators' plain, against autodiff of its formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding
from tiny_models import assert_close, mesh_of

from jaxgpt.mesh import BATCH, LAYOUT
from jaxgpt.models import kernels
from jaxgpt.models.attention import attend
from jaxgpt.models.layers import ACTIVATIONS

B, T, H, K = 4, 8, 4, 3
ROWS = P(BATCH, None, None)
WIDTH = LAYOUT["width"]
TIMES = {"whole": None, "split": ("context",), "as the stream": ("context", "tensor")}
"""How the time of activations may lie."""


@pytest.fixture(params=["by hand", "plain"])
def way(request, monkeypatch):
    monkeypatch.setattr(kernels, "on_cpu", lambda: request.param == "by hand")
    return request.param


@pytest.fixture(params=[(1, 1, 1, 1), (2, 1, 2, 2), (1, 2, 2, 2)], ids=str)
def mesh(request):
    data, fsdp, context, tensor = request.param
    return mesh_of(data, fsdp, tensor, context)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def assert_same(mesh, function, formula, arrays, specs) -> None:
    """Value and gradient for a random direction: `function` on the mesh, `formula` on one device."""
    direction = normal(*jax.eval_shape(formula, *arrays).shape, seed=9)

    def both(f):
        def value(*arrays):
            y = f(*arrays)
            return jnp.sum(y * direction), y

        return jax.jit(jax.value_and_grad(value, argnums=tuple(range(len(arrays))), has_aux=True))

    (_, expected), expected_gradient = both(formula)(*arrays)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)]
        (_, found), gradient = both(function)(*placed)
    assert_close(found, expected)
    assert_close(gradient, expected_gradient)
    assert [g.sharding.spec for g in gradient] == [x.sharding.spec for x in placed]


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize(
    ("outputs", "spec"),
    [((20,), ("tensor",)), ((4,), ("tensor",)), ((H, K), ("tensor", None)), ((1, K), (None, None))],
    ids=["wide", "narrow", "heads", "one head for all"],
)
def test_project(way, mesh, outputs, spec, time):
    arrays = normal(B, T, 8), normal(8, *outputs)
    specs = P(BATCH, time, None), P(WIDTH, *spec)
    assert_same(mesh, lambda x, w: kernels.project(x, w)[0], lambda x, w: jnp.tensordot(x, w, 1), arrays, specs)


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_one_projection_by_several_matrices(way, mesh, time):
    arrays = normal(B, T, 8), normal(8, 20), normal(8, H, K), normal(8, 1, K)
    specs = P(BATCH, time, None), P(WIDTH, "tensor"), P(WIDTH, "tensor", None), P(WIDTH, None, None)

    def joined(products):
        return jnp.concatenate([jax.sharding.reshard(y, P(*(None,) * y.ndim)).reshape(B, T, -1) for y in products], -1)

    def function(x, *ws):
        return joined(kernels.project(x, *ws))

    def formula(x, *ws):
        return jnp.concatenate([jnp.tensordot(x, w, 1).reshape(B, T, -1) for w in ws], -1)

    assert_same(mesh, function, formula, arrays, specs)


@pytest.mark.parametrize("time", [None, ("context",)], ids=["whole", "split"])
@pytest.mark.parametrize("inner", [(H, K), (20,), (4,)], ids=["heads", "wide", "narrow"])
def test_contract(way, mesh, inner, time):
    arrays, rest = (normal(B, T, *inner), normal(*inner, 8)), (None,) * (len(inner) - 1)
    specs = P(BATCH, time, "tensor", *rest), P("tensor", *rest, WIDTH)
    assert_same(mesh, kernels.contract, lambda x, w: jnp.tensordot(x, w, len(inner)), arrays, specs)


@pytest.mark.parametrize("time", [None, ("context",)], ids=["whole", "split"])
def test_lookup(mesh, time):
    tokens = np.random.default_rng(0).integers(0, 6, (B, T)).astype(np.int32)

    def function(table):
        return kernels.lookup(table, jax.device_put(tokens, NamedSharding(mesh, P(BATCH, time))), jnp.float32)

    assert_same(mesh, function, lambda table: table[tokens], (normal(6, 8),), (P("tensor", WIDTH),))


def test_the_gradient_of_a_lookup_is_summed_in_float32():
    with jax.set_mesh(mesh_of()):
        tokens = jnp.zeros((1, 1024), jnp.int32, out_sharding=P(BATCH, "context"))
        table = jax.device_put(jnp.ones((2, 1)), NamedSharding(mesh_of(), P("tensor", WIDTH)))
        gradient = jax.grad(lambda w: jnp.sum(kernels.lookup(w, tokens, jnp.bfloat16).astype(jnp.float32)))(table)
    assert gradient[0, 0] == 1024.0  # ones summed in bfloat16 stop at 256


def softmax_attention(seen_BTS, softcap):
    """Grouped attention as written in a textbook: q [B, T, H, K], k and v [B, G, S, K]."""

    def formula(q, k, v):
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[1], axis=1) for x in (k, v))
        scores = jnp.einsum("bthk,bhsk->bhts", q, k)
        scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
        exp = jnp.where(seen_BTS[:, None], jnp.exp(scores), 0.0)
        return jnp.einsum("bhts,bhsk->bthk", exp / exp.sum(-1, keepdims=True), v)

    return formula


@pytest.mark.parametrize(("groups", "softcap"), [(4, None), (2, None), (1, None), (2, 1.5)])
def test_attention(way, mesh, groups, softcap):
    segments = np.array(
        [[1, 1, 1, 1, 2, 2, 2, 2], [0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [3, 3, 3, 3, 3, 3, 3, 4]], np.int32
    )
    behind = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = (behind >= 0) & (behind < 4) & (segments[:, :, None] == segments[:, None, :])

    def function(q, k, v):
        rows = jax.device_put(segments, NamedSharding(mesh, P(BATCH, None)))
        return attend(q, k, v, rows, rows, window=4, softcap=softcap)

    shared = None if groups == 1 else "tensor"
    keys = P(BATCH, shared, None, None)
    arrays = normal(B, T, H, K), normal(B, groups, T, K), normal(B, groups, T, K, seed=1)
    specs = P(BATCH, None, "tensor", None), keys, keys
    assert_same(mesh, function, softmax_attention(seen, softcap), arrays, specs)


@pytest.mark.parametrize(
    ("name", "formula"),
    {
        "gelu": lambda x: x * jax.scipy.stats.norm.cdf(x),
        "gelu_tanh": lambda x: 0.5 * x * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
        "relu": lambda x: jnp.maximum(x, 0.0),
        "swiglu": lambda x: x / (1 + jnp.exp(-x)),
        "geglu": lambda x: 0.5 * x * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))),
    }.items(),
    ids=str,
)
def test_activations(way, name, formula):
    assert_same(mesh_of(2, 2, 2), ACTIVATIONS[name], formula, (normal(B, T, 8),), (P(BATCH, None, "tensor"),))


def test_a_query_that_sees_nothing_gives_numbers(way):
    q, k, v = normal(1, 1, 1, 2, K), normal(1, 1, 3, K), normal(1, 1, 3, K)
    out = kernels.attention(q, k, v, jnp.zeros((1, 2, 3), bool))
    np.testing.assert_allclose(out[0, 0, 0], np.tile(v[0, 0].mean(0), (2, 1)), rtol=1e-5)


def test_large_scores_stay_finite(way):
    q, k, v = 1e4 * normal(1, 1, 1, 4, K), normal(1, 1, 4, K), normal(1, 1, 4, K)
    seen = jnp.tril(jnp.ones((1, 4, 4), bool))
    value, gradient = jax.value_and_grad(lambda q: jnp.sum(kernels.attention(q, k, v, seen)))(q)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_product_asked_for_in_float32_is_summed_in_float32(way):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.ones((1, 1, 3), jnp.bfloat16), NamedSharding(mesh, ROWS))
        w = jnp.asarray([[256.0], [1.0], [2**-7]], jnp.bfloat16)
        y, pull = jax.vjp(lambda x, w: kernels.project(x, w, dtype=jnp.float32)[0], x, w)
        dx, dw = pull(jnp.ones_like(y))
    assert y.dtype == jnp.float32
    assert float(y[0, 0, 0]) == 257.0078125
    assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16)
