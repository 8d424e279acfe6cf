"""The data that `prepare` makes: ordinary JSONL files that the ordinary readers read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxgpt.config.schema import MeadowConfig, Prepare
from jaxgpt.data.arithmetic import files as arithmetic
from jaxgpt.data.meadow import files as meadow
from jaxgpt.places import publish, remove, scratch

MARKER = "world.json"

Json = dict[str, Any]


def world_files(config: Prepare) -> tuple[str, ...]:
    """Names of the files of a world, in its folder."""
    return _world(config).FILES


def write_world(folder: Path, config: Prepare) -> None:
    """Writes the world of `config` into `folder`, replacing what is there; does nothing where it is already current.

    The files appear all at once, by a rename; the same config always gives the same bytes.
    """
    if is_current(folder, config):
        return
    made = scratch(folder)
    try:
        for name, lines in _world(config).records(config).items():
            _write_jsonl(made / name, lines)
        (made / MARKER).write_text(json.dumps(_marker(config), indent=1) + "\n")
        publish(made, folder, MARKER)
    finally:
        remove(made)


def is_current(folder: Path, config: Prepare) -> bool:
    """Whether `folder` holds the world of this very config, with all its files."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return marker == _marker(config) and all((folder / name).is_file() for name in world_files(config))


def _world(config: Prepare) -> ModuleType:
    """What makes the records: a VERSION, the names FILES, and records(config)."""
    return meadow if isinstance(config, MeadowConfig) else arithmetic


def _marker(config: Prepare) -> Json:
    return {"version": _world(config).VERSION, "config": config.model_dump(mode="json")}


def _write_jsonl(path: Path, lines: Iterable[Json]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
