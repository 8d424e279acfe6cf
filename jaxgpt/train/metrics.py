"""Where a run's figures go: metrics.jsonl always, and one live line on the console.

Reads the clock.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from jaxgpt.health import Health, Limits
from jaxgpt.places import in_bucket, write_whole

Values = Mapping[str, Any]


class Writer(Protocol):
    """Anything that takes a run's figures."""

    def write(self, line: Values) -> None:
        """Takes one line: {"step", ...}, or {"step", "eval": {...}}."""

    def flush(self) -> None:
        """Makes everything taken so far durable."""

    def close(self) -> None:
        """Flushes and lets go."""


class JsonLines:
    """Appends to metrics.jsonl and its like. Lines of steps after `after` are of a run that was cut off, and go.

    A bucket has no appending: there the file is written whole at each flush.
    """

    def __init__(self, path: Path, after: int):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _keep_upto(path, after)
        self._file: IO[str]
        if in_bucket(path):
            self._file = io.StringIO()
            self._file.write(path.read_text(encoding="utf-8") if path.exists() else "")
        else:
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: Values) -> None:
        """Writes one line."""
        self._file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Writes through to the disk, or the bucket."""
        if isinstance(self._file, io.StringIO):
            self.path.write_text(self._file.getvalue(), encoding="utf-8")
        else:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self.flush()
        self._file.close()


def _keep_upto(path: Path, step: int) -> None:
    """Cuts a metrics file back to a step, atomically; a half-written last line goes as well."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().decode(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))


class Warnings:
    """Says in words, on the console and in warnings.jsonl, when a stage's figures begin to look wrong.

    Reads the lines of metrics.jsonl that an earlier start has left, silently: it goes on from where that was.
    """

    def __init__(self, folder: Path, after: int, limits: Limits, console: Console):
        self._health, self._console = Health(limits), console
        metrics = folder / "metrics.jsonl"
        for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else ():
            self._health.see(json.loads(line))
        self._file = JsonLines(folder / "warnings.jsonl", after)

    def write(self, line: Values) -> None:
        """Looks at a line, and tells what is new."""
        for notice in self._health.see(line):
            self._file.write(notice._asdict())
            self._console.print(Text(f"warning: {notice.text}", style="yellow"))

    def flush(self) -> None:
        """Writes through to the disk."""
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


SHOWN = {
    "objective/scores": "score",
    "objective/kl": "kl",
    "objective/kl_k3": "k3",
    "policy/clipfrac_avg": "clip",
    "val/ratio": "ratio",
    "objective/entropy": "ent",
    "objective/length": "len",
    "objective/eos_rate": "eos",
    "loss": "loss",
    "accuracy": "acc",
    "rewards/accuracies": "acc",
    "rewards/margins": "margin",
    "lr": "lr",
    "grad_norm": "gnorm",
}
"""Figures of the console line, by their key in metrics.jsonl; the first ones are what a narrow terminal shows."""
BAR = 12
"""Width of the bar of a live line, in characters."""


def _shown(value: float | None, digits: int = 4) -> str:
    return "not finite" if value is None else f"{value:.{digits}g}"


class Figures:
    """Figures on one line, as many from the first on as there is room for."""

    def __init__(self, *figures: str):
        self.figures = figures

    def within(self, width: int) -> str:
        """The figures that fit, whole."""
        line = ""
        for figure in self.figures:
            longer = f"{line}  {figure}" if line else figure
            if len(longer) > width:
                break
            line = longer
        return line

    def __str__(self) -> str:
        return "  ".join(self.figures)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, len(str(self)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text(self.within(options.max_width), no_wrap=True)


class _FiguresColumn(ProgressColumn):
    """The one column of a live line that gives way where the terminal is narrow."""

    def render(self, task: Task) -> Figures:
        """The task's figures."""
        return task.fields["figures"]


class ConsoleLine:
    """One live line for a stage on a terminal; a plain line every `every` steps elsewhere."""

    def __init__(self, console: Console, name: str, steps: int, start: int, every: int):
        self.console, self.name, self.steps, self.every = console, name, steps, every
        self._latest: Values = {}
        self._live = None
        if console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(BAR, table_column=Column(no_wrap=True)),
                TextColumn("{task.completed}/{task.total}"),
                TimeRemainingColumn(table_column=Column(no_wrap=True)),
                _FiguresColumn(),
                console=console,
            )
            self._live.start()
            self._task = self._live.add_task(name, total=steps, completed=start, figures=Figures("compiling"))

    def write(self, line: Values) -> None:
        """Shows a line's figures."""
        if "eval" in line:
            found = line["eval"]
            errors = {key: f" \u00b1 {_shown(found[f'{key}_error'], 2)}" for key in found if f"{key}_error" in found}
            shown = [key for key in found if not key.endswith("_error")]
            figures = "  ".join(f"{key} {_shown(found[key])}{errors.get(key, '')}" for key in shown)
            self.console.print(f"{self.name} step {line['step']}/{self.steps}  eval  {figures}", highlight=False)
            return
        self._latest = {**self._latest, **line}  # a rollout's figures stand until the next one's
        figures = Figures(*self._figures(self._latest))
        if self._live is not None:
            self._live.update(self._task, completed=line["step"], figures=figures)
        elif line["step"] % self.every == 0 or line["step"] == self.steps:
            self.console.print(f"{self.name} step {line['step']}/{self.steps}  {figures}", highlight=False)

    def _figures(self, line: Values) -> list[str]:
        """What is amiss first, then the figures of SHOWN, then the pace."""
        amiss = [f"skipped {line['skipped']}"] if line["skipped"] else []
        if line["time"]["wait"] > 0.02:
            amiss.append(f"wait {line['time']['wait']:.0%}")
        shown = [
            f"{short} {_shown(line[key], 4 if key == 'loss' else 3)}" for key, short in SHOWN.items() if key in line
        ]
        return [*amiss, *shown, f"{line['time']['tokens_per_second']:,.0f} tok/s"]

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Ends the live line."""
        if self._live is not None:
            self._live.stop()


class Clock:
    """Wall time of a stage over all its starts, and the pace and share of waiting since the last line."""

    def __init__(self, seconds: float, tokens_per_step: int):
        self._before, self._start, self._tokens = seconds, time.monotonic(), tokens_per_step
        self._last, self._waited = self._start, 0.0

    @property
    def seconds(self) -> float:
        """Seconds of the stage so far, earlier starts included."""
        return self._before + time.monotonic() - self._start

    def waited(self, since: float) -> None:
        """Counts the time since `since` (of `now`) as waiting for data."""
        self._waited += time.monotonic() - since

    def now(self) -> float:
        """A point in time, for `waited`."""
        return time.monotonic()

    def lap(self, steps: int = 1) -> dict[str, float]:
        """The time entry of a metrics line, or of `steps` lines; starts the next lap."""
        now = time.monotonic()
        spent = max(now - self._last, 1e-9)
        entry = {
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(steps * self._tokens / spent, 1),
            "wait": round(min(self._waited / spent, 1.0), 4),
        }
        self._last, self._waited = now, 0.0
        return entry

    def skip(self) -> None:
        """Leaves the time since the last lap (an evaluation, say) out of the next one's pace."""
        self._last, self._waited = time.monotonic(), 0.0
