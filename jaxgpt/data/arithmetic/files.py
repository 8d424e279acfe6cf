"""The records of the arithmetic world's files."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from jaxgpt.config.schema import ArithmeticConfig
from jaxgpt.data.arithmetic.documents import document
from jaxgpt.data.arithmetic.problems import Problem, sample_problems
from jaxgpt.data.arithmetic.solutions import at_once, careless, worked

VERSION = 1
"""Raised whenever the same config would give other files."""
FILES = (
    "text.jsonl",
    "instructions.jsonl",
    "instructions_eval.jsonl",
    "prompts.jsonl",
    "prompts_eval.jsonl",
)

Json = dict[str, Any]


def records(config: ArithmeticConfig) -> dict[str, Iterable[Json]]:
    """Every file's records, each file from random numbers of its own."""

    def sampled(name: str, count: int, held_out: bool) -> tuple[Random, list[Problem]]:
        rng = Random(f"{config.seed}/{name}")
        return rng, sample_problems(rng, count, held_out)

    rng, asked = sampled("instructions", config.instructions, False)
    pages = Random(f"{config.seed}/text")
    held_out = sampled("held_out", config.held_out, True)[1]
    return {
        "text.jsonl": ({"text": document(pages)} for _ in range(config.documents)),
        "instructions.jsonl": [_talk(problem, _demonstration(rng, problem, config)) for problem in asked],
        "instructions_eval.jsonl": [_talk(problem, worked(problem)) for problem in held_out],
        "prompts.jsonl": [problem.record() for problem in sampled("prompts", config.prompts, False)[1]],
        "prompts_eval.jsonl": [problem.record() for problem in held_out],
    }


def _demonstration(rng: Random, problem: Problem, config: ArithmeticConfig) -> str:
    quick = config.at_once / 2 if problem.kind == "stories" else config.at_once
    style = rng.random()
    if style < quick:
        return at_once(problem)
    return careless(rng, problem) if style < quick + config.careless else worked(problem)


def _talk(problem: Problem, response: str) -> Json:
    return {
        "messages": [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": response}],
        "kind": problem.kind,
    }
