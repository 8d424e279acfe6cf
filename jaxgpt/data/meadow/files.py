"""The records of the meadow's files."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

from jaxgpt.config.schema import MeadowConfig
from jaxgpt.data.meadow.responses import candidates, demonstration, gold_ranks, noisy_ranks
from jaxgpt.data.meadow.sources import WEIGHTS, document_counts, documents
from jaxgpt.data.meadow.tasks import Task, all_tasks, sample_tasks

VERSION = 5
"""Raised whenever the same config would give other files."""
RESPONSES = 4
RATERS = 4
FILES = (
    *(f"text/{source}.jsonl" for source in WEIGHTS),
    "instructions.jsonl",
    "instructions_eval.jsonl",
    "rankings.jsonl",
    "rankings_eval.jsonl",
    "prompts.jsonl",
    "prompts_eval.jsonl",
    "prompts_exact.jsonl",
)

Json = dict[str, Any]


def records(config: MeadowConfig) -> dict[str, Iterable[Json]]:
    """Every file's records, each file from random numbers of its own."""

    def tasks(name: str, count: int, held_out: bool) -> tuple[Random, list[Task]]:
        rng = Random(f"{config.seed}/{name}")
        return rng, sample_tasks(rng, count, held_out)

    texts = {
        f"text/{source}.jsonl": [{"text": text} for text in documents(source, count, config.seed)]
        for source, count in document_counts(config.documents).items()
    }
    exact = [task for tasks in all_tasks(held_out=True).values() for task in tasks if task.answer is not None]
    return texts | {
        "instructions.jsonl": _instructions(*tasks("instructions", config.instructions, False)),
        "instructions_eval.jsonl": _instructions(*tasks("instructions_eval", config.held_out, True)),
        "rankings.jsonl": _rankings(*tasks("rankings", config.rankings, False), "p", config.noise),
        "rankings_eval.jsonl": _rankings(*tasks("rankings_eval", config.held_out, True), "e", None),
        "prompts.jsonl": [task.record() for task in tasks("prompts", config.prompts, False)[1]],
        "prompts_eval.jsonl": [task.record() for task in tasks("prompts_eval", config.held_out, True)[1]],
        "prompts_exact.jsonl": [task.record() for task in exact],
    }


def _instructions(rng: Random, tasks: list[Task]) -> list[Json]:
    return [
        {
            "messages": [
                {"role": "user", "content": task.prompt},
                {"role": "assistant", "content": demonstration(rng, task)},
            ],
            "kind": task.kind,
        }
        for task in tasks
    ]


def _rankings(rng: Random, tasks: list[Task], prefix: str, noise: float | None) -> list[Json]:
    """Ranked responses; without noise the ranks are the gold score's."""
    lines = []
    for number, task in enumerate(tasks):
        responses = candidates(rng, task, RESPONSES)
        found = gold_ranks(task, responses) if noise is None else noisy_ranks(rng, task, responses, noise)
        lines.append(
            {
                "prompt": task.prompt,
                "responses": responses,
                "ranks": found,
                "rater": "gold" if noise is None else f"r{rng.randrange(RATERS) + 1}",
                "prompt_id": f"{prefix}{number}",
                "kind": task.kind,
            }
        )
    return lines
