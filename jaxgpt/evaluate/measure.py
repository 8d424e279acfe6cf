"""One finished model measured on tasks, texts, rankings and against others: the verb `eval` for a run's folder.

Reads the run's folder and the user's files; writes runs/<run>/evaluate/<stage>-<what>.json, and a table to standard
output. What is imported here comes without jax, so that mistakes are told at once.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from jaxgpt.config.options import Measures
from jaxgpt.data.records import expand, read_texts
from jaxgpt.errors import UserError, nearest
from jaxgpt.evaluate.alignment import Alignment
from jaxgpt.evaluate.named import Results, write_results
from jaxgpt.evaluate.ranked import judging, measure_rankings, ranking_rows
from jaxgpt.runs import find_stage

if TYPE_CHECKING:
    from jaxgpt.api import Model

WIDE = 120
"""Columns of a table that goes to a file."""
TASK_FILES = (".yaml", ".yml")


def check(run: Path, wanted: Measures, command: str, key: str | None) -> Alignment | None:
    """Looks for everything that is named, without loading anything; gives what compares models, where that is asked
    for. Raises UserError for what is not there.

    `command` is what the user wrote behind `jaxgpt`, for the answer to a missing lm-eval; `key` is the judge's, where
    that is a server.
    """
    for pattern in (*wanted.text, *wanted.rankings):
        expand(pattern)
    for task in wanted.tasks:
        path = Path(task)
        if path.suffix in TASK_FILES and not path.is_file():
            known = [str(found) for found in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            raise UserError(f"tasks: {task} does not exist.{nearest(task, known)}")
    if wanted.tasks and importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"tasks need lm-eval, which is not installed: uv run --extra eval jaxgpt {command}")
    if wanted.stage is not None:
        find_stage(run, wanted.stage)
    return Alignment(run, wanted, key) if wanted.responds else None


def measure(run: Path, wanted: Measures, alignment: Alignment | None) -> int:
    """Measures what is asked for, tables, and a file for each task, text, set of rankings and comparison; returns 0.

    Raises UserError for what `check` could not know: a task that lm-eval does not have, a model that gives text no
    probability, or responses no score.
    """
    tasks = None
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(highlight=False, soft_wrap=True, width=WIDE)
    if wanted.tasks:
        from jaxgpt.evaluate.harness import Tasks

        console.print("eval  reading the tasks", style="dim")
        tasks = Tasks(wanted.tasks)
    from jaxgpt.api import keep_compiled, load

    keep_compiled()
    written: list[Path] = []
    if wanted.text or wanted.tasks:
        model = load(run, wanted.stage, wanted.mesh)
        found = itertools.chain(_texts(model, wanted), _tasks(model, wanted, tasks))
        written += _told(model, found, console, wanted.out)
    if wanted.rankings:
        judge = load(run, judging(run, wanted.stage), wanted.mesh)
        written += _told(judge, measure_rankings(judge, wanted), console, wanted.out)
    if alignment is not None:
        written += alignment.write(console)
    for path in written:
        console.print(str(path), style="dim")
    return 0


def _told(model: Model, results: Iterable[tuple[str, Results]], console: Console, out: str | None) -> list[Path]:
    """Prints a table of one model's results; writes a file for each, and gives their paths."""
    table = Table("", "metric", "value", "±", title=str(model.folder), title_justify="left", box=None)
    written: list[Path] = []
    for what, found in results:
        for i, (metric, value, error) in enumerate(_rows(found)):
            table.add_row("" if i else what, metric, _number(value), _number(error))
        written.append(write_results(model.folder, what, found, out))
    console.print(table)
    return written


def _texts(model: Model, wanted: Measures) -> Iterator[tuple[str, Results]]:
    from jaxgpt.evaluate.perplexity import score_texts

    files = list(dict.fromkeys(path for pattern in wanted.text for path in expand(pattern)))
    named = Counter(path.name for path in files)
    for path in files:
        name = path.name if named[path.name] == 1 else f"{path.parent.name}-{path.name}"
        began = time.monotonic()
        score = score_texts(model, itertools.islice(read_texts(path, wanted.field), wanted.limit), wanted.batch)
        if not score.tokens:
            raise UserError(f"{path}: there is no text in it")
        seconds = round(time.monotonic() - began, 2)
        yield name, {"text": str(path), "limit": wanted.limit, **score.values(), "seconds": seconds}


def _tasks(model: Model, wanted: Measures, tasks: Any) -> Iterator[tuple[str, Results]]:
    if tasks is None:
        return
    from importlib.metadata import version

    from jaxgpt.evaluate.harness import run_tasks

    began = time.monotonic()
    found = run_tasks(model, tasks, wanted.batch, wanted.limit, wanted.few_shot, wanted.chat)
    seconds = round(time.monotonic() - began, 2)
    for name, metrics in found["results"].items():
        yield (
            name,
            {
                "task": name,
                "limit": wanted.limit,
                "chat": wanted.chat,
                "few_shot": found["n-shot"].get(name),
                "version": found["versions"].get(name),
                "lm_eval": version("lm_eval"),
                "samples": found["n-samples"].get(name),
                "metrics": {key: value for key, value in metrics.items() if "," in key},
                "seconds": seconds,
            },
        )


def _rows(found: Results) -> Iterator[tuple[str, float | None, float | None]]:
    """(metric, value, standard error) as the table shows them."""
    if "rankings" in found:
        yield from ranking_rows(found)
        return
    if "text" in found:
        for key in ("perplexity", "bits_per_byte", "tokens", "bytes"):
            yield key.replace("_", " "), found[key], None
        if found["unknown_tokens"]:
            yield "unknown tokens", found["unknown_tokens"], None
        return
    metrics = found["metrics"]
    for key, value in metrics.items():
        name, comma, kind = key.partition(",")
        if comma and not name.endswith("_stderr") and isinstance(value, int | float):
            shown = name if kind == "none" else f"{name} ({kind})"
            error = metrics.get(f"{name}_stderr,{kind}")
            yield shown, value, error if isinstance(error, int | float) else None


def _number(value: float | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
