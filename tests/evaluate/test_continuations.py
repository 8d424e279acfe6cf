"""Log-probabilities of continuations are those of the whole rows, however they share, batch and spread them."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_run import CONTEXT, load_once, make_run

from jaxgpt.api import load
from jaxgpt.config.schema import MeshConfig
from jaxgpt.errors import UserError
from jaxgpt.evaluate import continuations
from jaxgpt.evaluate.continuations import Continuation, Scored, Scorer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.getbasetemp() / "continuations_run")


@pytest.fixture(scope="module")
def model(run):
    return load_once(run / "sft")


def drawn() -> list[Continuation]:
    """Random contexts and continuations; some are empty, and many share a row but for its last token."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        return rng.integers(0, 300, count).tolist()

    asked = [Continuation(tokens(rng.integers(1, 40)), tokens(rng.integers(0, 24))) for _ in range(20)]
    shared = tokens(9)
    asked += [Continuation(shared, [last]) for last in range(11)]
    return [*asked, Continuation(shared[:-2], [*shared[-2:], 5]), Continuation([1], tokens(CONTEXT))]


def expected(model, asked: list[Continuation]) -> list[Scored]:
    """From all logits of each row alone."""
    found = []
    for context, tokens in asked:
        if not tokens:
            found.append(Scored(0.0, True))
            continue
        logits = model.logits([[*context, *tokens][:-1]])[0, len(context) - 1 :].astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        likeliest = logits[:, : model.tokenizer.size].argmax(-1)
        found.append(Scored(float(logp[range(len(tokens)), tokens].sum()), bool((likeliest == tokens).all())))
    return found


def assert_same(found: list[Scored], wanted: list[Scored]) -> None:
    assert [one.greedy for one in found] == [one.greedy for one in wanted]
    np.testing.assert_allclose([one.logp for one in found], [one.logp for one in wanted], rtol=1e-5, atol=1e-5)


def test_continuations_score_as_whole_rows_do(model):
    asked = drawn()
    likeliest = int(model.logits([asked[0].context])[0, -1, : model.tokenizer.size].argmax())
    asked.append(Continuation(asked[0].context, [likeliest]))
    wanted = expected(model, asked)
    assert {one.greedy for one in wanted[:-1] if one.logp} == {False} and wanted[-1].greedy
    for batch in (1, 4, 64):
        assert_same(Scorer(model, batch)(asked), wanted)


def test_the_mesh_and_the_chunks_change_nothing(run, model, monkeypatch):
    asked = drawn()
    wanted = expected(model, asked)
    assert_same(Scorer(load(run / "sft", mesh=MeshConfig(data=2, fsdp=2, tensor=2)), 3)(asked), wanted)
    monkeypatch.setattr(continuations, "CHUNK", 24)
    assert_same(Scorer(model, 8)(asked), wanted)


def test_continuations_that_share_a_row_are_one_row(model):
    scorer = Scorer(model, 64)
    rows = list(scorer._rows([Continuation([1, 2, 3], [last]) for last in range(11)] + [Continuation([1, 2], [3, 4])]))
    assert [len(row.ends) for row in rows] == [8, 4] and {row.tokens for row in rows} == {(1, 2, 3)}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Continuation([1] * CONTEXT, [2, 3]), "continuation 0: 64 tokens and 2 to predict; .* 64 is the model's"),
        (Continuation([], [2]), "it needs a context"),
        (Continuation([1], [100_000]), "outside the vocabulary of 384"),
    ],
)
def test_what_cannot_be_scored_is_told(model, asked, said):
    with pytest.raises(UserError, match=said):
        Scorer(model, 1)([asked])


def test_a_reward_model_scores_no_text(run):
    with pytest.raises(UserError, match="holds a reward model"):
        Scorer(load_once(run / "reward"), 1)
