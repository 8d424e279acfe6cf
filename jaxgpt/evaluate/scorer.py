"""The user's own judge of responses, named as module:function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxgpt.errors import UserError, nearest

Scorer = Callable[[dict[str, Any], str], float]
"""(record, response) -> score; higher is better."""


def load_scorer(name: str, setting: str) -> Scorer:
    """Imports module:function. Raises UserError naming the setting where that fails."""
    module_name, colon, function_name = name.partition(":")
    if not (module_name and colon and function_name):
        raise UserError(f"{setting} is '{name}'; expected module:function, as jaxgpt.data.meadow:gold_score")
    if str(Path.cwd()) not in sys.path:  # where the user's own module stands
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module does when it is run
        raise UserError(f"{setting}: cannot import {module_name} ({type(error).__name__}: {error})") from error
    if not callable(getattr(module, function_name, None)):
        hint = nearest(function_name, dir(module))
        raise UserError(f"{setting}: {module_name} has no function {function_name}.{hint}")
    return getattr(module, function_name)
