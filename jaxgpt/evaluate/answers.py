"""How models answer prompts: exact match by kind, gold and reward scores, length, KL from another model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgpt.api import Generation, Model
from jaxgpt.graders import Grader, Scorer

Record = dict[str, Any]


class Answers(NamedTuple):
    """A model's responses to a list of records."""

    prompts: list[list[int]]
    """Token ids of each prompt."""
    responses: list[Generation]


def answer(
    model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, temperature: float, batch: int, seed: int
) -> Answers:
    """Responses to prompts in tokens, a batch at a time; every batch is filled up so that one program serves all."""
    prompts = [list(prompt) for prompt in prompts]
    responses: list[Generation] = []
    longest = max(prompts, key=len, default=[])
    for at in range(0, len(prompts), batch):
        part = prompts[at : at + batch]
        filled = [*part, *[longest] * (batch - len(part)), longest]
        responses += model.generate(filled, max_tokens, temperature, seed + at)[: len(part)]
    return Answers(prompts, responses)


def asked_by_kind(records: Sequence[Record]) -> dict[str, int]:
    """Records with an answer, by kind."""
    return dict(sorted(Counter(kind_of(record) for record in records if record.get("answer") is not None).items()))


def exact_by_kind(records: Sequence[Record], responses: Sequence[Generation], right: Grader) -> dict[str, float]:
    """Share of responses that `right` finds so, by kind; records without an answer do not count."""
    hits: dict[str, list[float]] = defaultdict(list)
    for record, response in zip(records, responses, strict=True):
        if record.get("answer") is not None:
            hits[kind_of(record)].append(right(record, response.text, len(response.tokens)))
    return {kind: float(np.mean(found)) for kind, found in sorted(hits.items())}


def mean_by_kind(records: Sequence[Record], values: np.ndarray) -> dict[str, float]:
    """Means of one value a record, by kind."""
    groups: dict[str, list[float]] = defaultdict(list)
    for record, value in zip(records, values, strict=True):
        groups[kind_of(record)].append(float(value))
    return {kind: float(np.mean(found)) for kind, found in sorted(groups.items())}


def kind_of(record: Record) -> str:
    """What the record says it is, for figures by kind; "all" where it says nothing."""
    return str(record.get("kind", "all"))


def gold_scores(scorer: Scorer, records: Sequence[Record], responses: Sequence[Generation]) -> np.ndarray:
    """The scorer's value of every response."""
    return np.array([scorer(record, response.text) for record, response in zip(records, responses, strict=True)])


def rewards(model: Model, answers: Answers, batch: int) -> np.ndarray:
    """The reward model's score of every response, exactly the tokens that were sampled."""
    rows = [prompt + response.tokens for prompt, response in zip(*answers, strict=True)]
    return np.concatenate([model.score_tokens(rows[at : at + batch]) for at in range(0, len(rows), batch)])


def log_ratios(model: Model, answers: Answers, temperature: float, batch: int) -> list[np.ndarray]:
    """log p of each sampled token under the responses' own model minus that under another, nats, for each response."""
    found = []
    for at in range(0, len(answers.prompts), batch):
        prompts, responses = answers.prompts[at : at + batch], answers.responses[at : at + batch]
        rows = [prompt + response.tokens for prompt, response in zip(prompts, responses, strict=True)]
        logp = model.logprobs(rows, temperature or 1.0)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            other = logp[i, len(prompt) : len(prompt) + len(response.tokens)]
            found.append(np.asarray(response.logprobs - other, np.float64))
    return found


def kl_from(model: Model, answers: Answers, temperature: float, batch: int) -> float:
    """KL of the responses' model from another, nats: log-ratios summed over a response, mean over responses."""
    return float(np.mean([ratios.sum() for ratios in log_ratios(model, answers, temperature, batch)]))


def outcomes(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """1 where `ours` scores higher, 0 where it scores lower, 0.5 for a tie, [M]."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def win_rate(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Share of prompts on which `ours` scores higher; ties count half."""
    return float(np.mean(outcomes(ours, theirs)))


def few_shot_prompt(examples: Sequence[tuple[str, str]], question: str) -> str:
    """Questions and answers as a document a base model can continue."""
    shots = "".join(f"Question: {q} Answer: {a}\n" for q, a in examples)
    return f"{shots}Question: {question} Answer:"
