"""The small run as the doctor gets it, and what the doctor says of it."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from small_run import config

from jaxgpt.config.schema import Config
from jaxgpt.doctor import examine
from jaxgpt.runs import STAGES

DPO = {"batch": 8, "context": 32, "responses": 3, "data": {"path": "{run}/rankings.jsonl"}}


@dataclass(frozen=True)
class Told:
    """What an examination printed."""

    code: int
    text: str

    @property
    def failed(self) -> set[str]:
        """Names of the checks that do not hold."""
        return {line[6:44].strip() for line in self.text.splitlines() if line.startswith("FAIL  ")}

    def line(self, name: str) -> str:
        """The line of a check."""
        return next(line for line in self.text.splitlines() if line[6:].startswith(name))


def setup(runs: Path, stages: tuple[str, ...], **changes) -> Config:
    """The config of the small run with these stages alone."""
    given = {"path": str(runs / "small" / "tokenizer"), **changes.pop("tokenizer", {})}
    made = config(runs, tokenizer=given, dpo={**DPO, **changes.pop("dpo", {})}, **changes)
    return made.model_copy(update={name: None for name in STAGES if name not in stages})


def told(c: Config) -> Told:
    """Examines a run on one device."""
    file = io.StringIO()
    code = examine(c.model_copy(update={"mesh": c.mesh.model_copy(update={"data": 1, "fsdp": 1})}), Console(file=file))
    return Told(code, file.getvalue())
