"""Responses to a task: the demonstrations to imitate, and the candidates that labellers rank."""

from __future__ import annotations

import functools
from random import Random

from jaxgpt.data.labels import ranks
from jaxgpt.data.meadow.facts import (
    ANIMALS,
    ATTRIBUTES,
    FACTS,
    OPPOSITES,
    THINGS,
    VALUES,
    article,
    opposite_statement,
    statement,
    sum_statement,
)
from jaxgpt.data.meadow.gold import gold_score
from jaxgpt.data.meadow.stories import story
from jaxgpt.data.meadow.tasks import Task, all_tasks

RUDE = "That is a bad question and you are mean."
TIE = 0.05
"""Scores closer than this are felt as equal by a labeller."""
GOLD_TIE = 0.3
"""Gold scores closer than this count as equal when models are measured."""


def demonstration(rng: Random, task: Task) -> str:
    """What a hired writer answers: right, but for stories, where half end sadly and a third miss a thing asked for."""
    if task.answer is not None:
        return task.answer
    return story(rng, task.meta["animal"], task.meta["thing"], drop=rng.choice((None,) * 4 + ("animal", "thing")))


def candidates(rng: Random, task: Task, count: int) -> list[str]:
    """`count` different responses in random order: the best, often a hard negative in the same wording, and others."""
    make_bad = _bad_story if task.kind == "stories" else _bad_answer
    chosen = [task.answer or story(rng, task.meta["animal"], task.meta["thing"], happy=True)]
    if rng.random() < 0.6:
        chosen.append(_hard_negative(rng, task))
    while len(chosen) < count:
        response = make_bad(rng, task)
        if response not in chosen:
            chosen.append(response)
    rng.shuffle(chosen)
    return chosen


def noisy_ranks(rng: Random, task: Task, responses: list[str], noise: float) -> list[int]:
    """How a labeller ranks the responses: by gold score with Gaussian noise."""
    return ranks([gold_score(task.record(), response) + rng.gauss(0, noise) for response in responses], TIE)


def gold_ranks(task: Task, responses: list[str]) -> list[int]:
    """The noiseless ranks."""
    return ranks([gold_score(task.record(), response) for response in responses], GOLD_TIE)


def _hard_negative(rng: Random, task: Task) -> str:
    """A wrong response in the wording of the right one."""
    meta = task.meta
    match task.kind:
        case "facts":
            right = FACTS[meta["animal"]][meta["attribute"]]
            wrong = rng.choice([value for value in VALUES[meta["attribute"]] if value != right])
            return statement(meta["animal"], meta["attribute"], wrong)
        case "sums":
            right = meta["a"] + meta["b"]
            near = [total for total in range(right - 3, right + 4) if total >= 0 and total != right]
            return sum_statement(meta["a"], meta["b"], rng.choice(near))
        case "opposites":
            others = [word for word in OPPOSITES if word not in (meta["word"], OPPOSITES[meta["word"]])]
            return opposite_statement(meta["word"], rng.choice(others))
        case "unknown":
            attribute = rng.choice(ATTRIBUTES)
            return statement(meta["word"], attribute, rng.choice(VALUES[attribute]))
        case "identity":
            return f"I am {article(rng.choice(ANIMALS))}."
    drop = rng.choice((None, "animal", "thing"))
    return story(rng, meta["animal"], meta["thing"], happy=drop is not None, drop=drop)


def _bad_answer(rng: Random, task: Task) -> str:
    """An answer to another question, or one that is rambling, rude or cut off."""
    words = (task.answer or "").split()
    flaw = rng.choice(("elsewhere", "elsewhere", "elsewhere", "ramble", "cut", "rude"))
    if flaw == "ramble":
        return " ".join([task.answer or "", *(_any_fact(rng) for _ in range(3))])
    if flaw == "cut":
        return " ".join(words[: rng.randrange(1, len(words))])
    return RUDE if flaw == "rude" else _elsewhere(rng, task)


def _bad_story(rng: Random, task: Task) -> str:
    """A story with a sad ending or with another animal or thing, one that is cut off, or no story at all."""
    animal, thing = task.meta["animal"], task.meta["thing"]
    flaw = rng.choice(("random", "random", "random", "both", "cut", "off"))
    if flaw == "cut":
        return story(rng, animal, thing, happy=True).rsplit(". ", 1)[0] + "."
    if flaw == "both":
        others = [other for other in ANIMALS if other != animal]
        return story(rng, rng.choice(others), thing, drop="thing")
    if flaw == "off":
        return rng.choice((_elsewhere(rng, task), f"The {animal} has {article(rng.choice(THINGS))}."))
    return story(rng, animal, thing, happy=rng.random() < 0.5, drop=rng.choice((None, "animal", "thing")))


def _elsewhere(rng: Random, task: Task) -> str:
    """The best response to some other prompt of any kind; without such examples a reward model likes it anywhere."""
    while True:
        other = rng.choice(rng.choice(_everything()))
        response = other.answer or story(rng, other.meta["animal"], other.meta["thing"], happy=True)
        if response != task.answer and (other.kind, task.kind) != ("stories", "stories"):
            return response


@functools.cache
def _everything() -> list[list[Task]]:
    return list(all_tasks(held_out=False).values())


def _any_fact(rng: Random, avoid: str | None = None) -> str:
    facts = [statement(animal, attribute) for animal in ANIMALS for attribute in ATTRIBUTES]
    return rng.choice([fact for fact in facts if fact != avoid])
