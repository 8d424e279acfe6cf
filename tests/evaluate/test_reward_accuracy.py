"""The accuracy of a reward model and the spread of its scores, on a case counted by hand."""

import numpy as np
import pytest

from jaxgpt.data.rankings import Ranking, RankingRows
from jaxgpt.evaluate.rewards import accuracy, reward_report, score_pairs


class Counting:
    """A model that scores a response by its last token."""

    def score_tokens(self, tokens):
        return np.array([float(row[-1]) for row in tokens])


def ranking(kind: str | None, *scored: tuple[int, int]) -> Ranking:
    """Responses as (score, rank), of different lengths."""
    ids = tuple(np.array([9] * n + [score], np.int32) for n, (score, _) in enumerate(scored))
    return Ranking("x.jsonl:1", "prompt", ids, ids, tuple(rank for _, rank in scored), kind)


@pytest.fixture
def pairs():
    rankings = [
        ranking("a", (5, 1), (3, 2), (4, 3)),  # right by 2, right by 1, wrong by 1; the best is on top
        ranking("b", (1, 2), (1, 1)),  # equal scores: half
        ranking("a", (9, 1), (2, 1), (2, 2)),  # equal ranks make no pair: right by 7, and half; on top
        ranking(None, (0, 1), (0, 2), (0, 3)),  # all halves; a third of being on top
    ]
    return score_pairs(Counting(), RankingRows(rankings, context=8, responses=4), batch=2)


def test_pairs_are_counted_as_by_hand(pairs):
    found = reward_report(pairs, gain=1.0)
    assert (found["pairs"], found["rankings"]) == (9, 4)
    assert found["accuracy"] == pytest.approx((1 + 1 + 0 + 0.5 + 1 + 0.5 + 1.5) / 9)
    assert found["by_kind"] == {"a": pytest.approx(3.5 / 5), "all": 0.5, "b": 0.5}
    assert found["pairs_by_kind"] == {"a": 5, "all": 3, "b": 1}
    assert found["best"] == pytest.approx((1 + 0.5 + 1 + 1 / 3) / 4)
    assert found["by_margin"] == [
        {"low": 0.0, "high": 0.5, "pairs": 5, "accuracy": 0.5},
        {"low": 1.0, "high": 2.0, "pairs": 2, "accuracy": 0.5},
        {"low": 2.0, "high": 4.0, "pairs": 1, "accuracy": 1.0},
        {"low": 4.0, "high": None, "pairs": 1, "accuracy": 1.0},
    ]


def test_the_error_counts_rankings_and_not_pairs(pairs):
    share = 3.5 / 5
    one, two = 2 - 3 * share, 1.5 - 2 * share  # right pairs of each ranking of kind a, beyond the expected
    assert accuracy(pairs, "a")["error"] == pytest.approx(np.sqrt(one**2 + two**2) / 5)
    assert accuracy(pairs, "none such") == {"accuracy": None, "error": None, "best": None, "pairs": 0, "rankings": 0}


def test_the_spread_of_better_and_other_responses_is_told(pairs):
    found = reward_report(pairs, gain=1.0)["scores"]
    chosen, rejected = [5, 5, 3, 1, 9, 2, 0, 0, 0], [3, 4, 4, 1, 2, 2, 0, 0, 0]
    assert found["chosen"]["mean"] == pytest.approx(np.mean(chosen))
    assert found["rejected"]["std"] == pytest.approx(np.std(rejected))
    assert (found["edges"][0], found["edges"][-1], len(found["edges"])) == (0.0, 9.0, 25)
    for name, scores in (("chosen", chosen), ("rejected", rejected)):
        assert sum(found[name]["counts"]) == 9
        assert found[name]["counts"][0] == scores.count(0)


def test_probabilities_are_those_of_the_scores_before_they_were_scaled(pairs):
    plain, scaled = reward_report(pairs, 1.0)["calibration"], reward_report(pairs, 4.0)["calibration"]
    assert scaled["slope"] == pytest.approx(4 * plain["slope"], rel=1e-6)
    assert max(b["confidence"] for b in scaled["bins"]) == pytest.approx(1 / (1 + np.exp(-7 / 4)))


def test_rankings_without_a_pair_have_no_report():
    rows = RankingRows([ranking("a", (1, 1), (2, 1))], context=8, responses=2)
    assert reward_report(score_pairs(Counting(), rows, 4), 1.0) == {}
