"""Shares, their intervals and ratings: against counting, published figures, and each other."""

import itertools
import math

import numpy as np
import pytest

from jaxgpt.evaluate.formulas import (
    bradley_terry,
    length_controlled,
    mean_and_error,
    pass_at_k,
    rating_intervals,
    wilson,
)

WIKIPEDIA = {"A": {"B": 2, "D": 1}, "B": {"A": 3, "C": 5}, "C": {"B": 3, "D": 1}, "D": {"A": 4, "C": 3}}
"""Who beat whom how often, in the article on the Bradley-Terry model."""


def votes_of(wins: dict[str, dict[str, int]]) -> list[tuple[str, str, float]]:
    return [(a, b, 1.0) for a, beaten in wins.items() for b, count in beaten.items() for _ in range(count)]


@pytest.mark.parametrize(
    ("n", "right", "k", "chance"),
    [(1, 0, 1, 0.0), (1, 1, 1, 1.0), (10, 3, 1, 0.3), (10, 3, 5, 1 - 21 / 252), (5, 1, 5, 1.0), (200, 1, 100, 0.5)],
)
def test_pass_at_k_of_small_counts(n, right, k, chance):
    assert pass_at_k(n, right, k) == pytest.approx(chance, abs=1e-12)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(k):
    for right in range(7):
        answers = [i < right for i in range(6)]
        subsets = [any(subset) for subset in itertools.combinations(answers, k)]
        assert pass_at_k(6, right, k) == pytest.approx(np.mean(subsets), abs=1e-12)
    np.testing.assert_allclose(pass_at_k(6, np.array([[0, 6], [1, 2]]), 1), [[0, 1], [1 / 6, 1 / 3]])


@pytest.mark.parametrize(
    ("n", "right", "k", "said"),
    [(3, 1, 4, "k is 4, expected 1 to 3"), (3, 1, 0, "k is 0"), (3, 4, 1, "4 to 4 of 3 samples are right")],
)
def test_pass_at_k_of_counts_that_cannot_be_is_refused(n, right, k, said):
    with pytest.raises(ValueError, match=said):
        pass_at_k(n, right, k)


@pytest.mark.parametrize(
    ("wins", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_intervals_of_newcombe_1998(wins, n, low, high):
    assert wilson(wins / n, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_covers_a_share_as_often_as_it_says_and_ties_make_it_safer():
    rng = np.random.default_rng(0)
    whole = rng.binomial(60, 0.6, size=4000) / 60
    halves = rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.2, 0.5], size=(4000, 60)).mean(axis=1)
    covered = [
        np.mean([low <= 0.6 <= high for low, high in (wilson(s, 60) for s in drawn)]) for drawn in (whole, halves)
    ]
    assert 0.93 < covered[0] < 0.97 and covered[1] > covered[0]


def test_the_error_of_a_mean():
    assert mean_and_error(np.array([1.0, 2.0, 3.0, 6.0])) == pytest.approx((3.0, math.sqrt(14 / 3 / 4)))
    assert mean_and_error(np.array([2.0]))[0] == 2.0 and math.isnan(mean_and_error(np.array([2.0]))[1])


def test_length_controlled_takes_out_what_length_alone_won():
    rng = np.random.default_rng(1)
    longer = rng.normal(30.0, 50.0, size=20_000)
    odds = 0.4 + 1.5 * np.tanh(longer / longer.std())
    outcomes = (rng.random(20_000) < 1 / (1 + np.exp(-odds))).astype(float)
    assert np.mean(outcomes) > 0.66
    assert length_controlled(outcomes, longer) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.015)


def test_length_controlled_is_the_win_rate_where_length_does_not_differ():
    outcomes = np.array([1.0, 1.0, 0.5, 0.0] * 25)
    assert length_controlled(outcomes, np.full(100, 7.0)) == pytest.approx(outcomes.mean(), abs=1e-3)
    assert length_controlled(1 - outcomes, np.zeros(100)) == pytest.approx(1 - outcomes.mean(), abs=1e-3)


def test_length_controlled_is_finite_where_one_model_always_wins():
    longer = np.random.default_rng(2).normal(size=40)
    assert 0.9 < length_controlled(np.ones(40), longer) < 1.0
    assert length_controlled((longer > 0).astype(float), longer) == pytest.approx(0.5, abs=0.2)


def test_bradley_terry_of_the_published_example():
    found = bradley_terry(votes_of(WIKIPEDIA))
    strengths = {name: 10 ** ((rating - 1000) / 400) for name, rating in found.items()}
    assert strengths == pytest.approx({"A": 0.640, "B": 1.043, "C": 0.660, "D": 2.270}, abs=5e-4)
    assert list(found) == ["D", "B", "C", "A"]
    assert np.mean(list(found.values())) == pytest.approx(1000)


def test_the_ratings_of_two_are_the_log_of_their_odds_and_a_tie_is_half_a_win():
    decided = [("x", "y", 1.0)] * 6 + [("x", "y", 0.0)] * 2
    found = bradley_terry(decided)
    assert found["x"] - found["y"] == pytest.approx(400 * math.log10(3))
    tied = [("x", "y", 1.0)] * 5 + [("x", "y", 0.0)] + [("y", "x", 0.5)] * 2
    assert bradley_terry(tied) == pytest.approx(found)


def test_at_the_ratings_every_model_wins_as_often_as_it_should():
    rng = np.random.default_rng(3)
    truth = {"a": 1300.0, "b": 1000.0, "c": 950.0, "d": 750.0}
    votes = []
    for _ in range(3000):
        one, other = rng.choice(list(truth), size=2, replace=False)
        chance = 1 / (1 + 10 ** ((truth[other] - truth[one]) / 400))
        votes.append((str(one), str(other), float(rng.choice([0.0, 1.0], p=[1 - chance, chance]))))
    found = bradley_terry(votes)
    assert found == pytest.approx(truth, abs=30)
    for name in truth:
        won = sum(outcome if a == name else 1 - outcome for a, b, outcome in votes if name in (a, b))
        mine = [(a, b) if a == name else (b, a) for a, b, _ in votes if name in (a, b)]
        assert won == pytest.approx(sum(1 / (1 + 10 ** ((found[b] - found[a]) / 400)) for a, b in mine), abs=1e-4)
    intervals = rating_intervals(votes, resamples=200)
    assert all(low < found[name] < high and high - low < 60 for name, (low, high) in intervals.items())


def test_the_interval_of_two_is_that_of_their_odds():
    votes = [("x", "y", 1.0)] * 300 + [("x", "y", 0.0)] * 100
    low, high = rating_intervals(votes, resamples=2000)["x"]
    error = 400 / math.log(10) / 2 / math.sqrt(400 * 0.75 * 0.25)  # half the difference of the two is x's
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert rating_intervals(votes, resamples=50) == rating_intervals(votes, resamples=50)


@pytest.mark.parametrize(
    "votes",
    [
        [("x", "y", 1.0), ("x", "z", 1.0), ("y", "z", 1.0), ("z", "y", 1.0)],  # x never lost
        [("x", "y", 0.5), ("z", "w", 0.5)],  # two pairs that never met
    ],
)
def test_ratings_that_no_finite_number_is_are_refused(votes):
    with pytest.raises(ValueError, match="no finite ratings"):
        bradley_terry(votes)
