"""The problems of the arithmetic world, and which of them are held out.

A fifth of all problems is held out by its numbers, in every wording: nothing in training states one or asks for it.
What worked solutions are made of, calculations with round numbers or with one digit, are no problems themselves, so
every held-out problem can be worked out from what is taught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Literal, NamedTuple
from zlib import crc32

KINDS: dict[str, float] = {"sums": 0.3, "differences": 0.25, "products": 0.15, "stories": 0.3}
"""Share of each kind."""
NAMES = ("Mia", "Tom", "Ana", "Ben", "Eva", "Leo", "Ida", "Max")
THINGS = ("cups", "shells", "books", "coins", "nuts", "stamps", "apples", "pens")
_HELD_OUT = 5
"""One of so many problems is held out."""


class Operation(NamedTuple):
    """A calculation with two whole numbers."""

    a: int
    sign: Literal["+", "-", "*"]
    b: int

    @property
    def result(self) -> int:
        """What comes out."""
        return self.a + self.b if self.sign == "+" else self.a - self.b if self.sign == "-" else self.a * self.b

    def __str__(self) -> str:
        return f"{self.a} {self.sign} {self.b}"


@dataclass(frozen=True)
class Problem:
    """A question whose answer is the result of its last operation; a story's second one starts from the first's."""

    kind: str
    prompt: str
    operations: tuple[Operation, ...]

    @property
    def answer(self) -> int:
        """The number that is asked for."""
        return self.operations[-1].result

    def record(self) -> dict[str, Any]:
        """The line of a prompts file."""
        return {"prompt": self.prompt, "kind": self.kind, "answer": str(self.answer)}


def is_problem(operation: Operation) -> bool:
    """Whether an operation is a problem by itself, and no mere step: both numbers of two digits and not round, or for
    a product the second of them and a single digit before it."""
    a, sign, b = operation
    return _two_digits(b) and (a < 10 if sign == "*" else _two_digits(a))


def is_held_out(*operations: Operation) -> bool:
    """Whether a problem is one of the held-out fifth; 47 + 85 and 85 + 47 are one problem."""
    parts = [f"{a}-{b}" if sign == "-" else f"{min(a, b)}{sign}{max(a, b)}" for a, sign, b in operations]
    return crc32(" ".join(parts).encode()) % _HELD_OUT == 0


def sample_problems(rng: Random, count: int, held_out: bool) -> list[Problem]:
    """`count` problems of one split in random order, in the proportions of KINDS; held-out ones are all different."""
    sampled: list[Problem] = []
    for kind, share in KINDS.items():
        found: dict[Any, Problem] = {}
        while len(found) < round(count * share):
            problem = draw_problem(rng, kind, held_out)
            found.setdefault(problem.operations if held_out else len(found), problem)
        sampled += found.values()
    rng.shuffle(sampled)
    return sampled


def draw_problem(rng: Random, kind: str, held_out: bool) -> Problem:
    """A problem of one kind and split. A story to be trained on contains no held-out problem as a step either."""
    while True:
        problem = _DRAW[kind](rng)
        if is_held_out(*problem.operations) == held_out and (
            held_out or not any(is_problem(one) and is_held_out(one) for one in problem.operations)
        ):
            return problem


def _two_digits(number: int) -> bool:
    return 10 < number < 100 and number % 10 > 0


def _number(rng: Random, most: int = 99) -> int:
    """Two digits, not round."""
    while True:
        number = rng.randint(11, most)
        if number % 10:
            return number


def _sums(rng: Random) -> Problem:
    a, b = _number(rng), _number(rng)
    wording = rng.choice(("What is {a} + {b}?", "Add {a} and {b}.", "How much is {a} + {b}?"))
    return Problem("sums", wording.format(a=a, b=b), (Operation(a, "+", b),))


def _differences(rng: Random) -> Problem:
    b, a = sorted((_number(rng), _number(rng)))
    wording = rng.choice(("What is {a} - {b}?", "Take {b} from {a}.", "How much is {a} - {b}?"))
    return Problem("differences", wording.format(a=a, b=b), (Operation(a, "-", b),))


def _products(rng: Random) -> Problem:
    a, b = rng.randint(3, 9), _number(rng)
    wording = rng.choice(("What is {a} * {b}?", "Multiply {a} by {b}.", "How much is {a} * {b}?"))
    return Problem("products", wording.format(a=a, b=b), (Operation(a, "*", b),))


def _stories(rng: Random) -> Problem:
    (name, other), things = rng.sample(NAMES, 2), rng.choice(THINGS)
    plot = rng.randrange(4)
    if plot == 0:
        first = Operation(_number(rng, 59), "+", _number(rng, 39))
        second = Operation(first.result, "-", _number(rng, min(39, first.result - 1)))
        told = f"{name} has {first.a} {things}, finds {first.b} more and gives {second.b} away. How many are left?"
    elif plot == 1:
        first = Operation(rng.randint(3, 9), "*", rng.randint(3, 9))
        second = Operation(first.result, "+", _number(rng))
        told = f"{name} has {first.a} bags of {first.b} {things} and {second.b} more. How many {things} is that?"
    elif plot == 2:
        first = Operation(rng.randint(4, 9), "*", rng.randint(4, 9))
        second = Operation(first.result, "-", _number(rng, first.result - 1))
        told = f"{name} has {first.a} bags of {first.b} {things} and sells {second.b}. How many {things} are left?"
    else:
        first = Operation(_number(rng, 59), "+", _number(rng, 39))
        second = Operation(first.result, "+", first.a)
        told = f"{name} has {first.a} {things} and {other} has {first.b} more than {name}. How many is that together?"
    return Problem("stories", told, (first, second))


_DRAW: dict[str, Callable[[Random], Problem]] = {
    "sums": _sums,
    "differences": _differences,
    "products": _products,
    "stories": _stories,
}
