"""The arithmetic world's text: numbers counted, problems stated with their answers, and problems worked out."""

from __future__ import annotations

from random import Random

from jaxgpt.data.arithmetic.problems import KINDS, Problem, draw_problem
from jaxgpt.data.arithmetic.solutions import at_once, worked


def document(rng: Random) -> str:
    """A page of a few lines; no held-out problem is stated or asked for."""
    kind = rng.random()
    if kind < 0.1:
        return _counting(rng)
    if kind < 0.4:
        return " ".join(_stated(problem) for problem in _problems(rng, 3))
    return "\n".join(f"Question: {one.prompt}\nAnswer: {worked(one)}" for one in _problems(rng, 2))


def _counting(rng: Random) -> str:
    first, by = rng.randrange(150), rng.choice((1, 1, 2, 5, 10))
    return ", ".join(str(first + by * number) for number in range(rng.randint(6, 12)))


def _stated(problem: Problem) -> str:
    if problem.kind == "stories":
        return f"{problem.prompt} {at_once(problem)}"
    return f"{problem.operations[0]} = {problem.answer}."


def _problems(rng: Random, count: int) -> list[Problem]:
    kinds = rng.choices(list(KINDS), list(KINDS.values()), k=count)
    return [draw_problem(rng, kind, held_out=False) for kind in kinds]
