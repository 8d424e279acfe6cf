"""Meadow, the small invented world that the default run learns: text, instructions, rankings and prompts."""

from jaxgpt.data.meadow.gold import gold_score
from jaxgpt.data.meadow.write import is_current, write_world

__all__ = ["gold_score", "is_current", "write_world"]
