"""Labellers: ranks of scores, with noise of their own."""

import numpy as np

from jaxgpt.data.labels import noisy_rankings, ranks


def test_ranks_begin_at_one_and_equal_scores_share_theirs():
    assert ranks([0.5, 2.0, 0.5, -1.0]) == [2, 1, 2, 4]
    assert ranks([1.0, 1.04, 0.9], tie=0.05) == [1, 1, 3]


def lines(count, scores=(0.0, 1.0, 2.0)):
    return [{"prompt": f"{n}?", "responses": ["a", "b", "c"], "gold": list(scores)} for n in range(count)]


def test_without_noise_the_gold_score_ranks():
    assert noisy_rankings(lines(1), 0.0, 0) == [{"prompt": "0?", "responses": ["a", "b", "c"], "ranks": [3, 2, 1]}]


def test_equal_responses_make_no_ranking():
    assert noisy_rankings(lines(3, (1.0, 1.0, 1.0)), 0.0, 0) == []
    assert len(noisy_rankings(lines(3, (1.0, 1.0, 1.0)), 0.1, 0)) == 3


def test_labels_are_the_first_of_more_labels():
    assert noisy_rankings(lines(50), 1.0, 7)[:20] == noisy_rankings(lines(20), 1.0, 7)
    assert noisy_rankings(lines(50), 1.0, 7) != noisy_rankings(lines(50), 1.0, 8)


def test_noise_turns_pairs_as_often_as_its_deviation_says():
    """Two scores 1 apart with noise of deviation 1 each: the wrong way round with probability Phi(-1 / sqrt 2)."""
    made = noisy_rankings(lines(4000, (0.0, 1.0)), 1.0, 0)
    assert abs(np.mean([line["ranks"] == [1, 2] for line in made]) - 0.2398) < 0.02
