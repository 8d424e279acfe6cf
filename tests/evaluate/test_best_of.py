"""Best-of-n and pass@k over prompts, counted by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxgpt.api import Generation
from jaxgpt.evaluate.answers import Answers
from jaxgpt.evaluate.best_of import best_of_results, best_of_table, pass_results, right_answers
from jaxgpt.evaluate.replies import Asked, Replies

PROXY = np.array([[1.0, 2.0, 3.0], [0.0, 5.0, 1.0]])
GOLD = np.array([[10.0, 30.0, 20.0], [1.0, 2.0, 6.0]])


def asked(*records: dict) -> Asked:
    return Asked(records, [[{"role": "user", "content": "?"}]] * len(records), ["x.jsonl:1"] * len(records))


def test_the_best_by_proxy_is_scored_by_the_judge():
    one, two, three = best_of_results((1, 2, 3), PROXY, GOLD, np.full((2, 3), np.nan))
    assert (one["n"], one["kl"]) == (1, 0.0) and three["kl"] == pytest.approx(np.log(3) - 2 / 3)
    assert one["proxy"] == pytest.approx(np.mean([2, 2])) and one["gold"] == pytest.approx(np.mean([20, 3]))
    # of the pairs of three the proxy takes the last, the last, the second; the second, the third, the second
    assert two["gold"] == pytest.approx(np.mean([np.mean([20, 20, 30]), np.mean([2, 6, 2])]))
    assert three["gold"] == pytest.approx(np.mean([20, 2])) and three["gold_error"] == pytest.approx(9.0)
    assert "right" not in one
    alone = best_of_results((1,), None, None, np.full((2, 3), np.nan))
    assert alone == [{"n": 1, "kl": 0.0}]


def test_what_is_right_counts_over_the_prompts_that_have_an_answer():
    right = np.array([[0.0, 1.0, 0.0], [np.nan, np.nan, np.nan], [1.0, 1.0, 0.0]])
    proxy = np.array([[1.0, 2.0, 3.0], [0.0, 5.0, 1.0], [3.0, 2.0, 1.0]])
    assert [point["right"] for point in best_of_results((1, 3), proxy, None, right)] == pytest.approx([0.5, 0.5])
    questions = asked({"kind": "sum"}, {"kind": "story"}, {})
    one, two = pass_results((1, 2), questions, right)
    assert (one["k"], one["prompts"]) == (1, 2) and one["share"] == pytest.approx(0.5)
    assert two["share"] == pytest.approx(np.mean([2 / 3, 1.0])) and two["by_kind"] == pytest.approx(
        {"sum": 2 / 3, "all": 1}
    )
    assert pass_results((1,), questions, np.full((3, 3), np.nan)) == []


@pytest.mark.parametrize(("how", "expected"), [("exact", [1, 0, np.nan]), ("number", [1, 1, np.nan])])
def test_answers_are_graded_as_the_reward_of_that_name_does(how, expected):
    questions = asked({"answer": "12"}, {"answer": "The sum is 7"}, {"answer": None})
    texts = [" 12\n", "so it is 7.0.", "12"]
    responses = [Generation(text, [1], np.zeros(1), True) for text in texts]
    found = right_answers(questions, Replies(SimpleNamespace(), Answers([[1]] * 3, responses), texts), how)
    np.testing.assert_array_equal(found, expected)


def test_the_table_has_a_line_for_each_n():
    right = np.array([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    curve = best_of_results((1, 2), PROXY, GOLD, right)
    table = best_of_table("x", curve, pass_results((1, 2), asked({}, {}), right))
    assert [column.header for column in table.columns] == [
        "n",
        "KL, at most",
        "proxy",
        "gold",
        "chosen is right",
        "pass@n",
    ]
    assert table.row_count == 2
