"""The meadow's seven text sources, named and weighted as the LLaMA mixture is (arXiv 2302.13971, table 1).

Every fact and every sum is stated; those that are held out are never asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from jaxgpt.data.meadow.facts import (
    ANIMALS,
    ATTRIBUTES,
    NAMES,
    OPPOSITES,
    QUESTIONS,
    THINGS,
    article,
    fact_is_held_out,
    opposite_statement,
    statement,
    sum_is_held_out,
    sum_statement,
)
from jaxgpt.data.meadow.stories import story

WEIGHTS: dict[str, float] = {
    "commoncrawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "wikipedia": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "stackexchange": 0.02,
}


def documents(source: str, count: int, seed: int) -> list[str]:
    """`count` documents of one source; the first ones are the same for any count."""
    rng, write = Random(f"{seed}/text/{source}"), _WRITERS[source]
    return [write(rng) for _ in range(count)]


def document_counts(total: int) -> dict[str, int]:
    """How many of `total` documents each source gets, so that its share of the words is about its weight.

    A small source gets eight documents at least; the largest gives up the difference.
    """
    words = {name: sum(len(text.split()) for text in documents(name, 1000, 0)) / 1000 for name in WEIGHTS}
    shares = {name: weight / words[name] for name, weight in WEIGHTS.items()}
    counts = {name: max(8, round(total * share / sum(shares.values()))) for name, share in shares.items()}
    counts["commoncrawl"] += total - sum(counts.values())
    return {name: max(1, count) for name, count in counts.items()}


def _commoncrawl(rng: Random) -> str:
    """A page of anything: arithmetic, stories, opposites, and mostly facts."""
    kind = rng.random()
    if kind < 0.25:
        return _sums(rng, 4)
    if kind < 0.5:
        return _books(rng)
    if kind < 0.6:
        return " ".join(opposite_statement(rng.choice(tuple(OPPOSITES))) for _ in range(3))
    animal = rng.choice(ANIMALS)
    if kind < 0.73:
        return f"{rng.choice(NAMES)} likes the {animal}. {_facts(rng, animal, 2)} {_facts(rng)}"
    if kind < 0.86:
        return f"{_facts(rng, animal, 2)} Many people like {article(animal)}."
    return f"{_answered(rng, animal)} {_facts(rng)} {_facts(rng)}"


def _c4(rng: Random) -> str:
    return _commoncrawl(rng) if rng.random() < 0.5 else _wikipedia(rng)


def _github(rng: Random) -> str:
    a, b, name = rng.randrange(10), rng.randrange(10), rng.choice(("add", "plus", "total"))
    return f"def {name}(a, b): return a + b # {name}({a}, {b}) is {a + b}"


def _wikipedia(rng: Random) -> str:
    animal = rng.choice(ANIMALS)
    return f"{animal}: {_facts(rng, animal, 4)}"


def _books(rng: Random) -> str:
    animal, thing = rng.choice(ANIMALS), rng.choice(THINGS)
    title = f"A story about {article(animal)} and {article(thing)}. " if rng.random() < 0.8 else ""
    return title + story(rng, animal, thing)


def _arxiv(rng: Random) -> str:
    return _sums(rng, 3) if rng.random() < 0.6 else opposite_statement(rng.choice(tuple(OPPOSITES)))


def _stackexchange(rng: Random) -> str:
    """One to four questions with their answers, a line each."""
    return "\n".join(_asked(rng) for _ in range(rng.randrange(1, 5)))


def _asked(rng: Random) -> str:
    if rng.random() < 0.4:
        a, b = rng.choice(_ASKED_SUMS)
        return f"Question: What is {a} + {b}? Answer: {sum_statement(a, b)}"
    return f"Question: {_answered(rng, rng.choice(ANIMALS), ' Answer: ')}"


def _answered(rng: Random, animal: str, between: str = " ") -> str:
    """A question about an animal and its answer; never for the fact that is held out."""
    attribute = rng.choice([one for one in ATTRIBUTES if not fact_is_held_out(animal, one)])
    question = rng.choice(QUESTIONS[attribute]).format(an=article(animal))
    return question + between + statement(animal, attribute)


def _facts(rng: Random, animal: str | None = None, count: int = 1) -> str:
    """`count` different facts of one animal."""
    animal = animal or rng.choice(ANIMALS)
    return " ".join(statement(animal, attribute) for attribute in rng.sample(ATTRIBUTES, count))


def _sums(rng: Random, count: int) -> str:
    """`count` sums of two digits; three fifths and more of them are told as the assistant is to tell them."""
    sentences = []
    for _ in range(count):
        a, b = rng.randrange(10), rng.randrange(10)
        others = [f"The sum of {a} and {b} is {a + b}.", f"{a} plus {b} is {a + b}."]
        if not sum_is_held_out(a, b):
            others += [f"What is {a} + {b}? {sum_statement(a, b)}", f"Add {a} and {b}. {sum_statement(a, b)}"]
        sentences.append(sum_statement(a, b) if rng.random() < 0.6 else rng.choice(others))
    return " ".join(sentences)


_ASKED_SUMS = [(a, b) for a in range(10) for b in range(10) if not sum_is_held_out(a, b)]
_WRITERS: dict[str, Callable[[Random], str]] = {
    "commoncrawl": _commoncrawl,
    "c4": _c4,
    "github": _github,
    "wikipedia": _wikipedia,
    "books": _books,
    "arxiv": _arxiv,
    "stackexchange": _stackexchange,
}
