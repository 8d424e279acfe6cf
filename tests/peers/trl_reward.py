"""A reward that both sides of the comparison compute from a response's text: how far into the alphabet it goes."""

from __future__ import annotations

from typing import Any


def score(record: dict[str, Any], response: str) -> float:
    """The mean place in the alphabet of the letters a to z, over 26; 0 without one."""
    places = [ord(letter) - 96 for letter in response if "a" <= letter <= "z"]
    return sum(places) / (26 * len(places)) if places else 0.0
