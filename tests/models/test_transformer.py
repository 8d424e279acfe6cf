"""The whole model against its formulas, and what may not change its result."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_reference as reference
from tiny_models import VOCAB, assert_close, drawn, exact, logits, loss_and_gradient, mesh_of, mixed, place, rows, tiny

from jaxgpt.config.schema import ModelConfig
from jaxgpt.models import kernels
from jaxgpt.models.heads import language_model

LEARNED, NONE = {"type": "learned"}, {"type": "none"}
BIASED = {"type": "layernorm", "bias": True, "eps": 1e-5}
LLAMA3 = {"type": "llama3", "factor": 4.0, "original_context": 32}

FAMILIES = {
    "gpt2": tiny(
        norm=BIASED,
        positions=LEARNED,
        attention={"qkv_bias": True, "out_bias": True},
        mlp={"type": "gelu_tanh", "bias": True},
    ),
    "gpt3": tiny(norm=BIASED, positions=LEARNED, attention={"windows": (None, 3)}, mlp={"type": "gelu"}),
    "llama": tiny(attention={"kv_heads": 2}, tied=False),
    "llama31": tiny(
        positions={"type": "rope", "base": 500.0, "scaling": LLAMA3},
        attention={"heads": 2, "kv_heads": 1, "head_dim": 12},
        tied=False,
    ),
    "long_llama": tiny(positions={"type": "rope", "scaling": {"type": "linear", "factor": 3.0}}),
    "palm": tiny(
        norm={"type": "layernorm"},
        positions={"type": "rope", "pairing": "interleaved"},
        attention={"kv_heads": 1},
        residual="parallel",
        embedding_scale=4.0,
        logit_scale=0.25,
    ),
    "gpt_neox": tiny(
        norm=BIASED,
        positions={"type": "rope", "fraction": 0.5},
        attention={"heads": 2, "qkv_bias": True, "out_bias": True},
        mlp={"type": "gelu", "bias": True},
        residual="parallel",
        shared_norm=False,
        tied=False,
    ),
    "gpt_j": tiny(
        norm=BIASED,
        positions={"type": "rope", "fraction": 0.5, "pairing": "interleaved", "scaling": LLAMA3},
        attention={"heads": 2},
        mlp={"type": "gelu_tanh", "bias": True},
        residual="parallel",
        tied=False,
    ),
    "gemma2": tiny(
        attention={"kv_heads": 2, "head_dim": 6, "windows": (3, None), "softcap": 2.0, "scale": 0.7},
        mlp={"type": "geglu", "width": 24},
        embedding_scale=4.0,
        logit_softcap=3.0,
    ),
    "qwen3": tiny(attention={"kv_heads": 2, "head_dim": 6, "qk_norm": True}, tied=False),
    "qk_norm_learned": tiny(positions=LEARNED, attention={"qk_norm": True, "qkv_bias": True, "windows": (4,)}),
    "bare": tiny(
        norm={"scale": False}, positions=NONE, mlp={"type": "relu", "bias": True}, attention={"out_bias": True}
    ),
    "odd": tiny(
        layers=3,
        norm={"type": "layernorm", "scale": False},
        attention={"heads": 3, "kv_heads": 3, "head_dim": 5, "windows": (None, 2)},
        mlp={"type": "geglu", "bias": True, "width": 10},
    ),
    "rms_bias": tiny(
        norm={"bias": True, "scale": False, "eps": 0.1},
        attention={"qkv_bias": True, "softcap": 1.0, "kv_heads": 1},
        mlp={"bias": True, "width": 12},
        residual="parallel",
        shared_norm=False,
    ),
}


MESHES = {
    "palm": (2, 1, 2),  # one key head for two devices
    "llama31": (1, 2, 2, 2),
    "rms_bias": (1, 2, 2),
    "llama": (1, 1, 2, 2),
    "gemma2": (1, 2, 2, 2),
    "gpt3": (2, 1, 1, 2),
    "gpt2": (1, 1, 2, 4),
    "qwen3": (1, 1, 1, 4),
    "qk_norm_learned": (1, 2, 1, 2),
}
"""Devices along data, fsdp, tensor and context; one where there is no entry."""


def objective(logits_BTV, weights_BTV):
    """A smooth number of all logits."""
    return (weights_BTV * logits_BTV).sum() + 0.1 * (logits_BTV**2).sum()


def without_effect(name: str, c: ModelConfig) -> bool:
    """Whether a parameter adds the same to all scores of a query, which softmax does not see."""
    a = c.attention
    return "k_bias" in name and c.positions.type != "rope" and not a.qk_norm and a.softcap is None


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradient_are_those_of_the_formulas(family):
    c, mesh, batch = FAMILIES[family], mesh_of(*MESHES.get(family, ())), mixed()
    weights_BTV = np.random.default_rng(1).standard_normal((2, 8, VOCAB)).astype(np.float32)

    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        net = language_model(c, VOCAB)
        params = drawn(net, mesh)

        @jax.jit
        @partial(jax.value_and_grad, has_aux=True)
        def value(params, batch):
            logits_BTV = logits(net, params, batch)
            return objective(logits_BTV, weights_BTV), logits_BTV

        (_, found_BTV), gradient = value(params, place(batch, mesh))

    assert_close(found_BTV, reference.logits(c, exact(params), *batch.values()))

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        layers = np.asarray(leaf).reshape(c.layers, -1) if "blocks" in name else np.asarray(leaf).reshape(1, -1)
        if without_effect(name, c):
            assert np.abs(layers).max() < 1e-4, name
        else:
            assert (np.abs(layers).max(axis=1) > 1e-3).all(), name

    step = drawn(net, mesh, seed=2)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, s: float(np.vdot(g, s)), exact(gradient), exact(step))))
    ahead, behind = (
        objective(
            reference.logits(c, jax.tree.map(lambda p, s, h=h: p + h * s, exact(params), exact(step)), *batch.values()),
            weights_BTV,
        )
        for h in (1e-5, -1e-5)
    )
    assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-4)


DEEP = {"layers": 4, "attention": {"windows": (None, 3), "kv_heads": 2}}


@pytest.fixture(scope="module")
def unrolled():
    return loss_and_gradient(tiny(**DEEP, scan_layers=False), mesh_of(), mixed())


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_scanned_layers_give_what_unrolled_ones_give_under_every_remat_policy(unrolled, remat):
    assert_close(loss_and_gradient(tiny(**DEEP, remat=remat), mesh_of(), mixed()), unrolled)


@pytest.mark.parametrize("by_hand", [True, False])
def test_remat_policies_recompute_nothing_then_attention_then_all_that_is_needed(monkeypatch, by_hand):
    monkeypatch.setattr(kernels, "on_cpu", lambda: by_hand)

    def products(remat: str) -> int:
        mesh = mesh_of()
        with jax.set_mesh(mesh):
            net = language_model(tiny(remat=remat, scan_layers=False, layers=1), VOCAB)
            total = jax.grad(lambda params, *batch: logits(net, params, batch).sum())
            return str(jax.make_jaxpr(total)(net.abstract, *place(rows(1, 4), mesh))).count("dot_general[")

    none, dots, full = (products(remat) for remat in ("none", "dots", "full"))
    assert dots - none == (2 if by_hand else 1)  # scores, and what is weighted by them where one rule makes both
    assert full - none == 8  # and queries, keys, values, attention's output, gate and up


def test_bfloat16_is_for_the_blocks_alone(unrolled):
    value, gradient = loss_and_gradient(tiny(**DEEP, dtype="bfloat16"), mesh_of(), mixed())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert value == pytest.approx(unrolled[0], rel=0.02)
    assert value != unrolled[0]
    assert_close(gradient, unrolled[1], 0.1)

    mesh = mesh_of()
    with jax.set_mesh(mesh):
        net = language_model(tiny(dtype="bfloat16"), VOCAB)
        batch = place(mixed(), mesh)
        assert jax.eval_shape(lambda p: net.bind(p).hidden(*batch), net.abstract).dtype == jnp.bfloat16
        assert jax.eval_shape(lambda p: logits(net, p, batch), net.abstract).dtype == jnp.float32
        assert {leaf.dtype for leaf in jax.tree.leaves(net.abstract)} == {jnp.dtype("float32")}


def document(tokens: np.ndarray, length: int, before: int = 0) -> dict[str, np.ndarray]:
    """One row holding one document with padding before and behind it; padding has tokens of its own."""
    row = {
        "tokens": np.full((1, length), 5, np.int32),
        "segments": np.zeros((1, length), np.int32),
        "positions": np.zeros((1, length), np.int32),
    }
    inside = slice(before, before + len(tokens))
    row["tokens"][0, inside], row["segments"][0, inside], row["positions"][0, inside] = tokens, 1, range(len(tokens))
    return row


def packed(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    both = [document(a, len(a)), document(b, len(b))]
    both[1]["segments"] += 1
    return {key: np.concatenate([part[key] for part in both], axis=1) for key in both[0]}


A, Z = np.arange(0, 9), np.arange(16, 23)  # documents without a common token


class Rows:
    """A model with a window in its second layer, compiled once for two rows of 16 tokens."""

    def __init__(self, positions: str):
        self.mesh = mesh_of()
        with jax.set_mesh(self.mesh):
            c = tiny(positions={"type": positions}, attention={"windows": (None, 4)})
            net = language_model(c, VOCAB)
            self.params = drawn(net, self.mesh)

        def value(params, batch, weights_BT):
            hidden_BTD = net.bind(params).hidden(*batch)
            return jnp.sum(weights_BT[..., None] * hidden_BTD**2), hidden_BTD

        self.run = jax.jit(jax.grad(value, has_aux=True))

    def __call__(self, *rows: dict[str, np.ndarray], weights_BT: np.ndarray | None = None):
        """Hidden states of both rows, and the gradient of their weighted squares with respect to the embeddings."""
        weights_BT = np.ones((2, 16), np.float32) if weights_BT is None else weights_BT
        batch = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        with jax.set_mesh(self.mesh):
            *batch, weights_BT = place(batch | {"weights": weights_BT}, self.mesh)
            gradient, hidden_BTD = self.run(self.params, tuple(batch), weights_BT)
        return np.asarray(hidden_BTD), np.asarray(gradient["backbone"]["embed_VD"])


@pytest.fixture(scope="module", params=["rope", "learned", "none"])
def model(request):
    return Rows(request.param)


def test_packed_equals_unpacked(model):
    (az, za), _ = model(packed(A, Z), packed(Z, A))
    (a, z), _ = model(document(A, 16), document(Z, 16))
    assert_close((az[:9], az[9:], za[:7], za[7:]), (a[:9], z[:7], z[:7], a[:9]))


def test_left_padded_equals_unpadded(model):
    (a, z), _ = model(document(A, 16), document(Z, 16))
    (late_a, late_z), _ = model(document(A, 16, before=7), document(Z, 16, before=3))
    assert_close((late_a[7:], late_z[3:10]), (a[:9], z[:7]))


@pytest.mark.parametrize(
    ("row", "part", "own", "other"),
    [(0, slice(0, 9), A, Z), (0, slice(9, 16), Z, A), (1, slice(0, 7), Z, A), (1, slice(7, 16), A, Z)],
    ids=["first of AZ", "last of AZ", "first of ZA", "last of ZA"],
)
def test_no_gradient_flows_between_packed_documents(model, row, part, own, other):
    weights_BT = np.zeros((2, 16), np.float32)
    weights_BT[row, part] = 1.0
    _, embed_VD = model(packed(A, Z), packed(Z, A), weights_BT=weights_BT)
    assert (np.abs(embed_VD[own]).max(axis=1) > 1e-3).all()
    assert (embed_VD[other] == 0.0).all()


def test_the_future_does_not_matter(model):
    changed = A.copy()
    changed[5] = 31
    (a, b), _ = model(document(A, 16), document(changed, 16))
    np.testing.assert_array_equal(a[:5], b[:5])
    assert (np.abs(a[5:9] - b[5:9]).max(axis=1) > 1e-3).all()
