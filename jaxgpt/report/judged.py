"""What the report shows of a reward model beside its training: calibration, spread of scores, accuracy by margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxgpt.report import numbers
from jaxgpt.report.charts import Line, line_chart


def reward_charts(found: Mapping[str, Any]) -> list[Markup]:
    """The reliability diagram and the histogram of scores; `found` is the reward section of report.json."""
    charts = []
    if calibration := found.get("calibration"):
        charts.append(_reliability(calibration))
    if scores := found.get("scores"):
        charts.append(_histogram(scores))
    return charts


def margins(bins: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Bars of accuracy by the distance of the scores; empty bins are left out."""
    rows = []
    for item in bins:
        if not item.get("pairs") or item.get("accuracy") is None:
            continue
        low, high = item.get("low"), item.get("high")
        label = (
            f"{numbers.decimal(low, 1)} to {numbers.decimal(high, 1)}"
            if high is not None
            else f"over {numbers.decimal(low, 1)}"
        )
        rows.append({"label": label, "pairs": item["pairs"], "accuracy": item["accuracy"]})
    return rows


def _reliability(calibration: Mapping[str, Any]) -> Markup:
    """How often the model is right by how sure it is; on the diagonal it is as sure as it should be."""
    curve = [(item["confidence"], item["accuracy"]) for item in calibration["bins"]]
    unit = f"share right by confidence; error {numbers.decimal(calibration['ece'], 3)}"
    if calibration.get("slope") is not None:
        unit += f", slope {numbers.decimal(calibration['slope'])}"
    lines = [
        Line("as sure as right", [(0.5, 0.5), (1.0, 1.0)], "raw"),
        Line("this model", curve, "main"),
        Line("", curve, "dots"),
    ]
    return line_chart("Calibration", unit, lines, floor=0.5, ceiling=1.0, x_title="confidence", x_ends=(0.5, 1.0))


def _histogram(scores: Mapping[str, Any]) -> Markup:
    """The scores of better and of other responses, as two outlines."""
    edges = scores["edges"]

    def outline(counts: Sequence[int]) -> list[tuple[float, float]]:
        share = [count / max(sum(counts), 1) for count in counts]
        steps = [(edge, y) for n, y in enumerate(share) for edge in edges[n : n + 2]]
        return [(edges[0], 0.0), *steps, (edges[-1], 0.0)]

    sides = {"better": ("chosen", "main"), "other": ("rejected", "second")}
    lines = [
        Line(f"{label}: mean {numbers.decimal(scores[key]['mean'])}", outline(scores[key]["counts"]), look)
        for label, (key, look) in sides.items()
    ]
    ends = (edges[0], edges[-1])
    return line_chart("Scores", "share of pairs", lines, floor=0.0, span=2, x_title="score", x_ends=ends)
