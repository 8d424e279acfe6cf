"""The laws of Gao et al.: known curves are found again."""

import math

import numpy as np
import pytest

from jaxgpt.evaluate.laws import Law, fit

D = np.linspace(0.0, 3.0, 13)
CURVES = {
    "bon": lambda d, alpha, beta: d * (alpha - beta * d),
    "rl": lambda d, alpha, beta: d * (alpha - beta * np.log(np.maximum(d, 1e-300))),
}


@pytest.mark.parametrize("form", CURVES)
def test_a_known_curve_is_found(form):
    found = fit(form, D, CURVES[form](D, 1.4, 0.5))
    assert (found.alpha, found.beta) == pytest.approx((1.4, 0.5), abs=1e-12) and found.r2 == pytest.approx(1.0)
    np.testing.assert_allclose(found.gain(D), CURVES[form](D, 1.4, 0.5), atol=1e-12)
    assert found.gain(0.0) == 0.0


@pytest.mark.parametrize("form", CURVES)
def test_noise_leaves_its_share_unexplained(form):
    d = np.linspace(0.01, 4.0, 4000)
    clean = CURVES[form](d, 1.0, 0.4)
    noisy = clean + np.random.default_rng(0).normal(scale=0.5 * np.std(clean), size=len(d))
    found = fit(form, d, noisy)
    assert (found.alpha, found.beta) == pytest.approx((1.0, 0.4), abs=0.03)
    assert found.r2 == pytest.approx(0.8, abs=0.02)


def test_the_peak_is_where_the_curve_is_highest():
    fine = np.linspace(0.0, 20.0, 200_001)
    for law in (Law("bon", 1.4, 0.5, 1.0), Law("rl", 0.6, 0.5, 1.0)):
        assert law.peak == pytest.approx(fine[np.argmax(law.gain(fine))], abs=1e-4)
    assert Law("rl", 0.6, 0.5, 1.0).peak == pytest.approx(math.exp(0.2))


def test_a_curve_that_only_rises_has_no_peak():
    assert Law("bon", 1.0, 0.0, 1.0).peak is None and Law("rl", 1.0, -0.1, 1.0).peak is None
    assert Law("bon", -1.0, 0.5, 1.0).peak is None and Law("rl", 1.0, 0.01, 1.0).peak is None


def test_two_numbers_need_two_distances():
    with pytest.raises(ValueError, match="a law has two numbers, and there are 1 distances above 0"):
        fit("rl", np.array([0.0, 1.0, 1.0]), np.array([0.0, 1.0, 1.1]))
