"""What the page shows of a study of over-optimisation: a chart for each proxy and method, and their laws in a table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxgpt.evaluate.laws import Form, Law
from jaxgpt.report.charts import Line, line_chart
from jaxgpt.report.collect import Point
from jaxgpt.report.numbers import count, decimal, percent

METHODS: Mapping[str, tuple[str, Form]] = {"best_of_n": ("best-of-n", "bon"), "ppo": ("PPO", "rl")}
"""Title and law of each."""
DISTANCE = "√KL"
SMOOTH = 60
"""Points of a drawn law."""


def study_view(study: Mapping[str, Any]) -> dict[str, Any] | None:
    """Charts and rows of the page's section; None without a study. `study` is the content of overopt/results.json.

    All charts of a method have the same axes, so that proxies can be compared.
    """
    proxies = study.get("proxies") or {}
    if not proxies:
        return None
    curves = {(name, method): _gains(found, method) for name, found in proxies.items() for method in METHODS}
    values = [value for curve in curves.values() for points in curve for _, value in points]
    ends = {method: max(curve[0][-1][0] for key, curve in curves.items() if key[1] == method) for method in METHODS}
    charts = []
    for (name, method), curve in curves.items():
        title, form = METHODS[method]
        fitted = proxies[name][method]["fit"]
        charts.append(_chart(f"{name}, {title}", curve, fitted, form, values, ends[method]))
    rows = [_row(name, found, method) for name, found in proxies.items() for method in METHODS]
    return {"charts": charts, "rows": rows, "prompts": study.get("prompts")}


def turn(points: Sequence[Mapping[str, float]]) -> dict[str, Mapping[str, float]]:
    """The point of the highest gold score, and the one that is farthest from the first policy."""
    return {"peak": max(points, key=lambda point: point["gold"]), "end": max(points, key=lambda point: point["kl"])}


def distance(point: Mapping[str, float]) -> float:
    """sqrt(KL) of a point; an estimate of the KL may lie below 0."""
    return math.sqrt(max(point["kl"], 0.0))


def _gains(found: Mapping[str, Any], method: str) -> tuple[list[Point], list[Point]]:
    """Gains of gold score and proxy score over the first policy's, by distance."""
    points, start = sorted(found[method]["points"], key=distance), found["start"]
    gold, proxy = ([(distance(point), point[key] - start[key]) for point in points] for key in ("gold", "proxy"))
    return gold, proxy


def _chart(
    title: str,
    curve: tuple[list[Point], list[Point]],
    fitted: Mapping[str, float] | None,
    form: Form,
    values: Sequence[float],
    end: float,
) -> Markup:
    gold, proxy = curve
    lines = [Line("proxy score", proxy, "second"), Line("gold score", gold, "dots own")]
    if fitted is not None:
        law = Law(form, fitted["alpha"], fitted["beta"], fitted["r2"])
        places = [gold[-1][0] * n / SMOOTH for n in range(SMOOTH + 1)]
        drawn = [(d, float(law.gain(d))) for d in places]
        lines.append(Line(f"its law, R² {decimal(law.r2)}", drawn, "main"))
    air = 0.05 * (max(values) - min(values))
    return line_chart(
        title, "gain over the first policy", lines,
        floor=min(values) - air, ceiling=max(values) + air, x_title=DISTANCE, x_ends=(0.0, end),
    )  # fmt: skip


def _row(name: str, found: Mapping[str, Any], method: str) -> dict[str, Any]:
    points, fitted = found[method]["points"], found[method]["fit"] or {}
    ends = turn(points)
    return {
        "name": name,
        "size": count(found["params"]),
        "labels": f"{count(found['labels'])}, noise {found['noise']:g}",
        "accuracy": percent(found["accuracy"], 1),
        "method": METHODS[method][0],
        "start": decimal(found["start"]["gold"]),
        "peak": f"{decimal(ends['peak']['gold'])} at {decimal(distance(ends['peak']))}",
        "end": f"{decimal(ends['end']['gold'])} at {decimal(distance(ends['end']))}",
        "proxy": f"{decimal(found['start']['proxy'])} to {decimal(ends['end']['proxy'])}",
        "law": [decimal(fitted.get(key)) for key in ("alpha", "beta", "r2")],
    }
