"""Meadow, the small invented world that the default run learns: text, instructions, rankings and prompts."""

from jaxgpt.data.meadow.gold import gold_score

__all__ = ["gold_score"]
