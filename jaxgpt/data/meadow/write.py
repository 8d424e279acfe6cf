"""Writes the meadow's files: ordinary JSONL that the ordinary readers read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from random import Random
from typing import Any

from jaxgpt.config.schema import PrepareConfig
from jaxgpt.data.meadow.responses import candidates, demonstration, gold_ranks, noisy_ranks
from jaxgpt.data.meadow.sources import WEIGHTS, document_counts, documents
from jaxgpt.data.meadow.tasks import Task, all_tasks, sample_tasks

VERSION = 5
"""Raised whenever the same config would give other files."""
MARKER = "world.json"
RESPONSES = 4
RATERS = 4
FILES = (
    *(f"text/{source}.jsonl" for source in WEIGHTS),
    "instructions.jsonl",
    "instructions_eval.jsonl",
    "rankings.jsonl",
    "rankings_eval.jsonl",
    "prompts.jsonl",
    "prompts_eval.jsonl",
    "prompts_exact.jsonl",
)

Json = dict[str, Any]


def write_world(folder: Path, config: PrepareConfig) -> None:
    """Writes the world of `config` into `folder`, replacing what is there; does nothing where it is already current.

    The files appear all at once, by a rename; the same config always gives the same bytes.
    """
    if is_current(folder, config):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, lines in _files(config).items():
            _write_jsonl(scratch / name, lines)
        (scratch / MARKER).write_text(json.dumps(_marker(config), indent=1) + "\n")
        scratch.chmod(0o755)
        _replace(folder, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def is_current(folder: Path, config: PrepareConfig) -> bool:
    """Whether `folder` holds the world of this very config, with all its files."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return marker == _marker(config) and all((folder / name).is_file() for name in FILES)


def _marker(config: PrepareConfig) -> Json:
    return {"version": VERSION, "config": config.model_dump(mode="json")}


def _files(config: PrepareConfig) -> dict[str, Iterable[Json]]:
    """Every file's records, each file from random numbers of its own."""

    def tasks(name: str, count: int, held_out: bool) -> tuple[Random, list[Task]]:
        rng = Random(f"{config.seed}/{name}")
        return rng, sample_tasks(rng, count, held_out)

    texts = {
        f"text/{source}.jsonl": [{"text": text} for text in documents(source, count, config.seed)]
        for source, count in document_counts(config.documents).items()
    }
    exact = [task for tasks in all_tasks(held_out=True).values() for task in tasks if task.answer is not None]
    return texts | {
        "instructions.jsonl": _instructions(*tasks("instructions", config.instructions, False)),
        "instructions_eval.jsonl": _instructions(*tasks("instructions_eval", config.held_out, True)),
        "rankings.jsonl": _rankings(*tasks("rankings", config.rankings, False), "p", config.noise),
        "rankings_eval.jsonl": _rankings(*tasks("rankings_eval", config.held_out, True), "e", None),
        "prompts.jsonl": [task.record() for task in tasks("prompts", config.prompts, False)[1]],
        "prompts_eval.jsonl": [task.record() for task in tasks("prompts_eval", config.held_out, True)[1]],
        "prompts_exact.jsonl": [task.record() for task in exact],
    }


def _instructions(rng: Random, tasks: list[Task]) -> list[Json]:
    return [
        {
            "messages": [
                {"role": "user", "content": task.prompt},
                {"role": "assistant", "content": demonstration(rng, task)},
            ],
            "kind": task.kind,
        }
        for task in tasks
    ]


def _rankings(rng: Random, tasks: list[Task], prefix: str, noise: float | None) -> list[Json]:
    """Ranked responses; without noise the ranks are the gold score's."""
    lines = []
    for number, task in enumerate(tasks):
        responses = candidates(rng, task, RESPONSES)
        found = gold_ranks(task, responses) if noise is None else noisy_ranks(rng, task, responses, noise)
        lines.append(
            {
                "prompt": task.prompt,
                "responses": responses,
                "ranks": found,
                "rater": "gold" if noise is None else f"r{rng.randrange(RATERS) + 1}",
                "prompt_id": f"{prefix}{number}",
                "kind": task.kind,
            }
        )
    return lines


def _write_jsonl(path: Path, lines: Iterable[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _replace(folder: Path, scratch: Path) -> None:
    """Puts `scratch` in the place of `folder`; an old one is set aside first and then deleted."""
    old = scratch.with_name(scratch.name + "-old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(scratch, folder)
    shutil.rmtree(old, ignore_errors=True)
