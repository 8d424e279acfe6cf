"""Calibration: a model whose probabilities are true has no error and slope 1, and one that is too sure is found out."""

import numpy as np
import pytest

from jaxgpt.evaluate.calibration import calibration, right, slope


@pytest.fixture(scope="module")
def bradley_terry():
    """Logits of 40,000 pairs in which the better-scored response wins with probability sigmoid(difference)."""
    rng = np.random.default_rng(0)
    differences = np.diff(rng.normal(size=(40_000, 2)) * 1.5, axis=1)[:, 0]
    wins = rng.random(len(differences)) < 1 / (1 + np.exp(-differences))
    return np.where(wins, differences, -differences)


def test_true_probabilities_are_calibrated(bradley_terry):
    """Detail 33: on synthetic Bradley-Terry data the error is below 0.02 and the slope is 1 +- 0.05."""
    found = calibration(bradley_terry)
    assert found["ece"] < 0.02 and found["slope"] == pytest.approx(1, abs=0.05)
    assert sum(b["pairs"] for b in found["bins"]) == len(bradley_terry)
    for b in found["bins"]:
        assert b["low"] <= b["confidence"] <= b["high"]
        assert b["accuracy"] == pytest.approx(b["confidence"], abs=4 * np.sqrt(0.25 / b["pairs"]))


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_the_slope_tells_by_how_much_the_scores_are_too_large(bradley_terry, factor):
    wrong = calibration(bradley_terry * factor)
    assert wrong["slope"] == pytest.approx(slope(bradley_terry) / factor, rel=1e-6)
    assert wrong["ece"] > 0.05
    biased = [b["confidence"] - b["accuracy"] for b in wrong["bins"] if b["pairs"] > 500]
    assert all(np.sign(gap) == np.sign(factor - 1) for gap in biased)


def test_which_response_is_named_first_does_not_count(bradley_terry):
    """Detail 31: labels flipped, accuracy a becomes 1 - a and the confidences stay."""
    one, other = calibration(bradley_terry), calibration(-bradley_terry)
    assert right(-bradley_terry).mean() == pytest.approx(1 - right(bradley_terry).mean())
    assert [b["confidence"] for b in one["bins"]] == pytest.approx([b["confidence"] for b in other["bins"]])
    assert other["slope"] == pytest.approx(-one["slope"], rel=1e-6)


def test_the_slope_is_where_the_likelihood_is_highest(bradley_terry):
    few = bradley_terry[:300] * 2.3
    tried = np.linspace(0.05, 1.5, 20_001)
    likelihood = [-np.logaddexp(0, -s * few).sum() for s in tried[::200]]
    near = tried[::200][int(np.argmax(likelihood))]
    assert slope(few) == pytest.approx(near, abs=0.02)


def test_a_model_that_is_always_right_or_says_nothing_has_no_slope():
    assert slope(np.array([1.0, 2.0])) is None and slope(np.zeros(3)) is None
    assert calibration(np.zeros(4)) == {
        "bins": [{"low": 0.5, "high": 0.55, "pairs": 4, "confidence": 0.5, "accuracy": 0.5}],
        "ece": 0.0,
        "slope": None,
    }
    sure = calibration(np.array([800.0, -800.0, 30.0]))
    assert sure["bins"][-1]["pairs"] == 3 and sure["ece"] == pytest.approx(1 / 3)
