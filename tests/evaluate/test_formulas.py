"""Best-of-n: its distance from one sample, and an estimate without bias of what it is worth."""

import itertools
import math

import numpy as np
import pytest

from jaxgpt.evaluate.formulas import best_of_n, bon_kl


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (16, 1.835089), (1000, 5.908755)])
def test_the_distance_of_best_of_n(n, nats):
    assert bon_kl(n) == pytest.approx(nats, abs=1e-6)


def over_all_subsets(proxy, gold, n):
    """Mean over every subset of n samples, ties chosen equally often."""
    total, subsets = 0.0, list(itertools.combinations(range(len(proxy)), n))
    for subset in subsets:
        best = max(proxy[i] for i in subset)
        total += np.mean([gold[i] for i in subset if proxy[i] == best])
    return total / len(subsets)


@pytest.mark.parametrize("n", range(1, 8))
def test_the_estimate_is_the_mean_over_all_subsets_ties_included(n):
    rng = np.random.default_rng(n)
    proxy, gold = rng.integers(0, 4, (3, 7)).astype(float), rng.normal(size=(3, 7))
    expected = [over_all_subsets(*row, n) for row in zip(proxy, gold, strict=True)]
    np.testing.assert_allclose(best_of_n(proxy, gold, n), expected, rtol=0, atol=1e-12)


def test_one_of_one_is_the_mean_and_all_of_all_the_best():
    proxy, gold = np.array([0.3, -1.0, 2.0, 0.0]), np.array([1.0, 2.0, 5.0, 8.0])
    assert best_of_n(proxy, gold, 1) == 4.0 and best_of_n(proxy, gold, 4) == 5.0


def test_the_estimate_from_many_samples_of_a_normal_score_is_the_known_mean():
    """The largest of two standard normals has mean 1 / sqrt(pi); a score that correlates with it by 0.5, half."""
    rng = np.random.default_rng(0)
    proxy = rng.normal(size=(200, 400))
    gold = 0.5 * proxy + math.sqrt(0.75) * rng.normal(size=proxy.shape)
    assert np.mean(best_of_n(proxy, proxy, 2)) == pytest.approx(math.pi**-0.5, abs=0.01)
    assert np.mean(best_of_n(proxy, gold, 2)) == pytest.approx(0.5 * math.pi**-0.5, abs=0.01)


def test_weights_of_many_samples_do_not_overflow():
    proxy = np.arange(5000.0)
    assert best_of_n(proxy, np.ones(5000), 1000) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("n", [0, 4])
def test_more_than_there_are_is_refused(n):
    with pytest.raises(ValueError, match=f"n is {n}, expected 1 to 3"):
        best_of_n(np.zeros(3), np.zeros(3), n)
