"""Builds report.html, one page that needs nothing beside it, and writes it next to report.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import yaml

from jaxgpt.places import write_whole
from jaxgpt.report import numbers
from jaxgpt.report.alignment import alignment_view
from jaxgpt.report.collect import Run, read_run
from jaxgpt.report.figures import TITLES, report_figures
from jaxgpt.report.judged import margins
from jaxgpt.report.stages import stage_view
from jaxgpt.report.study import study_view
from jaxgpt.runs import ALIGNED

SAMPLE_TITLES = {
    "base": "Base, plain continuation",
    "base_few_shot": "Base, few-shot",
    "sft": "SFT",
    **{name: TITLES[name] for name in ALIGNED},
}


def write_report(run: Path) -> Path:
    """Writes report.json and report.html into the run folder, each whole or not at all; returns the page's path.

    Raises UserError where the folder is no run or one of its files is damaged.
    """
    found = read_run(run)
    figures = report_figures(found)
    write_whole(run / "report.json", json.dumps(figures, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    page = run / "report.html"
    write_whole(page, render_page(found, figures))
    return page


def render_page(run: Run, figures: Mapping[str, Any]) -> str:
    """The page as text. Every word from the run passes through Jinja's escaping."""
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files("jaxgpt.report").joinpath(name).read_text(encoding="utf-8")),
    )
    environment.filters |= {
        name: getattr(numbers, name) for name in ("count", "decimal", "signed", "percent", "points", "duration")
    }
    template = environment.get_template("page.html")
    return template.render(
        name=run.name,
        finished=_date(run.finished),
        machine=_machine(run.environment),
        size=_size(run),
        figures=figures,
        highlights=_highlights(figures),
        sample_titles=SAMPLE_TITLES,
        samples=[sample for sample in run.results.get("samples", []) if any(sample.get(key) for key in SAMPLE_TITLES)],
        prompts=run.results.get("prompts"),
        tax=[table for name in ALIGNED for table in _tax_tables(figures, name)],
        stages=[stage_view(figures, stage) for stage in run.stages.values()],
        margins=margins(figures.get("reward", {}).get("by_margin") or []),
        reward_kinds=figures.get("reward", {}).get("by_kind") or {},
        reward_pairs=figures.get("reward", {}).get("pairs_by_kind"),
        alignment=alignment_view(figures.get("alignment", ())),
        study=study_view(run.study),
        environment=run.environment or {},
        config=yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True) if run.config else "",
    )


def _date(stamp: str | None) -> str:
    if stamp is None:
        return ""
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{moment.day} {moment:%B %Y, %H:%M}{f' {zone}' if (zone := moment.tzname()) else ''}"


def _machine(environment: Mapping[str, Any] | None) -> str:
    """Devices and processor in a few words."""
    if not environment:
        return ""
    devices, platform = environment.get("devices"), environment.get("platform")
    number = len(devices) if isinstance(devices, list) else devices
    what = (
        f"{number} {platform} device{'s' if number != 1 else ''}"
        if number and platform
        else str(platform or number or "")
    )
    cores = f"{environment['cpus']} processor cores" if environment.get("cpus") else None
    return ", ".join(str(part) for part in (what, environment.get("cpu"), cores) if part)


def _size(run: Run) -> str:
    model = run.config.get("model") or {}
    parts = [f"{numbers.count(run.params)} parameters"] if run.params else []
    if "layers" in model and "width" in model:
        parts.append(f"{model['layers']} layers of width {numbers.count(model['width'])}")
    if model.get("vocab"):
        parts.append(f"vocabulary {numbers.count(model['vocab'])}")
    if "context" in model:
        parts.append(f"context {numbers.count(model['context'])} tokens")
    return ", ".join(parts)


