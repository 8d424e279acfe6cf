"""Wins, ties and losses are those of a count by hand; a verdict counts where both orders give it."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from local_judge import LocalJudge, serving
from rich.console import Console

from jaxgpt.api import Generation
from jaxgpt.errors import UserError
from jaxgpt.evaluate.answers import Answers
from jaxgpt.evaluate.formulas import wilson
from jaxgpt.evaluate.judge_server import JudgeServer
from jaxgpt.evaluate.judges import InWords, Judged, Scores
from jaxgpt.evaluate.replies import Asked, Replies
from jaxgpt.evaluate.win_rate import notes, pairs, ratings_results, win_rate_results, win_rate_table

MODEL = SimpleNamespace(folder="runs/x/sft")


def replies(*texts: str) -> Replies:
    responses = [Generation(text, [5] * (len(text) + 1), np.zeros(len(text) + 1), bool(text)) for text in texts]
    return Replies(MODEL, Answers([[1]] * len(texts), responses), list(texts))


def asked(*kinds: str, **more) -> Asked:
    records = [{"prompt": f"question {i}", "kind": kind, **more} for i, kind in enumerate(kinds)]
    return Asked(
        records, [[{"role": "user", "content": record["prompt"]}] for record in records], ["x.jsonl:1"] * len(kinds)
    )


def by_length(asked: Asked, given: Replies) -> np.ndarray:
    return given.lengths.astype(float)


def test_the_higher_score_wins_and_the_same_words_tie_whatever_they_score():
    noisy = iter([0.0, 1e-9, 2.0, 1.0, 0.5, 0.0])
    judge = Scores("noisy", "n", lambda asked, given: np.array([next(noisy) for _ in given.texts]))
    found = judge.compare(asked("a", "a", "a"), replies("same", "x", "y"), replies("same", "z", "w"))
    assert found.outcomes.tolist() == [0.5, 0.0, 1.0]
    assert found.scores[0].tolist() == [0.0, 1e-9, 2.0] and found.asked_twice is None


def compare(choose, ours: Replies, theirs: Replies, **more) -> tuple[Judged, LocalJudge]:
    with serving(LocalJudge(choose)) as judge:
        server = JudgeServer(judge.address, "m", pause=0.01)
        return InWords(server).compare(asked(*"abcdefgh"[: len(ours.texts)], **more), ours, theirs), judge


def test_each_pair_is_judged_in_both_orders():
    found, judge = compare(
        lambda asked, a, b: "A" if len(a) > len(b) else "B",
        replies("long", "x", "same"),
        replies("a", "longer", "same"),
    )
    assert found.outcomes.tolist() == [1.0, 0.0, 0.5]
    assert found.asked_twice == {"compared": 2, "flipped": 0, "unreadable": 0, "first_share": 0.5}
    assert len(judge.asked) == 4  # the same words are a tie without asking


def test_a_judge_that_always_likes_the_first_gives_ties_alone():
    found, _ = compare(lambda asked, a, b: "A", replies("a", "b"), replies("c", "d"))
    assert found.outcomes.tolist() == [0.5, 0.5]
    assert found.asked_twice == {"compared": 2, "flipped": 2, "unreadable": 0, "first_share": 1.0}


@pytest.mark.parametrize(("when_swapped", "flipped"), [("C", 1), ("no idea", 0)])
def test_a_verdict_that_only_one_order_gives_is_a_tie(when_swapped, flipped):
    found, _ = compare(lambda asked, a, b: "A" if a == "ours" else when_swapped, replies("ours"), replies("theirs"))
    assert found.outcomes.tolist() == [0.5]
    assert found.asked_twice["flipped"] == flipped and found.asked_twice["unreadable"] == 1 - flipped


def test_a_judge_may_find_both_equal():
    found, _ = compare(lambda asked, a, b: "C", replies("a"), replies("b"))
    assert found.outcomes.tolist() == [0.5] and found.asked_twice["flipped"] == 0
    assert found.asked_twice["first_share"] is None


def test_the_judge_sees_the_answer_that_the_record_has():
    _, judge = compare(lambda asked, a, b: "A", replies("a"), replies("b"), answer=7)
    assert "<known to be right>\n7\n" in judge.asked[0]["messages"][1]["content"]


def test_a_judge_without_any_verdict_is_refused():
    with pytest.raises(UserError, match=r"none of 4 replies of m at http.* has a verdict"):
        compare(lambda asked, a, b: "Well.", replies("a", "b"), replies("c", "d"))


def test_the_figures_of_a_comparison_are_counted_by_hand():
    ours, theirs = replies("aaaa", "bb", "c", "", "ee"), replies("a", "b", "ccc", "dd", "e")
    outcomes = np.array([1.0, 1.0, 0.5, 0.0, 0.0])
    questions = asked("story", "sum", "story", "sum", "sum")
    found = win_rate_results(questions, ours, theirs, Judged(outcomes, (np.arange(5.0), np.ones(5))))
    assert {key: found[key] for key in ("prompts", "wins", "ties", "losses", "win_rate")} == {
        "prompts": 5,
        "wins": 2,
        "ties": 1,
        "losses": 2,
        "win_rate": 0.5,
    }
    assert found["interval"] == wilson(0.5, 5)
    assert found["length"] == {"ours": 9 / 5, "theirs": 8 / 5}
    assert found["longer_won"] == 3 / 4  # the last one is longer and lost
    assert found["ended"] == {"ours": 0.8, "theirs": 1.0}
    assert found["scores"]["ours"] == {"mean": 2.0, "error": pytest.approx(np.sqrt(2.5 / 5))}
    assert [(kind, one["wins"], one["ties"], one["losses"]) for kind, one in found["by_kind"].items()] == [
        ("story", 1, 1, 0),
        ("sum", 1, 0, 2),
    ]
    assert found["by_kind"]["sum"]["win_rate"] == pytest.approx(1 / 3)
    lines = list(pairs(questions, ours, theirs, Judged(outcomes)))
    assert lines[0] == {"prompt": "question 0", "ours": "aaaa", "theirs": "a", "won": "ours"}
    assert [line["won"] for line in lines] == ["ours", "ours", "tie", "theirs", "theirs"]


def test_a_table_tells_of_length_and_order():
    twice = {"compared": 3, "flipped": 2, "unreadable": 1, "first_share": 0.8}
    ours, theirs = replies("aaaa", "bb", "cc"), replies("a", "b", "c")
    found = win_rate_results(asked("a", "b", "b"), ours, theirs, Judged(np.array([1.0, 0.5, 0.5]), None, twice))
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(win_rate_table("x against y", found))
    text = console.export_text()
    assert text.startswith("x against y") and "66.7%" in text and "100.0%" in text
    assert notes(found) == [
        f"length 3 characters against 1; the longer response won 100% of the decided pairs; win rate at equal length "
        f"{found['length_controlled']:.1%}",
        "asked in both orders: 2 of 3 verdicts flipped and count as ties; 80% of the verdicts are for the one shown "
        "first; 1 of the replies had none",
    ]


def test_a_model_that_says_the_same_as_itself_ties():
    given = replies("a", "bb")
    found = win_rate_results(
        asked("k", "k"), given, given, Scores("length", "l", by_length).compare(asked("k", "k"), given, given)
    )
    assert found["ties"] == 2 and found["win_rate"] == 0.5 and found["longer_won"] is None


def test_ratings_come_from_all_comparisons():
    outcomes = {
        (0, 1): np.array([1.0, 1, 1, 0]),
        (0, 2): np.array([1.0, 0.5, 1, 0.5]),
        (1, 2): np.array([0.5, 0.5, 1, 0]),
    }
    found = ratings_results(["a", "b", "c"], outcomes, seed=0)
    assert next(iter(found["ratings"])) == "a"
    assert sum(one["rating"] for one in found["ratings"].values()) == pytest.approx(3000)
    assert all(one["interval"][0] < one["rating"] < one["interval"][1] for one in found["ratings"].values())
    never = {pair: np.ones(4) for pair in outcomes}
    assert ratings_results(["a", "b", "c"], never, seed=0)["reason"].startswith("some models never lost")
