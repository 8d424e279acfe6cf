"""The user's own judge of responses, named as module:function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from jaxgpt.errors import UserError, nearest

Scorer = Callable[[dict[str, Any], str], float]
"""(record, response) -> score; higher is better."""


def load_scorer(name: str, setting: str) -> Scorer:
    """Imports module:function. Raises UserError naming the setting where that fails."""
    module_name, colon, function_name = name.partition(":")
    if not colon:
        raise UserError(f"{setting} is '{name}'; expected module:function, as jaxgpt.data.meadow:gold_score")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"{setting}: cannot import {module_name} ({error})") from error
    if not callable(getattr(module, function_name, None)):
        hint = nearest(function_name, dir(module))
        raise UserError(f"{setting}: {module_name} has no function {function_name}.{hint}")
    return getattr(module, function_name)
