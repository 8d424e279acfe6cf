"""What the parts of a run were made from, as their folders record it.

Reads and writes folders. Nothing here needs jax.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from jaxgpt.config.load import difference
from jaxgpt.data.records import file_hash
from jaxgpt.errors import UserError

Inputs = dict[str, Any]


def short_hash(paths: list[str]) -> str:
    """Reads files whole; 16 hex digits of their contents."""
    return hashlib.sha256(file_hash(paths).encode()).hexdigest()[:16]


def stage_inputs(home: Path) -> Inputs | None:
    """Reads what a stage was begun from; None where that is not known."""
    try:
        return yaml.safe_load((home / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None


def same_inputs(home: Path, inputs: Inputs) -> bool:
    """Whether the folder of a part that is no stage was made from these inputs."""
    try:
        return json.loads((home / "inputs.json").read_text(encoding="utf-8")) == json.loads(json.dumps(inputs))
    except (OSError, ValueError):
        return False


def has_work(home: Path) -> bool:
    """Whether a stage has trained at all."""
    return (home / "done.json").exists() or any((home / "checkpoints").glob("*"))


def changes(home: Path, inputs: Inputs) -> list[str]:
    """What is no longer as it was for the work that there is of a stage: "sft.steps: 100 -> 200"."""
    known = stage_inputs(home)
    return difference(known, inputs) if known is not None and has_work(home) else []


def refuse(found: dict[Path, list[str]]) -> None:
    """Raises UserError with what has changed for the work in each folder; does nothing where nothing has."""
    if found:
        were, those = ("was", "that folder") if len(found) == 1 else ("were", "those folders")
        told = "".join(f"\n  {line}" for lines in found.values() for line in lines)
        homes = ", ".join(map(str, found))
        raise UserError(f"{homes} {were} made with other inputs; use another name=..., or remove {those}:{told}")
