"""Verifiable rewards: what a response is worth that a program can check against its prompt's record.

Pure, but that a function of the user's is imported. Nothing here needs jax.
"""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

from jaxgpt.config.schema import (
    ExactReward,
    FunctionReward,
    LengthReward,
    NumberReward,
    RegexReward,
    Reward,
    Verifiable,
)
from jaxgpt.data.prompts import PromptRows
from jaxgpt.errors import UserError, nearest

Record = dict[str, Any]
"""A line of a prompts file."""
Grader = Callable[[Record, str, int], float]
"""(record, response, tokens) -> score, before the term's weight; the response has so many tokens, its end included."""
Scorer = Callable[[Record, str], float]
"""(record, response) -> score; higher is better."""

MARK = "####"
"""What stands before the answer in GSM8K."""
GRADES = {"exact": ExactReward(), "number": NumberReward()}
"""What the settings `grade` name."""
_AMOUNT = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"
_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)\]%])[-\u2212\u2013])?"  # after an operand it is a subtraction, or a range
    r"[$€£¥]?"
    rf"(?:(?:(?P<whole>[0-9]+)[ ])?(?<!/)(?P<over>{_AMOUNT})[ ]?/[ ]?(?=[0-9,.]*[1-9])(?P<under>{_AMOUNT})(?![0-9/])"
    rf"|(?P<amount>(?:{_AMOUNT})(?:[eE][-+\u2212]?[0-9]{{1,3}}(?!\w))?))"
)
_DIGITS = Context(prec=40)


def grader(term: Verifiable, setting: str) -> Grader:
    """What grades responses by `term`; `setting` is its place in the config ("ppo.rewards[0]"), for errors.

    `check_records` tells beforehand of records that an exact or number reward cannot grade. Raises UserError where a
    function cannot be imported; its grader does where the function raises, or gives what is no finite number.
    """
    match term:
        case ExactReward():
            return lambda record, response, tokens: float(response.strip() == str(record[term.field]).strip())
        case NumberReward():
            return lambda record, response, tokens: float(_same(final_number(response), record[term.field]))
        case RegexReward():
            pattern = re.compile(term.pattern)
            return lambda record, response, tokens: float(pattern.search(response) is not None)
        case LengthReward():
            return lambda record, response, tokens: -max(0.0, (tokens - term.target) / term.target)
        case FunctionReward():
            scorer = load_scorer(term.function, f"{setting}.function")
            return lambda record, response, tokens: scorer(record, response)


def check_records(terms: Iterable[Reward], rows: PromptRows, setting: str) -> None:
    """Tells before anything is trained what `terms` cannot grade; `setting` is their place ("ppo.rewards").

    Raises UserError naming file, line and key where a record has no answer that an exact or number term can use, and
    where a function cannot be imported.
    """
    for number, term in enumerate(terms):
        place = f"{setting}[{number}]"
        if isinstance(term, FunctionReward):
            load_scorer(term.function, f"{place}.function")
        elif isinstance(term, ExactReward | NumberReward):
            for where, record in zip(rows.wheres, rows.records, strict=True):
                check_record(term, place, where, record)


def check_record(term: ExactReward | NumberReward, setting: str, where: str, record: Record) -> None:
    """Raises UserError naming `where` ("file:line") and the key where a record has no answer that a term can use."""
    key, needs = term.field, f"{setting} (type {term.type}) compares with it"
    if key not in record:
        known = ", ".join(f'"{name}"' for name in sorted(record))
        hint = nearest(key, record) or f" {setting}.field names the key."
        raise UserError(f'{where}: no key "{key}", and {needs}; the record has {known}.{hint}')
    answer = record[key]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise UserError(f'{where}: "{key}" is {_short(answer)}, expected text or a number; {needs}')
    if isinstance(term, NumberReward) and final_number(str(answer)) is None:
        raise UserError(f'{where}: "{key}" is {_short(answer)}, which has no number; {needs}')


def final_number(text: str) -> Decimal | None:
    """The number that a worked solution ends with, as GSM8K is graded (arXiv 2110.14168); None where there is none.

    It is the first after the last `####`, and in a text without that mark its last. Commas between thousands, a
    currency sign and what follows (units, a percent sign, a full stop) do not matter: "$1,000.", "1000" and "1e3" are
    one number, and 12% is 12. 3/4 and 1 1/2 are fractions, to 40 digits; a minus belongs to a number that it touches,
    unless it stands behind a word or another number, as in 5-3.
    """
    _, mark, answer = text.rpartition(MARK)
    found = _NUMBER.search(answer) if mark else None
    if not mark:
        for match in _NUMBER.finditer(text):
            found = match
    return None if found is None else _value(found)


def _value(found: re.Match[str]) -> Decimal:
    if found["amount"] is not None:
        value = _decimal(found["amount"])
    else:
        over, under = _decimal(found["over"]), _decimal(found["under"])
        value = _DIGITS.divide(over, under)
        if found["whole"] is not None and over < under:  # 1 1/2; but "in 2023 7/2" names two numbers
            value = _DIGITS.add(Decimal(found["whole"]), value)
    return -value if found["minus"] else value


def _decimal(digits: str) -> Decimal:
    return Decimal(digits.replace(",", "").replace("\u2212", "-"))


def _same(found: Decimal | None, answer: Any) -> bool:
    return found is not None and found == final_number(str(answer))


def load_scorer(name: str, setting: str) -> Scorer:
    """Imports module:function, the user's own judge of responses. Raises UserError naming the setting where that fails.

    The scorer raises UserError naming the record where the function raises, or gives what is no finite number.
    """
    function = _imported(name, setting)

    def scorer(record: Record, response: str) -> float:
        given = f"for the response {_short(response)} to {_short(record)}"
        try:
            found = function(record, response)
        except Exception as error:  # whatever the user's function does
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({at.filename}:{at.lineno})"
            raise UserError(f"{setting}: {name} raised {what} {given}") from error
        try:
            score = math.nan if isinstance(found, str) else float(found)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"{setting}: {name} gave {_short(found)} {given}; expected a finite number")
        return score

    return scorer


def _imported(name: str, setting: str) -> Callable[..., Any]:
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f"{setting} is '{name}'; expected module:function, as jaxgpt.data.meadow:gold_score")
    if str(Path.cwd()) not in sys.path:  # where the user's own module stands
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is run
        raise UserError(f"{setting}: cannot import {module_name} ({type(error).__name__}: {error})") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        hint = nearest(function_name, dir(module))
        raise UserError(f"{setting}: {module_name} has no function {function_name}.{hint}")
    return function


def _short(value: Any) -> str:
    """A value as JSON, cut to a line."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 100 else f"{text[:99]}…"
