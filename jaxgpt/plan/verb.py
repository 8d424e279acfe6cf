"""The verb: from a loaded config to tables and a JSON file.

Reads the run's tokenizer where there is one and files of rankings, to count them; writes the file that is asked for.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxgpt.config.load import load
from jaxgpt.config.planned import Planned
from jaxgpt.config.schema import Config, ModelConfig
from jaxgpt.data.records import expand
from jaxgpt.data.worlds import world_files
from jaxgpt.errors import UserError
from jaxgpt.plan.chips import Target, parse_target
from jaxgpt.plan.estimate import Estimate, as_json, estimate
from jaxgpt.plan.show import show_stage, show_total
from jaxgpt.runs import STAGES, resolved, run_folder


def plan(
    file: Path, config: Config, options: Planned, console: Console | None = None
) -> tuple[list[Estimate], Target, int]:
    """Prints what every stage of a config takes: the estimates, the machine, and 1 where one does not fit, else 0.

    Raises UserError for a target or a judge that is not known, and a config without stages.
    """
    console = console or Console(highlight=False)
    target = machine(options)
    stages = [name for name in STAGES if getattr(config, name) is not None]
    if not stages:
        raise UserError(f"there is nothing to plan: the config has none of the sections {', '.join(STAGES)}")
    judge = None if options.judge is None else model_named(file, options.judge)
    config = with_vocabulary(config)
    found: list[Estimate] = []
    for name in stages:
        counted = rankings(config) if name == "reward" else None
        found.append(estimate(config, name, target, options, counted, judge))
        show_stage(console, found[-1])
    show_total(console, found, target)
    if options.out is not None:
        write(Path(options.out), [as_json(one) for one in found])
    return found, target, 0 if all(one.fits for one in found) else 1


def machine(options: Planned) -> Target:
    """The target; a CPU has this machine's cores."""
    target = parse_target(options.target, options.slices)
    if target.chip.kind != "cpu":
        return target
    cores = dataclasses.replace(target.chip, flops=target.chip.flops * (os.cpu_count() or 1))
    return dataclasses.replace(target, chip=cores)


def model_named(file: Path, name: str) -> ModelConfig:
    """A model of the group that a config's `model=NAME` is looked up in. Raises ConfigError with the nearest name."""
    return load(file, [f"model={name}"]).config.model


def with_vocabulary(config: Config) -> Config:
    """The config with the rows of its embeddings: those that it says, or what its tokenizer needs, where that is there
    already."""
    if config.model.vocab is not None:
        return config
    folder = run_folder(config) / "tokenizer"
    given = config.tokenizer.path
    if given is None and not folder.is_dir():
        return config
    from jaxgpt.data.tokenizer import Tokenizer  # takes long to load, and is seldom needed

    size = Tokenizer.load(folder if folder.is_dir() else resolved(config, given or "")[0]).size
    return config.model_copy(update={"model": config.model.model_copy(update={"vocab": -(-size // 128) * 128})})


def rankings(config: Config) -> int | None:
    """Rankings that the reward stage learns from: lines of its files, or what `prepare` will make."""
    section = config.reward
    if section is None or section.data is None:
        return None
    total = 0
    made = (
        {str(run_folder(config) / "data" / name) for name in world_files(config.prepare)} if config.prepare else set()
    )
    for path in resolved(config, section.data.path):
        try:
            files = expand(path)
        except UserError:
            if str(Path(path)) not in made or not hasattr(config.prepare, "rankings"):
                return None
            total += config.prepare.rankings
            continue
        for one in files:
            if one.suffix != ".jsonl":
                return None
            with one.open("rb") as lines:
                total += sum(1 for line in lines if line.strip())
    return round(total * (1 - section.data.val_fraction))


def write(path: Path, figures: Sequence[Any] | dict[str, Any]) -> None:
    """Writes figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
