"""The accuracy of a reward model, on a case counted by hand."""

import numpy as np
import pytest

from jaxgpt.data.rankings import Ranking, RankingRows
from jaxgpt.evaluate.rewards import reward_accuracy


class Counting:
    """A model that scores a response by its last token."""

    def score_tokens(self, tokens):
        return np.array([float(row[-1]) for row in tokens])


def ranking(*scored: tuple[int, int]) -> Ranking:
    """Responses as (score, rank), of different lengths."""
    ids = tuple(np.array([9] * n + [score], np.int32) for n, (score, _) in enumerate(scored))
    return Ranking("x.jsonl:1", "prompt", ids, ids, tuple(rank for _, rank in scored), None)


def test_pairs_are_counted_as_by_hand():
    rows = RankingRows(
        [
            ranking((5, 1), (3, 2), (4, 3)),  # right by 2, right by 1, wrong by 1
            ranking((1, 2), (1, 1)),  # equal scores: half
            ranking((9, 1), (2, 1), (2, 2)),  # equal ranks make no pair: right by 7, and half
        ],
        context=8,
        responses=4,
    )
    found = reward_accuracy(Counting(), rows, ["a", "b", "a"], batch=2)
    assert found["pairs"] == 6
    assert found["accuracy"] == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 0.5) / 6)
    assert found["by_kind"] == {"a": pytest.approx(3.5 / 5), "b": 0.5}
    assert found["by_margin"] == [
        {"low": 0.0, "high": 0.5, "pairs": 2, "accuracy": 0.5},
        {"low": 1.0, "high": 2.0, "pairs": 2, "accuracy": 0.5},
        {"low": 2.0, "high": 4.0, "pairs": 1, "accuracy": 1.0},
        {"low": 4.0, "high": None, "pairs": 1, "accuracy": 1.0},
    ]
