"""How problems are answered: worked out in small steps, at once, or carelessly."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from jaxgpt.data.arithmetic.problems import Operation, Problem


def steps(problem: Problem) -> list[Operation]:
    """The calculations of a worked solution: one number after the other is taken apart into tens and ones."""
    return [step for operation in problem.operations for step in _taken_apart(operation)]


def worked(problem: Problem) -> str:
    """The steps, a line each, and the answer as GSM8K has it."""
    return "\n".join([*(_line(step, step.result) for step in steps(problem)), at_once(problem)])


def at_once(problem: Problem) -> str:
    """The answer alone."""
    return f"#### {problem.answer}"


def careless(rng: Random, problem: Problem) -> str:
    """A worked solution gone wrong: it stops before its end, or ends with another number, or has a slip in it."""
    lines, how = [_line(step, step.result) for step in steps(problem)], rng.randrange(3)
    if how == 0:
        return "\n".join(lines[:-1])
    if how == 1:
        left, result = lines[-1].split("=")
        return "\n".join([*lines[:-1], f"{result}={left}"])
    return _with_slip(rng, problem)


def _with_slip(rng: Random, problem: Problem) -> str:
    """One result is wrong by 1 or 10, and the later steps go on with it."""
    right = steps(problem)
    slip, off = rng.randrange(len(right)), rng.choice((-10, -1, 1, 10))
    lines, result, before, after = [], 0, None, None
    for number, step in enumerate(right):
        if step.a == before:
            step = step._replace(a=after)
        elif step.b == before:
            step = step._replace(b=after)
        result = step.result
        if number == slip:
            result += off
        if number >= slip:
            before, after = right[number].result, result
        lines.append(_line(step, result))
    return "\n".join([*lines, f"#### {result}"])


def _taken_apart(operation: Operation) -> Iterator[Operation]:
    a, sign, b = operation
    tens, ones = b - b % 10, b % 10
    if tens == 0 or ones == 0:
        yield operation
    elif sign == "*":
        yield (first := Operation(a, sign, tens))
        yield (second := Operation(a, sign, ones))
        yield Operation(first.result, "+", second.result)
    else:
        yield (first := Operation(a, sign, tens))
        yield Operation(first.result, sign, ones)


def _line(step: Operation, result: int) -> str:
    return f"{step.a}{step.sign}{step.b}={result}"
