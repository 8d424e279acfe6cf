"""Models that settings name, looked for without loading any, and where results about a model are kept.

Reads and writes folders. Nothing here needs jax.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from jaxgpt.errors import UserError
from jaxgpt.interop.foreign import Foreign
from jaxgpt.places import write_whole
from jaxgpt.runs import FOREIGN, KINDS, STAGES, find_stage, finished, is_finished, is_foreign

Results = dict[str, Any]
LONGEST = 120
"""Characters of what is measured that the name of its file has, at most."""
CHECKPOINTS = "checkpoints"
ELSEWHERE = Path("/")
"""Seen from here every model's name has that of its run."""


class Point(NamedTuple):
    """A model on the way of a training run."""

    folder: Path
    """What `jaxgpt.load` takes."""
    group: str
    """What it is a point of: the folder of a stage, or of a Hugging Face model."""
    step: int | None
    """Updates that it has learned for, where that is known."""


def model_folder(word: str, setting: str, kind: str = "language", stage: str | None = None) -> Path:
    """What `jaxgpt.load` takes for the model that a setting names: a stage, a run (its last language model, or its
    reward model), a checkpoint, or hf:FOLDER.

    Raises UserError where there is none.
    """
    path = Path(word).expanduser()
    try:
        if is_foreign(word):
            found = Foreign.describe(word).kind
            if found != kind:
                raise UserError(f"{word} holds {KINDS[found]}, expected {KINDS[kind]}")
            return find_stage(Path(word), stage)
        if path.parent.name == CHECKPOINTS and path.is_dir() and stage is None:
            return path
        folder = find_stage(path, stage or ("reward" if kind == "scalar" and "reward" in finished(path) else None))
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error
    found = "scalar" if folder.name == "reward" else "language"
    if folder.name in STAGES and found != kind:
        raise UserError(f"{setting}: {folder} holds {KINDS[found]}, expected {KINDS[kind]}")
    return folder


def frontier_points(words: tuple[str, ...], setting: str = "frontier") -> list[Point]:
    """The models that `frontier` names: of a stage's folder all checkpoints by step and its result; of a run its last
    language model; of a pattern all that it matches. Raises UserError for what holds no model."""
    found: dict[Path, Point] = {}
    for word in words:
        if is_foreign(word):
            folder = model_folder(word, setting)
            found[folder] = Point(folder, str(folder).removeprefix(FOREIGN), None)
            continue
        matches = [word]
        if glob.has_magic(word):
            matches = sorted(filter(_may_hold, glob.glob(os.path.expanduser(word))), key=_by_number)
        if not matches:
            raise UserError(f"{setting}: no folder matches {word}")
        for match in matches:
            path = Path(match).expanduser()
            path = path.parent if path.name == CHECKPOINTS else path
            points = _checkpoints(path) if (path / CHECKPOINTS).is_dir() else [_point(model_folder(match, setting))]
            if not points:
                raise UserError(f"{setting}: {path} has no checkpoint and no result yet")
            found |= {point.folder: point for point in points}
    return list(found.values())


def _may_hold(path: str) -> bool:
    """Whether what a pattern matched is a folder, and among checkpoints a finished one."""
    return os.path.isdir(path) and (Path(path).parent.name != CHECKPOINTS or Path(path).name.isdigit())


def _by_number(path: str) -> tuple[str, int, str]:
    """Sorts checkpoints by step, and what is none by name."""
    parent, name = os.path.split(path)
    return parent, int(name) if name.isdigit() else -1, name


def _checkpoints(stage: Path) -> list[Point]:
    """The checkpoints of a stage, and its result in place of the checkpoint of the same step."""
    steps = sorted(int(path.name) for path in (stage / CHECKPOINTS).iterdir() if path.name.isdigit())
    points = {step: _point(stage / CHECKPOINTS / str(step)) for step in steps}
    if is_finished(stage):
        last = _point(stage)
        points[-1 if last.step is None else last.step] = last
    return sorted(points.values(), key=lambda point: (point.step is None, point.step or 0))


def _point(folder: Path) -> Point:
    if folder.parent.name == CHECKPOINTS:
        return Point(folder, str(folder.parent.parent), int(folder.name) if folder.name.isdigit() else None)
    try:
        step = int(json.loads((folder / "done.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, LookupError, TypeError):
        step = None
    return Point(folder, str(folder), step)


def home_of(folder: Path, out: str | None = None) -> Path:
    """Where results about a model are kept: evaluate/ of its run, or of the working folder for a Hugging Face folder,
    which is not ours to write in."""
    if out is not None:
        return Path(out).expanduser()
    if folder.parent.name == CHECKPOINTS:
        return folder.parent.parent.parent / "evaluate"
    return (folder.parent if (folder / "params").is_dir() else Path()) / "evaluate"


def check_home(home: Path) -> None:
    """Raises UserError where nothing can be written to a folder that may not be there yet."""
    there = next(path for path in (home, *home.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{home} cannot be written to; out=FOLDER names another place for the results")


def label_of(folder: Path, run: Path | None = None) -> str:
    """A model's name in those of files: its stage, and the step of a checkpoint; seen from another `run` with its own
    run before it."""
    if is_foreign(folder):
        return Path(str(folder).removeprefix(FOREIGN)).name
    checkpoint = folder.parent.name == CHECKPOINTS
    stage = folder.parent.parent if checkpoint else folder
    label = f"{stage.name}-{folder.name}" if checkpoint else stage.name
    return label if run is None or stage.parent.resolve() == run.resolve() else f"{stage.parent.name}-{label}"


def write_results(folder: Path, what: str, found: Results, out: str | None = None) -> Path:
    """Writes what was found about a model, whole or not at all."""
    home = home_of(folder, out)
    name = re.sub("[/:]", "_", what)[:LONGEST]
    path = home / f"{label_of(folder)}-{name}.json"
    home.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(_plain({"model": str(folder), "label": label_of(folder), **found}), indent=1) + "\n")
    return path


def _plain(value: Any) -> Any:
    """For JSON: numbers of NumPy as Python's, and none that JSON does not know."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
