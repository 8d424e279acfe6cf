"""One model on any mesh: the same numbers, the same initial parameters, known shapes and shardings."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax import P
from tiny_models import VOCAB, assert_close, loss_and_gradient, mesh_of, rows, tiny

from jaxgpt.mesh import LAYOUT, check_model
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import count

MODEL = tiny(
    width=32,
    norm={"bias": True},
    attention={
        "heads": 16,
        "kv_heads": 8,
        "head_dim": 4,
        "windows": (None, 5),
        "qk_norm": True,
        "qkv_bias": True,
        "out_bias": True,
    },
    mlp={"width": 64, "bias": True},
    tied=False,
)
MESHES = [(1, 4, 2), (2, 2, 2), (1, 1, 8), (8, 1, 1)]

WIDTH = LAYOUT["width"]


@pytest.fixture(scope="module")
def batch():
    """Eight rows: half of them of two documents, the other half with padding behind."""
    batch = rows(8, 12)
    batch["segments"][:4, 7:] = 2
    batch["positions"][:4, 7:] -= 7
    batch["segments"][4:, 9:] = 0
    return batch


@pytest.fixture(scope="module")
def alone(batch):
    return loss_and_gradient(MODEL, mesh_of(), batch)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_loss_and_gradient_are_the_same_on_every_mesh(alone, batch, shape):
    mesh = mesh_of(*shape)
    check_model(mesh, MODEL, VOCAB)
    value, gradient = loss_and_gradient(MODEL, mesh, batch)
    assert value == pytest.approx(alone[0], rel=1e-6)
    assert_close(gradient, alone[1])


WIDE = tiny(
    width=64,
    layers=8,
    init_std=0.05,
    tied=False,
    norm={"bias": True},
    positions={"type": "learned"},
    mlp={"type": "relu"},
)


@pytest.fixture(scope="module")
def initial():
    """(net, initial parameters) on two meshes."""
    made = []
    for shape in [(1, 1, 1), (2, 2, 2)]:
        with jax.set_mesh(mesh_of(*shape)):
            net = language_model(WIDE, 256)
            made.append((net, jax.jit(net.init)(jax.random.key(3))))
    return made


def told(leaf) -> tuple:
    return leaf.shape, leaf.dtype, leaf.sharding.spec


def test_abstract_has_the_shapes_and_shardings_of_what_init_makes(initial):
    for net, params in initial:
        assert jax.tree.map(told, net.abstract) == jax.tree.map(told, params)


def test_the_scalar_head_lies_whole_on_every_device(mesh222):
    with jax.set_mesh(mesh222):
        net = scalar_model(tiny(width=128), VOCAB)
        head_D, bias = jax.jit(lambda key: [net.init(key)[name] for name in ("head_D", "bias")])(jax.random.key(0))
    assert told(net.abstract["head_D"]) == told(head_D) == ((128,), np.float32, P(None))
    assert told(net.abstract["bias"]) == told(bias) == ((), np.float32, P())
    assert np.std(head_D) == pytest.approx(129**-0.5, rel=0.2)
    assert float(bias) == 0.0


def test_initial_parameters_are_the_same_on_every_mesh_bit_for_bit(initial):
    (_, alone), (_, spread) = initial
    jax.tree.map(np.testing.assert_array_equal, alone, spread)


def test_parameters_lie_where_the_design_says(mesh222):
    with jax.set_mesh(mesh222):
        net = language_model(MODEL, VOCAB)
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, net.abstract)
    block = specs["backbone"]["blocks"]
    assert specs["backbone"]["embed_VD"] == specs["unembed_VD"] == P("tensor", WIDTH)
    assert block["attention"]["q_DHK"] == block["attention"]["k_DGK"] == P(None, WIDTH, "tensor", None)
    assert block["attention"]["o_HKD"] == P(None, "tensor", None, WIDTH)
    assert block["mlp"]["up_DF"] == block["mlp"]["gate_DF"] == P(None, WIDTH, "tensor")
    assert block["mlp"]["down_FD"] == P(None, "tensor", WIDTH)
    assert block["attention_norm"]["scale_D"] == P(None, None)


def test_initial_weights_have_the_deviations_of_the_config(initial):
    params = initial[0][1]
    backbone, block = params["backbone"], params["backbone"]["blocks"]
    for leaf in (backbone["embed_VD"], params["unembed_VD"], block["attention"]["q_DHK"], block["mlp"]["up_DF"]):
        assert np.std(leaf) == pytest.approx(0.05, rel=0.05)
    assert np.std(backbone["positions_TD"]) == pytest.approx(0.05, rel=0.1)
    for leaf in (block["attention"]["o_HKD"], block["mlp"]["down_FD"]):
        assert np.std(leaf) == pytest.approx(0.05 / 4, rel=0.05)  # / sqrt(2 * 8 layers)
    assert (np.asarray(block["attention_norm"]["scale_D"]) == 1.0).all()
    assert (np.asarray(block["attention_norm"]["bias_D"]) == 0.0).all()
    assert len({layer.tobytes() for layer in np.asarray(block["mlp"]["up_DF"])}) == 8  # no layer is another's copy


def test_count_is_that_of_the_formula():
    c = tiny(width=16, layers=3, attention={"heads": 4, "kv_heads": 2, "head_dim": 6}, mlp={"width": 20})
    with jax.set_mesh(mesh_of()):
        net = language_model(c, VOCAB)
    attention, mlp, norms = 16 * 6 * (4 + 2 + 2 + 4), 3 * 16 * 20, 2 * 16
    assert count(net.abstract) == VOCAB * 16 + 3 * (attention + mlp + norms) + 16
