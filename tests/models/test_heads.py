"""The scalar model: its formula, and that padding behind a text changes nothing."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import transformer_reference as reference
from tiny_models import VOCAB, assert_close, drawn, exact, mesh_of, mixed, place, rows, tiny

from jaxgpt.models.heads import scalar_model


@pytest.fixture(scope="module")
def score():
    """batch -> scores, of a model whose parameters are at `score.params`."""
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        net = scalar_model(CONFIG, VOCAB)
        params = drawn(net, mesh)
        run = jax.jit(lambda params, batch: net.bind(params)(*batch))

    def call(batch):
        with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
            return np.asarray(run(params, place(batch, mesh)))

    call.params = params
    return call


CONFIG = tiny(attention={"kv_heads": 2})


def test_scores_are_those_of_the_formula(score):
    batch = mixed()
    found = score(batch)
    assert found.dtype == np.float32
    assert_close(found, reference.scores(CONFIG, exact(score.params), *batch.values()))


@pytest.mark.parametrize("segment", [0, 1], ids=["marked as padding", "taken for text"])
def test_padding_behind_a_text_changes_no_score_before_it(score, segment):
    short = rows(3, 9)
    full = score(short)
    for pads in (1, 7):
        longer = rows(3, 9 + pads, seed=1)
        for key, value in short.items():
            longer[key][:, :9] = value
        longer["segments"][:, 9:] = segment
        np.testing.assert_allclose(score(longer)[:, :9], full, rtol=0, atol=1e-6 * np.abs(full).max())


def test_scores_are_the_same_on_every_mesh():
    found = []
    for shape in [(1, 1, 1), (2, 2, 2)]:
        mesh = mesh_of(*shape)
        with jax.set_mesh(mesh):
            net = scalar_model(CONFIG, VOCAB)
            found.append(jax.jit(lambda p, b, net=net: net.bind(p)(*b))(drawn(net, mesh), place(rows(4, 8), mesh)))
    assert_close(found[1], found[0])
