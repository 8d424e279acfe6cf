"""Reads a run folder into values: what each stage logged, what the evaluation found, and the resolved config."""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

import yaml

from jaxgpt import places
from jaxgpt.errors import UserError, nearest
from jaxgpt.runs import ALIGNED, STAGES

Point = tuple[float, float]  # (step, value)


@dataclass(frozen=True)
class Stage:
    """One stage's log, in the order of its steps; where a resumed run wrote a step again, the later line counts."""

    name: str
    train: tuple[Mapping[str, Any], ...]
    evals: tuple[Mapping[str, Any], ...]
    done: Mapping[str, Any] | None
    """What the stage wrote when it was complete; None while it is not."""
    warnings: tuple[Mapping[str, Any], ...] = ()
    """What looked wrong with its figures."""
    samples: tuple[Mapping[str, Any], ...] = ()
    """Episodes that were kept to be read."""

    def curve(self, key: str) -> list[Point]:
        """Finite values of a training metric; "time/x" looks into the line's times."""
        return _points(self.train, key)

    def eval_curve(self, key: str) -> list[Point]:
        """Finite values of a validation metric."""
        return _points(self.evals, f"eval/{key}")

    @property
    def steps(self) -> int:
        """Updates made, whether or not the last ones were handed on."""
        if self.done:
            return int(self.done.get("trained", self.done["step"]))
        return int(self.train[-1]["step"]) if self.train else 0

    def measured(self, key: str) -> float | None:
        """A validation metric of the parameters that were handed on; the latest while the stage is not finished."""
        curve = self.eval_curve(key)
        handed = [value for step, value in curve if self.done and step == self.done["step"]]
        return handed[-1] if handed else curve[-1][1] if curve else None

    @property
    def tokens(self) -> int | None:
        """Tokens trained on."""
        last = self.done if self.done and "tokens" in self.done else (self.train[-1] if self.train else {})
        return last.get("tokens")

    @property
    def seconds(self) -> float | None:
        """Wall time of the stage."""
        if self.done and "seconds" in self.done:
            return float(self.done["seconds"])
        seconds = self.curve("time/seconds")
        return seconds[-1][1] if seconds else None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of the median step, so that compilation and evaluations do not count; in RL of the median rollout
        with its updates, for most updates have no rollout to wait for."""
        speeds, rollouts = self.curve("time/tokens_per_second"), [step for step, _ in self.curve("objective/scores")]
        groups: dict[int, list[float]] = {}
        for step, speed in speeds:
            groups.setdefault(bisect_right(rollouts, step) if rollouts else step, []).append(speed)
        return median(map(harmonic_mean, groups.values())) if groups else None


@dataclass(frozen=True)
class Run:
    """All that a report tells of a run."""

    folder: Path
    config: Mapping[str, Any]
    stages: Mapping[str, Stage]
    results: Mapping[str, Any]
    """What the evaluation wrote; empty before it ran."""
    parts: Mapping[str, float]
    """Seconds of what is no stage: data, tokenizer, token shards, evaluation."""
    alignment: tuple[Mapping[str, Any], ...] = ()
    """What comparisons of models by their responses wrote into evaluate/, by file name."""
    study: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a study of over-optimisation wrote; empty where there was none."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return str(self.config.get("name") or self.folder.resolve().name)

    @property
    def environment(self) -> Mapping[str, Any] | None:
        """Where the run's latest finished stage ran: python, jax, devices, platform and so on."""
        found = [
            stage.done["environment"] for stage in self.stages.values() if stage.done and "environment" in stage.done
        ]
        return found[-1] if found else None

    @property
    def finished(self) -> str | None:
        """When the latest finished stage ended, ISO 8601 (the time of its done.json where that does not say)."""
        found = [
            str(stage.done["finished"]) for stage in self.stages.values() if stage.done and "finished" in stage.done
        ]
        return found[-1] if found else None

    @property
    def params(self) -> int | None:
        """Parameters of the language model."""
        found = (self.stages[name].done for name in ("pretrain", "sft", *ALIGNED, "reward") if name in self.stages)
        return next((done["params"] for done in found if done and "params" in done), None)


