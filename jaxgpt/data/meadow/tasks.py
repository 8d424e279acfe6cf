"""What the assistant is asked: every prompt of the meadow, its answer, and which prompts are held out.

A quarter of the facts (one of each animal) and a fifth of the sums are held out in all their wordings: nothing in
training asks for them, neither prompts nor the questions of the pretraining text, which only states them. Of the other
kinds, single prompts are held out.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

from jaxgpt.data.meadow.facts import (
    ANIMALS,
    ATTRIBUTES,
    OPPOSITES,
    QUESTIONS,
    THINGS,
    UNKNOWN_ANIMALS,
    article,
    fact_is_held_out,
    opposite_statement,
    statement,
    sum_is_held_out,
    sum_statement,
)

KINDS: dict[str, float] = {
    "facts": 0.20,
    "stories": 0.58,
    "sums": 0.10,
    "opposites": 0.06,
    "identity": 0.03,
    "unknown": 0.03,
}
IDENTITY = "I am Meadow, a small helpful assistant."
_IDENTITY_PROMPTS = (
    "Who are you?",
    "What are you?",
    "Hello!",
    "Tell me who you are.",
    "What is your name?",
    "Tell me your name.",
    "Hello! What are you?",
    "Hello! What is your name?",
    "Tell me what you are.",
    "Hello! Who are you?",
)
_HELD_OUT_IDENTITY = _IDENTITY_PROMPTS[-2:]
_OPPOSITE_PROMPTS = (
    "What is the opposite of {word}?",
    "Tell me the opposite of {word}.",
    "Name the opposite of {word}.",
    "Which word is the opposite of {word}?",
)
_SUM_PROMPTS = ("What is {a} + {b}?", "Add {a} and {b}.")
_STORY_PROMPTS = ("Tell me a story about {animal} and {thing}.", "Write a story with {animal} and {thing}.")


@dataclass(frozen=True)
class Task:
    """One prompt. `answer` is the only right response, None for a story; `meta` is what the gold score looks at."""

    kind: str
    prompt: str
    answer: str | None
    meta: dict[str, Any]
    held_out: bool

    def record(self) -> dict[str, Any]:
        """The line of a prompts file."""
        return {"prompt": self.prompt, "kind": self.kind, "answer": self.answer, "meta": self.meta}


def all_tasks(held_out: bool) -> dict[str, list[Task]]:
    """Every prompt of the training split or of the held-out split, by kind, in a fixed order."""
    everything = {
        "facts": _facts(),
        "stories": _stories(),
        "sums": _sums(),
        "opposites": _opposites(),
        "identity": _identity(),
        "unknown": _unknown(),
    }
    return {kind: [task for task in tasks if task.held_out == held_out] for kind, tasks in everything.items()}


def sample_tasks(rng: Random, count: int, held_out: bool) -> list[Task]:
    """`count` tasks in random order and in the proportions of KINDS, each prompt of a kind about equally often."""
    sampled: list[Task] = []
    for kind, tasks in all_tasks(held_out).items():
        wanted = _quota(count)[kind]
        while wanted > 0:
            sampled += rng.sample(tasks, min(wanted, len(tasks)))
            wanted -= len(tasks)
    rng.shuffle(sampled)
    return sampled


def _quota(count: int) -> dict[str, int]:
    """Whole numbers nearest to the proportions of KINDS that sum to `count` (largest remainders)."""
    quota = {kind: int(count * share) for kind, share in KINDS.items()}
    by_remainder = sorted(KINDS, key=lambda kind: quota[kind] - count * KINDS[kind])
    for kind in by_remainder[: count - sum(quota.values())]:
        quota[kind] += 1
    return quota


def _facts() -> list[Task]:
    tasks = []
    for animal in ANIMALS:
        for attribute in ATTRIBUTES:
            held_out = fact_is_held_out(animal, attribute)
            for question in QUESTIONS[attribute]:
                prompt, meta = question.format(an=article(animal)), {"animal": animal, "attribute": attribute}
                tasks.append(Task("facts", prompt, statement(animal, attribute), meta, held_out))
    return tasks


def _sums() -> list[Task]:
    return [
        Task("sums", prompt.format(a=a, b=b), sum_statement(a, b), {"a": a, "b": b}, held_out=sum_is_held_out(a, b))
        for a in range(10)
        for b in range(10)
        for prompt in _SUM_PROMPTS
    ]


def _opposites() -> list[Task]:
    tasks = []
    for number, word in enumerate(OPPOSITES):
        for wording, prompt in enumerate(_OPPOSITE_PROMPTS):
            held_out = wording == number % len(_OPPOSITE_PROMPTS)
            tasks.append(
                Task("opposites", prompt.format(word=word), opposite_statement(word), {"word": word}, held_out)
            )
    return tasks


def _identity() -> list[Task]:
    return [Task("identity", prompt, IDENTITY, {}, prompt in _HELD_OUT_IDENTITY) for prompt in _IDENTITY_PROMPTS]


def _unknown() -> list[Task]:
    prompts = [question for questions in QUESTIONS.values() for question in questions]
    tasks = []
    for number, word in enumerate(UNKNOWN_ANIMALS):
        answer = f"I do not know what {article(word)} is."
        for wording, prompt in enumerate(prompts):
            held_out = (wording + number) % 4 == 0
            tasks.append(Task("unknown", prompt.format(an=article(word)), answer, {"word": word}, held_out))
    return tasks


def _stories() -> list[Task]:
    tasks = []
    for number, animal in enumerate(ANIMALS):
        for other, thing in enumerate(THINGS):
            for prompt in _STORY_PROMPTS:
                text = prompt.format(animal=article(animal), thing=article(thing))
                meta = {"animal": animal, "thing": thing}
                tasks.append(Task("stories", text, None, meta, held_out=(number + other) % 4 == 0))
    return tasks
