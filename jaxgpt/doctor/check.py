"""One check: a figure, its bar, and what to change where it does not hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

NAME = 38
"""Columns of a check's name."""
INDENT = 6
"""Columns before it."""


@dataclass(frozen=True)
class Check:
    """A line of the doctor's."""

    name: str
    figure: str
    bar: str = ""
    """What the figure has to be; empty where nothing is asked of it."""
    holds: bool | None = None
    """None where nothing is asked."""
    change: str = ""
    """What to change where it does not hold; of a figure without a bar, a remark."""


def below(name: str, figure: float, bar: float | None, change: str, shown: str = "") -> Check:
    """A figure that has to be less than its bar (`shown` to people), which NaN never is; without a bar, told alone."""
    if bar is None:
        return Check(name, f"{figure:.2g}")
    return Check(name, f"{figure:.2g}", f"below {shown or f'{bar:g}'}", bool(figure < bar), change)


def zero(name: str, figure: float, change: str) -> Check:
    """A figure that has to be 0, bit for bit."""
    return Check(name, f"{figure:.2g}", "exactly 0", bool(figure == 0.0), change)


def near(name: str, figure: float, wanted: float, within: float, change: str, shown: str) -> Check:
    """A figure that has to be `wanted`, which messages call `shown`, give or take."""
    holds = math.isfinite(figure) and abs(figure - wanted) <= within
    return Check(name, f"{figure:.4f}", f"{shown} = {wanted:.4f} +- {within:g}", holds, change)


def none_of(name: str, found: int, change: str, detail: str = "") -> Check:
    """A count that has to be 0."""
    return Check(name, f"{found:,}{detail if found else ''}", "0", found == 0, change)


def show(console: Console, check: Check) -> None:
    """Prints a check: a line, and on a terminal what to change below it."""
    mark = {True: "ok", False: "FAIL", None: "--"}[check.holds]
    bar = f"  ({check.bar})" if check.bar else ""
    line = Text().append(f"{mark:<{INDENT}}", style={"ok": "green", "FAIL": "bold red", "--": "dim"}[mark])
    line.append(f"{check.name:<{NAME}} ")
    line.append(check.figure, style="bold")
    line.append(bar, style="dim")
    told = "" if check.holds else check.change
    if not console.is_terminal:
        console.print(f"{line.plain}  {told}".rstrip(), highlight=False, markup=False)
        return
    console.print(line)
    if told:
        console.print(Padding(Text(told, style="yellow" if check.holds is False else "dim"), (0, 0, 0, INDENT)))
