"""The figures of a run: report.json, and the table of the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table

from jaxgpt.report.collect import Run, Stage, read_run
from jaxgpt.report.numbers import DASH, count, decimal, duration, percent
from jaxgpt.runs import ALIGNED

TITLES = {
    "pretrain": "Pretraining",
    "sft": "Supervised fine-tuning",
    "reward": "Reward model",
    "ppo": "PPO",
    "dpo": "DPO",
    "grpo": "GRPO",
    "rloo": "RLOO",
    "rejection": "Rejection sampling",
}


def report_figures(run: Run) -> dict[str, Any]:
    """The content of report.json; what a run does not have is absent, and a number that is not finite is null."""
    stages = run.stages
    seconds = {name: stage.seconds for name, stage in stages.items() if stage.seconds is not None}
    if "seconds" in run.results:
        seconds["evaluate"] = float(run.results["seconds"])
    seconds |= run.parts
    sections = {
        "pretrain": _pretrain(stages["pretrain"]) if "pretrain" in stages else None,
        "sft": _sft(stages["sft"], run.results) if "sft" in stages else None,
        "reward": _reward(stages["reward"], run.results) if "reward" in stages else None,
        **{name: _aligned(stages[name], run.results) for name in ALIGNED if name in stages},
        "warnings": {name: [dict(told) for told in stage.warnings] for name, stage in stages.items() if stage.warnings},
        "base": _base(run.results),
        "alignment": list(run.alignment) or None,
        "overopt": dict(run.study),
        "exact_prompts": run.results.get("exact_prompts"),
        "seconds": sum(seconds.values()) if seconds else None,
        "seconds_by_stage": seconds,
        "params": run.params,
        "environment": run.environment,
        "config": dict(run.config),
    }
    return _finite({key: value for key, value in sections.items() if value not in (None, {})})


def summary_table(run: Path) -> Table:
    """Reads a run folder; one line for each stage: steps, tokens, time, tokens/s and what it came to."""
    found = read_run(run)
    figures = report_figures(found)
    table = Table(title=f"{found.name}: what came out", title_justify="left")
    table.add_column("stage")
    for name in ("steps", "tokens", "time", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("result")
    for stage in found.stages.values():
        steps = count(stage.steps) if stage.done else f"{count(stage.steps)} (unfinished)"
        speed = count(stage.tokens_per_second)
        result = key_result(figures, stage.name)
        table.add_row(stage.name, steps, count(stage.tokens), duration(stage.seconds), speed, result)
    return table


def key_result(figures: Mapping[str, Any], name: str) -> str:
    """What a stage came to, in a few words; `figures` is the content of report.json."""
    found = figures[name]
    if name == "pretrain":
        return _loss(found)
    if name == "sft":
        exact = [f"{kind} {percent(value)}" for kind, value in found.get("heldout_exact", {}).items()]
        return f"exact on held-out {', '.join(exact)}" if exact else _loss(found)
    if name == "reward":
        right = f"{percent(found.get('heldout_accuracy'), 1)} of held-out pairs right"
        ece = found.get("calibration", {}).get("ece")
        return right if ece is None else f"{right}, calibration error {decimal(ece, 3)}"
    parts = []
    if found.get("heldout_accuracy") is not None:
        parts.append(f"{percent(found['heldout_accuracy'], 1)} of held-out pairs right")
    if found.get("gold_after") is not None and found.get("gold_before") is not None:
        parts.append(f"gold score from {decimal(found['gold_before'])} to {decimal(found['gold_after'])}")
    held = found.get("held_out") or {}
    if "gold_after" not in found and held.get("gold") is not None and held.get("gold_start") is not None:
        parts.append(f"gold score of held-out prompts from {decimal(held['gold_start'])} to {decimal(held['gold'])}")
    elif "gold_after" not in found and found.get("score_end") is not None:
        parts.append(f"score from {decimal(found['score_start'])} to {decimal(found['score_end'])}")
    if found.get("win_rate_vs_sft") is not None:
        parts.append(f"wins {percent(found['win_rate_vs_sft'])} of prompts against SFT")
    if found.get("kl") is not None:
        parts.append(f"KL {decimal(found['kl'])}")
    return ", ".join(parts) or DASH


def _loss(found: Mapping[str, Any]) -> str:
    return f"validation loss {decimal(found.get('val_nll'), 3)} nats per token"


def _pretrain(stage: Stage) -> dict[str, Any]:
    return _present(val_nll=stage.measured("nll"), tokens=stage.tokens, tokens_per_second=stage.tokens_per_second)


def _sft(stage: Stage, results: Mapping[str, Any]) -> dict[str, Any]:
    exact = results.get("stages", {}).get("sft", {}).get("exact")
    return _present(val_nll=stage.measured("nll"), heldout_exact=exact)


def _reward(stage: Stage, results: Mapping[str, Any]) -> dict[str, Any]:
    found = results.get("reward") or {}
    accuracy = found.get("accuracy", stage.measured("accuracy"))
    names = ("error", "best", "pairs", "by_margin", "by_kind", "pairs_by_kind", "calibration", "scores")
    return _present(heldout_accuracy=accuracy, **{name: found.get(name) for name in names})


def _aligned(stage: Stage, results: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage made of the SFT model."""
    before = results.get("stages", {}).get("sft") or {}
    after = results.get("stages", {}).get(stage.name) or {}
    return _present(
        heldout_accuracy=stage.measured("rewards/accuracies"),
        heldout_margin=stage.measured("rewards/margins"),
        score_start=_early(stage, "objective/scores"),
        score_end=_recent(stage, "objective/scores"),
        held_out=_held_out(stage),
        gold_before=before.get("gold"),
        gold_after=after.get("gold"),
        reward_before=before.get("reward"),
        reward_after=after.get("reward"),
        kl=after.get("kl", _recent(stage, "objective/kl")),
        eos_rate=after.get("eos_rate", _recent(stage, "objective/eos_rate")),
        win_rate_vs_sft=after.get("win_rate_vs_sft"),
        gold_by_kind_before=before.get("gold_by_kind"),
        gold_by_kind_after=after.get("gold_by_kind"),
        heldout_exact=after.get("exact"),
    )


def _base(results: Mapping[str, Any]) -> dict[str, Any]:
    found = results.get("stages", {}).get("base") or {}
    return _present(
        chat_exact=results.get("base_chat_exact"),
        few_shot_exact=found.get("exact"),
        gold=found.get("gold"),
    )


def _recent(stage: Stage, key: str) -> float | None:
    """Mean over the last tenth of a stage's values, five at least: one rollout is noisy."""
    curve = stage.curve(key)
    return fmean(value for _, value in curve[-max(5, len(curve) // 10) :]) if curve else None


def _early(stage: Stage, key: str) -> float | None:
    """Mean of the first three: a good stage soon leaves its start."""
    curve = stage.curve(key)
    return fmean(value for _, value in curve[:3]) if curve else None


def _held_out(stage: Stage) -> dict[str, float] | None:
    """The evaluation within the stage, of the parameters that were handed on."""
    names = ("gold", "gold_error", "gold_start", "win_rate", "win_rate_error", "kl", "length", "eos_rate")
    found = {name: value for name in names if (value := stage.measured(name)) is not None}
    return found if "gold" in found else None


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _finite(value: Any) -> Any:
    """Replaces what JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