def _highlights(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """The strip of key figures: a number, what it is, and what it is to be compared with."""
    sections = {name: figures.get(name, {}) for name in ("pretrain", "sft", "reward", "base")}
    tiles = []

    def add(stage: str, value: str, label: str, note: str = "") -> None:
        tiles.append({"stage": stage, "value": value, "label": label, "note": note})

    if (nll := sections["pretrain"].get("val_nll")) is not None:
        add(
            "Pretraining",
            numbers.decimal(nll, 3),
            "validation loss, nats per token",
            f"perplexity {math.exp(min(nll, 50)):.3g}",
        )
    base, asked = sections["base"].get("chat_exact", {}), figures.get("exact_prompts", {})
    exact = sorted(sections["sft"].get("heldout_exact", {}).items(), key=lambda item: -asked.get(item[0], 0))
    for kind, value in exact[:2]:
        note = f"base model in chat form: {numbers.percent(base[kind])}" if kind in base else ""
        add("SFT", numbers.percent(value), f"exact on held-out {kind}", note)
    if "sft" in figures and "heldout_exact" not in sections["sft"] and "val_nll" in sections["sft"]:
        add("SFT", numbers.decimal(sections["sft"]["val_nll"], 3), "validation loss, nats per token")
    if (accuracy := sections["reward"].get("heldout_accuracy")) is not None:
        add("Reward model", numbers.percent(accuracy, 1), "of held-out pairs put right", "by chance: 50\u202f%")
    for name in ALIGNED:
        found, title = figures.get(name, {}), TITLES[name]
        if found.get("gold_after") is not None and found.get("gold_before") is not None:
            change = numbers.signed(found["gold_after"] - found["gold_before"])
            note = f"{change} against SFT at {numbers.decimal(found['gold_before'])}"
            add(title, numbers.decimal(found["gold_after"]), "gold score", note)
        if (rate := found.get("win_rate_vs_sft")) is not None:
            kl = f"at a KL of {numbers.decimal(found['kl'])} nats" if found.get("kl") is not None else ""
            add(title, numbers.percent(rate), "of prompts won against SFT", kl)
        if "gold_after" not in found and (held := found.get("held_out")) and held.get("gold") is not None:
            start = f"{numbers.decimal(held['gold_start'])} at the start" if held.get("gold_start") is not None else ""
            add(title, numbers.decimal(held["gold"]), "gold score of held-out prompts", start)
        elif "gold_after" not in found and found.get("score_end") is not None:
            note = f"{numbers.decimal(found['score_start'])} in the first rollouts"
            add(title, numbers.decimal(found["score_end"]), "score in the last rollouts", note)
        elif "gold_after" not in found and found.get("heldout_accuracy") is not None:
            add(title, numbers.percent(found["heldout_accuracy"], 1), "of held-out pairs put right")
    if warnings := figures.get("warnings"):
        note = ", ".join(f"{TITLES[name]} {len(told)}" for name, told in warnings.items())
        told = sum(map(len, warnings.values()))
        add("Health", str(told), "warnings" if told > 1 else "warning", note)
    return tiles


def _tax_tables(figures: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """SFT against what a stage made of it, by kind, once for the gold score and once for exact answers: where it gains
    and what that costs."""
    found, base = figures.get(name, {}), figures.get("base", {})
    gold = _versus(found.get("gold_by_kind_before"), found.get("gold_by_kind_after"), {}, {})
    if gold and found.get("gold_before") is not None and found.get("gold_after") is not None:
        whole = {
            "kind": "all",
            "before": found["gold_before"],
            "after": found["gold_after"],
            "others": [],
            "asked": None,
            "all": True,
        }
        gold.append(whole)
    others = {"base chat": base.get("chat_exact"), "base few\u2011shot": base.get("few_shot_exact")}
    others = {title: values for title, values in others.items() if values}
    asked = figures.get("exact_prompts", {})
    exact = _versus(figures.get("sft", {}).get("heldout_exact"), found.get("heldout_exact"), others, asked)
    scores = [row[side] for row in gold for side in ("before", "after")]
    tables = [
        _table("Gold score", gold, min([0.0, *scores]), max([1.0, *scores]), share=False, columns=()),
        _table("Exact answers", exact, 0.0, 1.0, share=True, columns=tuple(others)),
    ]
    return [table | {"after": TITLES[name]} for table in tables if table["rows"]]


def _versus(
    before: Mapping[str, float] | None,
    after: Mapping[str, float] | None,
    others: Mapping[str, Mapping[str, float]],
    asked: Mapping[str, int],
) -> list[dict[str, Any]]:
    """A row for each kind that both have; `asked` is how many prompts it has."""
    before, after = before or {}, after or {}
    return [
        {
            "kind": kind,
            "before": before[kind],
            "after": after[kind],
            "others": [values.get(kind) for values in others.values()],
            "asked": asked.get(kind),
            "all": False,
        }
        for kind in before
        if before[kind] is not None and after.get(kind) is not None
    ]


def _table(
    title: str, rows: list[dict[str, Any]], low: float, high: float, *, share: bool, columns: Sequence[str]
) -> dict[str, Any]:
    """A table of `_versus` rows with the places (percent of low..high) of its dots."""

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    placed = [row | {"x": [place(row["before"]), place(row["after"])]} for row in rows]
    asked = any(row["asked"] is not None for row in rows)
    return {"title": title, "rows": placed, "zero": place(0.0), "share": share, "columns": columns, "asked": asked}
