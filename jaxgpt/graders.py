"""Verifiable rewards (to be replaced)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Grader = Callable[[dict[str, Any], str, int], float]


def grader(term: Any, setting: str) -> Grader:
    """A grader."""
    return lambda record, text, tokens: float(len(text) % 3)


def check_records(terms: Any, rows: Any) -> None:
    """Nothing."""
