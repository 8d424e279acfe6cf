"""A reward model's accuracy on any file of rankings, by subset, as RewardBench tells it (arXiv 2403.13787).

Reads files of rankings and the run's folder.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from jaxgpt.config.options import Measures
from jaxgpt.data.records import expand
from jaxgpt.runs import finished, is_foreign

if TYPE_CHECKING:
    from jaxgpt.api import Model


def judging(run: Path, stage: str | None) -> str | None:
    """The stage of a run that scores responses: the one asked for, or its reward model."""
    return "reward" if stage is None and not is_foreign(run) and "reward" in finished(run) else stage


def measure_rankings(model: Model, wanted: Measures) -> Iterator[tuple[str, dict[str, Any]]]:
    """What there is to say of each file that is asked for. Raises UserError naming a record that cannot be used.

    "mean" is the leaderboard's figure, the mean of the subsets' accuracies, however large each is.
    """
    from jaxgpt.data.rankings import RankingRows, load_rankings
    from jaxgpt.evaluate.rewards import accuracy, reward_report, score_pairs

    model.needs("scalar", "rankings")
    for path in dict.fromkeys(path for pattern in wanted.rankings for path in expand(pattern)):
        began = time.monotonic()
        rows = load_rankings(path, model.tokenizer, model.config.context, None, "model", ties="half")
        rows = RankingRows(rows.rankings[: wanted.limit], rows.context, rows.responses)
        pairs = score_pairs(model, rows, wanted.batch)
        subsets = {kind: accuracy(pairs, kind) for kind in sorted(set(pairs.kinds))}
        known = [found["accuracy"] for found in subsets.values() if found["pairs"]]
        yield (
            path.name,
            {
                "rankings": str(path),
                "limit": wanted.limit,
                **reward_report(pairs, model.gain),
                "mean": fmean(known) if known else None,
                "subsets": subsets,
                "seconds": round(time.monotonic() - began, 2),
            },
        )


def ranking_rows(found: dict[str, Any]) -> Iterator[tuple[str, float | None, float | None]]:
    """(metric, value, standard error) as the table shows them."""
    if not found.get("pairs"):
        yield "pairs", 0, None
        return
    yield "accuracy", found["accuracy"], found["error"]
    subsets = {kind: one for kind, one in found["subsets"].items() if one["pairs"]}
    if len(subsets) > 1:
        yield "mean of subsets", found["mean"], None
        for kind, one in subsets.items():
            yield f"accuracy on {kind}", one["accuracy"], one["error"]
    if found["pairs"] > found["rankings"]:
        yield "best response on top", found["best"], None
    yield "calibration error", found["calibration"]["ece"], None
    yield "calibration slope", found["calibration"]["slope"], None
    yield "pairs", found["pairs"], None