def read_run(folder: Path) -> Run:
    """Reads a run folder; stages that left nothing yet are absent. UserError where it is none, or a file is damaged."""
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir() if path.is_dir()] if folder.parent.is_dir() else []
        raise UserError(f"{folder}: no such run folder.{nearest(folder.name, siblings)}")
    stages = {name: stage for name in STAGES if (stage := _read_stage(folder / name))}
    study = _read_object(folder / "overopt" / "results.json") or {}
    if not stages and not study:
        raise UserError(
            f"{folder}: no stage has written anything here; expected {', '.join(f'{name}/' for name in STAGES)} with "
            "metrics.jsonl. Give the folder of a run (runs/<name>), and run at least one stage first."
        )
    return Run(
        folder=folder,
        config=_read_config(folder / "config.yaml"),
        stages=stages,
        results=_read_object(folder / "evaluate" / "results.json") or {},
        parts=_read_object(folder / "parts.json") or {},
        alignment=_read_alignment(folder / "evaluate"),
        study=study,
    )


def _read_alignment(folder: Path) -> tuple[Mapping[str, Any], ...]:
    found = (_read_object(path) or {} for path in sorted(folder.glob("*.json")))
    return tuple(one for one in found if "measure" in one)


def _read_stage(folder: Path) -> Stage | None:
    done = _read_object(folder / "done.json")
    if done is not None and "finished" not in done:
        written = datetime.fromtimestamp(places.written(folder / "done.json")).astimezone()
        done |= {"finished": written.isoformat(timespec="minutes")}
    metrics = folder / "metrics.jsonl"
    train: dict[int, Mapping[str, Any]] = {}
    evals: dict[int, Mapping[str, Any]] = {}
    if metrics.is_file():
        for line in _read_lines(metrics):
            (evals if "eval" in line else train)[line["step"]] = line
    if done is None and not train and not evals:
        return None
    warnings, samples = (_read_all(folder / name) for name in ("warnings.jsonl", "samples.jsonl"))
    return Stage(
        name=folder.name,
        train=_ordered(train),
        evals=_ordered(evals),
        done=done,
        warnings=tuple(line for line in warnings if "text" in line),
        samples=tuple(samples),
    )


def _read_all(path: Path) -> list[Mapping[str, Any]]:
    return _read_lines(path) if path.is_file() else []


def _ordered(lines: Mapping[int, Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    return tuple(lines[step] for step in sorted(lines))


def _read_lines(path: Path) -> list[Mapping[str, Any]]:
    """The lines of metrics.jsonl and its like; a last line still being written (no line break yet) is left out."""
    text = path.read_bytes().decode(errors="replace")
    complete, _, _ = text.rpartition("\n")
    lines = []
    for number, line in enumerate(complete.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _damaged(path, number, f"not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            raise _damaged(path, number, f'expected an object with a whole number "step", found {line[:60]}')
        lines.append(value)
    return lines


def _read_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise _damaged(path, error.lineno, f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(value, dict):
        raise _damaged(path, 1, f"expected an object, found {type(value).__name__}")
    return value


def _read_config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _damaged(path, line, f"not YAML ({error.problem})") from None


def _damaged(path: Path, line: int, found: str) -> UserError:
    return UserError(f"{path}:{line}: {found}. The file is damaged: mend or delete the line, or run the stage again.")


def _points(lines: tuple[Mapping[str, Any], ...], key: str) -> list[Point]:
    first, _, rest = key.partition("/")
    points = []
    for line in lines:
        value = line.get(key)
        if value is None and isinstance(line.get(first), dict):
            value = line[first].get(rest)
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((line["step"], float(value)))
    return points
