"""What is said of answers is what a direct count says."""

import numpy as np
import pytest
from tiny_run import make_run

from jaxgpt.api import Generation, load
from jaxgpt.config.schema import ExactReward, NumberReward
from jaxgpt.evaluate.answers import (
    Answers,
    answer,
    asked_by_kind,
    exact_by_kind,
    few_shot_prompt,
    gold_scores,
    kl_from,
    mean_by_kind,
    rewards,
    win_rate,
)
from jaxgpt.graders import grader


def said(*texts: str) -> list[Generation]:
    return [Generation(text, [5], np.zeros(1, np.float32), True) for text in texts]


def test_exact_match_is_by_kind_and_leaves_out_what_has_no_answer():
    records = [
        {"answer": "a fox", "kind": "fact"},
        {"answer": "an owl ", "kind": "fact"},
        {"answer": 7, "kind": "sum"},
        {"kind": "story"},
        {"answer": None, "kind": "story"},
        {"answer": "yes"},
    ]
    responses = said(" a fox\n", "An owl", "7", "x", "y", "yes.")
    exact = grader(ExactReward(), "evaluate.grade")
    assert exact_by_kind(records, responses, exact) == {"all": 0.0, "fact": 0.5, "sum": 1.0}
    assert asked_by_kind(records) == {"all": 1, "fact": 2, "sum": 1}
    assert exact_by_kind([{"kind": "story"}], said("x"), exact) == asked_by_kind([{"kind": "story"}]) == {}
    with pytest.raises(ValueError, match="zip"):
        exact_by_kind(records, responses[:-1], exact)


def test_an_answer_may_be_a_number_however_it_is_written():
    records = [{"answer": "1,200", "kind": "sum"}, {"answer": 7, "kind": "sum"}, {"answer": None}]
    number = grader(NumberReward(), "evaluate.grade")
    assert exact_by_kind(records, said("600 * 2\n#### 1200.", "#### 8, not 7", "x"), number) == {"sum": 0.5}


def test_means_are_by_kind():
    records = [{"kind": "b"}, {"kind": "a"}, {"kind": "b"}]
    assert mean_by_kind(records, np.array([1.0, 5.0, 2.0])) == {"a": 5.0, "b": 1.5}
    found = gold_scores(lambda record, text: len(text) + ord(record["kind"]), records, said("x", "xx", "xxx"))
    assert found.tolist() == [99, 99, 101]


def test_ties_are_half_a_win():
    assert win_rate(np.array([1.0, 2.0, 3.0, 0.0]), np.array([0.0, 2.0, 4.0, 0.0])) == 0.5
    assert win_rate(np.array([1.0, 2.0]), np.array([0.0, 2.0])) == 0.75


def test_the_base_model_is_asked_in_the_form_of_a_document():
    asked = few_shot_prompt([("1 + 1?", "2"), ("2 + 2?", "4")], "3 + 3?")
    assert asked == "Question: 1 + 1? Answer: 2\nQuestion: 2 + 2? Answer: 4\nQuestion: 3 + 3? Answer:"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def policy(run):
    return load(run / "sft")


@pytest.fixture(scope="module")
def prompts(policy):
    return [policy.chat_tokens([{"role": "user", "content": text}]) for text in ("cat?", "the dog met", "a", "What?")]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_kl_is_the_sum_over_a_response_and_the_mean_over_responses(run, policy, prompts):
    other, temperature = load(run / "pretrain"), 0.8
    answers = answer(policy, prompts, 6, temperature, batch=4, seed=3)
    total = 0.0
    for prompt, response in zip(*answers, strict=True):
        row = [*prompt, *response.tokens]
        ours, theirs = (log_softmax(model.logits([row])[0] / temperature) for model in (policy, other))
        for at in range(len(prompt), len(row)):
            total += ours[at - 1, row[at]] - theirs[at - 1, row[at]]
    assert kl_from(other, answers, temperature, batch=3) == pytest.approx(total / len(prompts), rel=1e-3)
    assert abs(total) > 0.1
    assert kl_from(policy, answers, temperature, batch=4) == pytest.approx(0, abs=1e-4)


def test_greedy_answers_do_not_depend_on_the_batch(policy, prompts):
    one, other = (answer(policy, prompts, 5, 0.0, batch, seed=0) for batch in (4, 3))
    assert [r.tokens for r in one.responses] == [r.tokens for r in other.responses]
    assert one.prompts == [list(prompt) for prompt in prompts]


def test_the_reward_is_of_the_very_tokens_that_were_sampled(run, policy, prompts):
    model = load(run / "reward")
    responses = [Generation("", [7, 8, 9][:length], np.zeros(length), True) for length in (1, 2, 3, 2)]
    answers = Answers([list(prompt) for prompt in prompts], responses)
    found = rewards(model, answers, batch=3)
    rows = [prompt + response.tokens for prompt, response in zip(*answers, strict=True)]
    np.testing.assert_allclose(found, [model.score_tokens([row])[0] for row in rows], atol=1e-5)
