"""Mistakes of the user, told in words: the command line prints them without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend; the text says what, where, what was expected and what to do."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" for the closest of `choices`, or an empty string where none is close."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
