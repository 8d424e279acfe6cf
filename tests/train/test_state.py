"""A fingerprint is of every bit and place of a tree, and of nothing else."""

import jax
import numpy as np
import pytest
from toy import mesh_of, state_on

from jaxgpt.train.state import fingerprint


def tree() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.standard_normal((5, 7)).astype(np.float32),
        "half": rng.standard_normal(12).astype(jax.numpy.bfloat16),
        "step": np.int32(7),
        "flags": np.array([True, False, False]),
    }


def test_the_mesh_does_not_matter():
    found = {fingerprint(state_on(mesh_of(*shape))) for shape in ((1, 1, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1))}
    assert len(found) == 1 and len(found.pop()) == 16


@pytest.mark.parametrize("name", ["matrix", "half", "step", "flags"])
def test_any_flipped_bit_shows(name):
    rng, original = np.random.default_rng(1), tree()
    mark, size = fingerprint(original), original[name].nbytes
    for place, bit in {(rng.integers(size), 0 if name == "flags" else rng.integers(8)) for _ in range(40)}:
        changed = np.array(original[name])
        changed.reshape(-1).view(np.uint8)[place] ^= np.uint8(1 << bit)
        assert fingerprint({**original, name: changed}) != mark


@pytest.mark.parametrize(("a", "b"), [((0, 0), (0, 1)), ((0, 0), (4, 6)), ((1, 2), (2, 1))])
def test_swapped_elements_show(a, b):
    original = tree()
    changed = {**original, "matrix": original["matrix"].copy()}
    changed["matrix"][a], changed["matrix"][b] = original["matrix"][b], original["matrix"][a]
    assert fingerprint(changed) != fingerprint(original)


def test_moved_leaves_show():
    x, y = np.arange(3.0, dtype=np.float32), np.ones(3, np.float32)
    marks = [fingerprint(t) for t in ({"a": x, "b": y}, {"a": y, "b": x}, {"a": x, "c": y}, {"a": {"b": y}, "b": x})]
    assert len(set(marks)) == 4


def test_a_sign_of_zero_and_a_nan_have_bits_too():
    marks = {fingerprint({"x": np.float32(value)}) for value in (0.0, -0.0, np.nan, np.inf)}
    assert len(marks) == 4
