"""What the report shows of models compared by their responses: win rates, best-of-n, and the frontier of KL and reward.

`found` are the results that `jaxgpt eval RUN` left in evaluate/, as report.json has them under "alignment".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from jaxgpt.report import numbers
from jaxgpt.report.charts import Line, line_chart
from jaxgpt.report.collect import Point

Results = Mapping[str, Any]
LOOKS = ("main", "second", "third", "fourth")
"""Looks of lines of which no one is the main one, in turn."""
SCORES = {"gold": "Judge's score", "proxy": "Proxy's score", "win_rate": "Win rate against the reference"}


def alignment_view(found: Sequence[Results]) -> dict[str, list[dict[str, Any]]]:
    """What the page draws, by the kind of measurement."""
    views = {"win_rate": _win_rate, "ratings": _ratings, "best_of": _best_of, "frontier": _frontier}
    return {measure: [view(one) for one in found if one["measure"] == measure] for measure, view in views.items()}


def _win_rate(one: Results) -> dict[str, Any]:
    kinds = one["by_kind"] if len(one["by_kind"]) > 1 else {}
    rows = [{"kind": kind, **counted} for kind, counted in kinds.items()]
    rows.append({"kind": "all", **{key: one[key] for key in ("prompts", "wins", "ties", "losses")}, **_share(one)})
    notes = [f"Judged by {one['judge']}."]
    if one.get("scores"):
        sides = [
            f"{numbers.decimal(side['mean'])} ± {numbers.decimal(side['error'])}" for side in one["scores"].values()
        ]
        notes.append(f"Its score: {sides[0]} against {sides[1]}.")
    lengths = [numbers.count(one["length"][side]) for side in ("ours", "theirs")]
    said = f"Length: {lengths[0]} characters against {lengths[1]}"
    if one.get("longer_won") is not None:
        said += f"; of the decided pairs the longer response won {numbers.percent(one['longer_won'])}"
    notes.append(f"{said}. At equal length the win rate would be {numbers.percent(one['length_controlled'], 1)}.")
    if twice := one.get("asked_twice"):
        said = f"Asked in both orders: {twice['flipped']} of {twice['compared']} verdicts flipped and count as ties"
        if twice.get("first_share") is not None:
            said += f"; {numbers.percent(twice['first_share'])} of the verdicts were for the one shown first"
        notes.append(f"{said}.")
    return {"title": f"{one['label']} against {one['against_label']}", "rows": rows, "notes": notes}


def _share(one: Results) -> dict[str, Any]:
    return {"win_rate": one["win_rate"], "interval": one["interval"]}


def _ratings(one: Results) -> dict[str, Any]:
    rows = [{"name": name, **rated} for name, rated in one["ratings"].items()]
    return {"rows": rows, "reason": one.get("reason"), "judge": one["judge"]}


def _best_of(one: Results) -> dict[str, Any]:
    curve, passes = one["curve"], one.get("pass_at_k") or []
    ends = (0.0, max(point["kl"] for point in curve) or 1.0)
    charts = []
    for key, look in (("gold", "main"), ("proxy", "second")):
        points = [(point["kl"], point[key]) for point in curve if point.get(key) is not None]
        charts.append(_over_kl(f"{SCORES[key]}, best of n by the proxy", "", {"": points}, ends, look))
    if passes:
        right = [(point["kl"], point["right"]) for point in curve if point.get("right") is not None]
        chance = [(point["kl"], passed["share"]) for point, passed in zip(curve, passes, strict=True)]
        lines = {"one of n is right (pass@n)": chance, "the one that the proxy chooses": right}
        charts.append(_over_kl("Right answers", "share of prompts", lines, ends))
    rows = [{**point, "passed": passed["share"]} for point, passed in zip(curve, passes, strict=True)] or curve
    chosen = f" by {one['proxy']}" if one.get("proxy") else ""
    return {
        "title": f"{one['label']}: the best of n responses{chosen}",
        "note": f"From {one['samples']} responses to each of {one['prompts']} prompts, without bias. "
        "KL is log n - (n - 1) / n, in nats, the most that choosing can be away from one response.",
        "charts": [chart for chart in charts if chart],
        "rows": rows,
        "columns": [key for key in ("proxy", "gold", "right", "passed") if rows[0].get(key) is not None],
    }


def _frontier(one: Results) -> dict[str, Any]:
    points = [point for point in one["points"] if point.get("kl") is not None]
    reference = next(point for point in points if point["reference"])
    groups = list(dict.fromkeys(point["group"] for point in points if not point["reference"]))
    ends = (0.0, 1.03 * max(point["kl"] for point in points) or 1.0)
    charts = []
    for key, title in SCORES.items():
        start = 0.5 if key == "win_rate" else reference.get(key)
        lines = {}
        for group in groups:
            own = [(point["kl"], point[key]) for point in points if point["group"] == group and key in point]
            lines[group] = [(0.0, start), *own] if start is not None else own
        unit = "ties half" if key == "win_rate" else "mean over prompts"
        charts.append(_over_kl(title, unit, lines, ends, path="raw"))
    shown = [key for key in ("kl", "kl_k3", "proxy", "gold", "win_rate") if any(key in point for point in points)]
    return {
        "title": f"KL from {one['label']}, and what it bought",
        "note": f"Points in the order of training. Nats a response at temperature {one['temperature']}, over "
        f"{one['prompts']} prompts; k1 is the mean log-ratio, k3 the mean of r - 1 - log r, which estimates the same "
        "and is never below 0.",
        "charts": [chart for chart in charts if chart],
        "rows": points,
        "columns": shown,
    }


def _over_kl(
    title: str,
    unit: str,
    lines: Mapping[str, Sequence[Point]],
    ends: tuple[float, float],
    look: str | None = None,
    path: str = "",
) -> Markup:
    """A chart of lines in the order of their points, with dots where something was measured."""
    drawn = []
    for number, (label, points) in enumerate(lines.items()):
        chosen = look or LOOKS[number % len(LOOKS)]
        drawn += [Line(label, points, f"{path} {chosen}".strip()), Line("", points, f"dots mark {chosen}")]
    return line_chart(title, unit, drawn, x_title="KL, nats", x_ends=ends)
