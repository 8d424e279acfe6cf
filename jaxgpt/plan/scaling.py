"""`jaxgpt plan --chinchilla` and `--isoflop`: how a budget is best spent, by published laws or by one's own runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxgpt.config.options import parse_settings
from jaxgpt.config.planned import Budgeted, Fitted
from jaxgpt.errors import UserError, nearest
from jaxgpt.plan.budget import plan_budget
from jaxgpt.plan.fitted import plan_fitted

FLAGS = ("--chinchilla", "--isoflop")


def scale(words: Sequence[str], folder: Callable[[str], Path]) -> int:
    """Does what the words after the verb ask for; `folder` looks for a run."""
    flag, *rest = words
    if flag == "--chinchilla":
        return plan_budget(parse_settings(Budgeted, rest))
    if flag == "--isoflop":
        options = parse_settings(Fitted, [word for word in rest if "=" in word])
        return plan_fitted([folder(word) for word in rest if "=" not in word], options)
    raise UserError(f"{flag}: no such option of plan.{nearest(flag, FLAGS)} There are {' and '.join(FLAGS)}")
