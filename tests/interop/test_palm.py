"""PaLM (arXiv 2204.02311, section 2) written out in NumPy, against ours and against the exported Cohere folder."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from peers import loaded, mesh, our_logits, their_logits

from jaxgpt.config.schema import ModelConfig
from jaxgpt.interop.families import family_for
from jaxgpt.interop.folder import write_json
from jaxgpt.interop.weights import write_weights
from jaxgpt.models.heads import language_model

WIDTH, HEADS, HEAD, FF, LAYERS, VOCAB, TIME = 24, 3, 8, 40, 2, 50, 20
PALM = ModelConfig(
    vocab=VOCAB,
    width=WIDTH,
    layers=LAYERS,
    context=64,
    attention={"heads": HEADS, "kv_heads": 1, "head_dim": HEAD},
    mlp={"type": "swiglu", "width": FF},
    norm={"type": "layernorm", "eps": 1e-6},
    positions={"type": "rope", "pairing": "interleaved"},
    residual="parallel",
    tied=True,
    logit_scale=WIDTH**-0.5,
)


def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return (x - x.mean()) / np.sqrt(x.var() + 1e-6) * scale


def rotated(x: np.ndarray, position: int) -> np.ndarray:
    """Pairs (2i, 2i + 1) as complex numbers, turned by position * 10000^(-2i / width)."""
    turned = (x[0::2] + 1j * x[1::2]) * np.exp(1j * position * 10_000.0 ** (-np.arange(0, HEAD, 2) / HEAD))
    return np.stack([turned.real, turned.imag], axis=1).reshape(HEAD)


def palm(params: dict, tokens: np.ndarray) -> np.ndarray:
    """Logits of one sequence, [T, V] float64, position by position and head by head."""
    backbone = jax.tree.map(lambda w: np.asarray(w, np.float64), params["backbone"])
    x = backbone["embed_VD"][tokens]
    for layer in range(LAYERS):
        block = jax.tree.map(lambda w, layer=layer: w[layer], backbone["blocks"])
        attention, mlp = block["attention"], block["mlp"]
        h = np.array([norm(row, block["attention_norm"]["scale_D"]) for row in x])
        keys = np.array([rotated(row @ attention["k_DGK"][:, 0], t) for t, row in enumerate(h)])
        values = h @ attention["v_DGK"][:, 0]
        added = np.zeros_like(x)
        for t, row in enumerate(h):
            for head in range(HEADS):
                scores = keys[: t + 1] @ rotated(row @ attention["q_DHK"][:, head], t) * HEAD**-0.5
                weights = np.exp(scores - scores.max())
                added[t] += (weights / weights.sum()) @ values[: t + 1] @ attention["o_HKD"][head]
            gate, up = row @ mlp["gate_DF"], row @ mlp["up_DF"]
            added[t] += (gate / (1 + np.exp(-gate)) * up) @ mlp["down_FD"]
        x = x + added
    final = np.array([norm(row, backbone["norm"]["scale_D"]) for row in x])
    return final @ backbone["embed_VD"].T * WIDTH**-0.5


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    with jax.set_mesh(mesh()):
        return jax.tree.map(
            lambda w: w + rng.normal(scale=0.2, size=w.shape).astype(np.float32),
            jax.jit(language_model(PALM, VOCAB).init)(jax.random.key(0)),
        )


def test_palm_is_what_its_paper_writes_down_here_and_in_the_exported_folder(params, tmp_path):
    tokens = np.random.default_rng(1).integers(0, VOCAB, (2, TIME))
    expected = np.array([palm(params, row) for row in tokens])
    family = family_for(PALM)
    assert family.causal == "CohereForCausalLM"
    with jax.set_mesh(mesh()):
        ours = our_logits(PALM, params, tokens)
        write_weights(tmp_path, family, PALM, params, "F32", 10**9)
    write_json(
        tmp_path / "config.json", {"architectures": [family.causal], "model_type": "cohere", **family.write(PALM)}
    )
    theirs = their_logits(loaded(tmp_path), tokens)
    scale = np.abs(expected).max()
    assert scale > 0.3
    assert np.abs(ours - expected).max() < 1e-6 * scale and np.abs(theirs - expected).max() < 1e-6 * scale
