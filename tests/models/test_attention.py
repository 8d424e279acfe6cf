"""Rotary positions by their properties; windows, segments and cache slots by what a query sees."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import mesh_of
from transformer_reference import wavelength_stretch

from jaxgpt.config.schema import RopePositions, RopeScaling
from jaxgpt.mesh import put_batch
from jaxgpt.models.attention import attend, rope_frequencies, rope_tables, rotate


def turned(config: RopePositions, x: np.ndarray, position: int) -> np.ndarray:
    tables = rope_tables(config, len(x), jnp.full((1, 1), position))
    return np.asarray(rotate(jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1), tables, config.pairing))[0, 0, 0]


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_scores_depend_on_the_distance_alone(pairing, fraction):
    config = RopePositions(pairing=pairing, fraction=fraction, base=100.0)
    q, k = np.random.default_rng(0).standard_normal((2, 12))
    scores = [turned(config, q, 9 + shift) @ turned(config, k, 4 + shift) for shift in (0, 1, 100)]
    np.testing.assert_allclose(scores, scores[0], rtol=1e-4)
    assert abs(turned(config, q, 9) @ turned(config, k, 5) - scores[0]) > 1e-2
    np.testing.assert_allclose(turned(config, q, 0), q, rtol=1e-6)


def test_pairings_are_one_rotation_of_reordered_dimensions():
    x, order = np.random.default_rng(0).standard_normal(8), np.array([0, 2, 4, 6, 1, 3, 5, 7])
    half, interleaved = RopePositions(), RopePositions(pairing="interleaved")
    np.testing.assert_allclose(turned(half, x[order], 5), turned(interleaved, x, 5)[order], rtol=1e-6)


@pytest.mark.parametrize(("fraction", "head_dim", "rotated"), [(0.25, 64, 16), (0.5, 7, 2), (1.0, 5, 4), (0.0, 8, 0)])
def test_an_even_number_of_dimensions_is_rotated_and_the_others_pass(fraction, head_dim, rotated):
    config, x = RopePositions(fraction=fraction), np.random.default_rng(0).standard_normal(head_dim)
    y = turned(config, x, 3)
    assert len(rope_frequencies(config, head_dim)) == rotated // 2
    np.testing.assert_array_equal(y[rotated:], x[rotated:].astype(np.float32))
    assert (np.abs(y - x)[: rotated // 2] > 1e-5).all()


def test_llama_3_frequencies():
    scaling = RopeScaling(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
    plain = np.asarray(rope_frequencies(RopePositions(base=500_000.0), 128), np.float64)
    found = np.asarray(rope_frequencies(RopePositions(base=500_000.0, scaling=scaling), 128), np.float64)
    stretch = np.array([wavelength_stretch(scaling, 2 * np.pi / f) for f in plain])
    np.testing.assert_allclose(plain / found, stretch, rtol=1e-5)
    assert [(stretch == 1).sum(), ((stretch > 1) & (stretch < 8)).sum(), (stretch == 8).sum()] == [29, 6, 29]


def test_linear_scaling_stretches_positions():
    x = np.random.default_rng(0).standard_normal(8)
    scaled = RopePositions(scaling=RopeScaling(type="linear", factor=4.0))
    np.testing.assert_allclose(turned(scaled, x, 12), turned(RopePositions(), x, 3), rtol=1e-5)


def seen(query_segments, key_segments, first: int = 0, window: int | None = None) -> list[list[int]]:
    """Key slots each query takes from: values are unit vectors, so the result holds the weights."""
    T, S = len(query_segments), len(key_segments)
    q, k, v = np.ones((1, T, 1, S)), np.ones((1, 1, S, S)), np.eye(S)[None, None]
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        arrays = put_batch(
            {
                **{name: x.astype(np.float32) for name, x in {"q": q, "k": k, "v": v}.items()},
                "queries": np.array([query_segments], np.int32),
                "keys": np.array([key_segments], np.int32),
            },
            mesh,
        )
        out = jax.jit(attend, static_argnames="window")(*arrays.values(), first=first, window=window)
    for row in np.asarray(out)[0, :, 0]:
        np.testing.assert_allclose(row[row > 0], 1 / (row > 0).sum(), rtol=1e-6)
    return [list(np.flatnonzero(row)) for row in np.asarray(out)[0, :, 0]]


def test_a_query_sees_its_own_segment_up_to_itself():
    segments = [0, 1, 1, 2, 2]
    assert seen(segments, segments) == [[0], [1], [1, 2], [3], [3, 4]]


def test_a_window_counts_the_query_itself():
    assert seen([1] * 5, [1] * 5, window=1) == [[0], [1], [2], [3], [4]]
    assert seen([1] * 5, [1] * 5, window=3) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_new_tokens_see_the_slots_before_them():
    slots = [0, 1, 1, 1, 1, 1]  # the first slot holds padding, the last is not yet written
    assert seen([1, 1], slots, first=3) == [[1, 2, 3], [1, 2, 3, 4]]
    assert seen([1, 1], slots, first=3, window=2) == [[2, 3], [3, 4]]
