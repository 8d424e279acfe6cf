"""Rows of data as the model gets them: what is trained, what is not, and the control tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from jaxgpt.data.tokenizer import Tokenizer

LONGEST = 240
"""Characters of one run of tokens of a kind that are shown."""
STYLES = {"trained": "bold green", "not trained": "", "control": "magenta"}
PLAIN = "In [ ] is what is trained; <...> are control tokens."


class Run(NamedTuple):
    """Tokens of one kind that stand together."""

    text: str
    control: bool
    trained: bool


def runs(tokenizer: Tokenizer, ids: Sequence[int] | np.ndarray, mask: Sequence[int] | np.ndarray) -> list[Run]:
    """A row as text; `mask` is 1 on what is trained."""
    control = set(tokenizer.control.values())
    marked = [(int(token), int(token) in control, bool(on)) for token, on in zip(ids, mask, strict=True)]
    return [
        Run(_shown(tokenizer.decode_visible(token for token, *_ in part)), *kind)
        for kind, part in groupby(marked, key=lambda one: one[1:])
    ]


def _shown(text: str) -> str:
    """The text in one line, without what a terminal would obey, and not too long."""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    if len(text) <= LONGEST:
        return text
    head, tail = LONGEST * 2 // 3, LONGEST // 3
    return f"{text[:head]} ... {len(text) - head - tail} characters ... {text[-tail:]}"


def plain(row: Sequence[Run]) -> str:
    """A row with brackets around what is trained."""
    parts = []
    for trained, together in groupby(row, key=lambda run: run.trained):
        text = "".join(run.text for run in together)
        parts.append(f"[{text}]" if trained else text)
    return "".join(parts)


def coloured(row: Sequence[Run]) -> Text:
    """A row in colour; control tokens that are trained are underlined."""
    text = Text()
    for run in row:
        style = STYLES["control" if run.control else "trained" if run.trained else "not trained"]
        text.append(run.text, style=f"{style} underline" if run.control and run.trained else style)
    return text


def legend(console: Console) -> None:
    """Says how rows are marked."""
    if not console.is_terminal:
        console.print(PLAIN, markup=False, highlight=False)
        return
    text = Text("Rows: ")
    for name, style in STYLES.items():
        text.append(name, style=style).append(", ")
    text.append("control and trained", style=f"{STYLES['control']} underline")
    console.print(text)


def show(console: Console, where: str, row: Sequence[Run]) -> None:
    """Prints a row with the place it comes from."""
    if console.is_terminal:
        console.print(Text().append(f"  {where}  ", style="dim").append_text(coloured(row)))
    else:
        console.print(f"  {where}  {plain(row)}", markup=False, highlight=False)
