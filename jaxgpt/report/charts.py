"""Line charts as inline SVG that stretches to any width, with its words in HTML so that they keep their size.

Everything is drawn in a square of 1000 x 1000 units; the page stretches it and keeps strokes as thick as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from markupsafe import Markup

from jaxgpt.report.collect import Point
from jaxgpt.report.numbers import compact, power

MOST_POINTS = 400
SIDE = 1000.0


@dataclass(frozen=True)
class Line:
    """One curve of a chart; `look` is a class of the page: raw, main, second, third, fourth, or dots; "dots mark main"
    are marks on a line of that colour, which the pointer passes over, "dots own" stand alone."""

    label: str
    points: Sequence[Point]
    look: str = "main"


@dataclass(frozen=True)
class Scale:
    """Maps values of low..high onto 0..SIDE, evenly or by their logarithm."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Place of a value, held inside the axis."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, max(value, self.low)))
        return min(max(SIDE * (value - low) / (high - low), 0.0), SIDE)


def smooth(points: Sequence[Point]) -> list[Point]:
    """Mean over a window of about a thirtieth of the curve, centred so that it does not lag behind.

    It narrows towards the steep start, and at the end looks back only.
    """
    values = [value for _, value in points]
    reach = max(1, len(values) // 60)
    last = len(values) - 1
    for _ in range(2):
        sums = [0.0, *accumulate(values)]
        windows = [(i - min(reach, i), min(i + min(reach, i), last) + 1) for i in range(len(values))]
        values = [(sums[end] - sums[start]) / (end - start) for start, end in windows]
    return [(step, value) for (step, _), value in zip(points, values, strict=True)]


def thin_out(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most `most` points: the lowest and the highest of equal stretches, so that no spike is lost."""
    if len(points) <= most:
        return list(points)
    stretches = most // 2 - 1
    kept = {0, len(points) - 1}
    for n in range(stretches):
        inside = range(n * len(points) // stretches, (n + 1) * len(points) // stretches)
        kept |= {min(inside, key=lambda i: points[i][1]), max(inside, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round values inside low..high, about `wanted` of them, 1, 2, 2.5 or 5 times a power of ten apart."""
    rough = (high - low) / max(1, wanted - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    gap = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9)
    return [round(n * gap, 12) for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten inside low..high."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [round(factor * 10.0**power, 12) for power in powers for factor in (1, 2, 5)]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def y_scale(values: Sequence[float], log: bool, floor: float | None, ceiling: float | None) -> Scale:
    """An axis that holds all values with some air, or goes to the given ends."""
    low, high = min(values), max(values)
    if log and low > 0 and high / low >= 5:
        return Scale(low / 1.12, high * 1.12, log=True)
    air = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    low = low - air if floor is None else min(floor, low)
    high = high + air if ceiling is None else max(ceiling, high)
    return Scale(low, high if high > low else low + 1.0)


def line_chart(
    title: str,
    unit: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
    span: int = 1,
    x_title: str = "updates",
    x_ends: tuple[float, float] | None = None,
) -> Markup:
    """A figure of `lines` over the steps, `span` of three columns wide; or over what `x_title` says, between `x_ends`.

    Lines without points are left out, and a chart without lines is empty.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    values = [value for line in lines for _, value in line.points]
    y, x = y_scale(values, log, floor, ceiling), _steps(lines) if x_ends is None else Scale(*x_ends)
    y_ticks = log_ticks(y.low, y.high) if y.log else ticks(y.low, y.high)
    x_ticks = ticks(x.low, x.high, 5)
    grid = "".join(f"M0 {SIDE - y.at(tick):.1f}H{SIDE:.0f}" for tick in y_ticks)
    drawn = "".join(_path(line, x, y) for line in lines)
    scale = f"{', log scale' if y.log else ''}"
    return Markup(
        '<figure class="chart span{span}" data-of="{x_title}" data-x="{x0} {x1}" data-y="{y0} {y1} {log}">'
        '<figcaption><b>{title}</b> <span class="unit">{unit}{scale}</span>{legend}</figcaption>'
        '<div class="frame"><div class="y-axis">{y_labels}</div>'
        '<div class="plot"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{label}">'
        '<path class="grid" d="{grid}"/>{drawn}</svg></div>'
        '<div class="x-axis" data-title="{x_title}">{x_labels}</div></div></figure>'
    ).format(
        span=span,
        x_title=x_title,
        x0=x.low,
        x1=x.high,
        y0=y.low,
        y1=y.high,
        log=int(y.log),
        title=title,
        unit=unit,
        scale=scale,
        legend=_legend(lines),
        y_labels=_labels(y, y_ticks, "bottom"),
        label=f"{title}{', ' * bool(unit)}{unit}, {_reach(x, x_title)}: {_in_words(lines)}",
        grid=grid,
        drawn=Markup(drawn),
        x_labels=_labels(x, x_ticks, "left"),
    )


def _steps(lines: Sequence[Line]) -> Scale:
    """From 0 to the last step."""
    steps = [step for line in lines for step, _ in line.points]
    return Scale(min(0, *steps) if len(steps) > 1 else 0, max(max(steps), 1))


def _reach(x: Scale, title: str) -> str:
    return f"over {x.high:.0f} steps" if title == "updates" else f"over {title} from {x.low:.3g} to {x.high:.3g}"


def _path(line: Line, x: Scale, y: Scale) -> str:
    """Dots are strokes without length and with round ends: they stay round however the drawing is stretched."""
    places = [f"{x.at(step):.1f} {SIDE - y.at(value):.1f}" for step, value in thin_out(line.points)]
    dots = "dots" in line.look or len(places) == 1
    drawing = "".join(f"M{place}h0" for place in places) if dots else f"M{'L'.join(places)}"
    return Markup('<path class="{}" data-label="{}" d="{}"/>').format(f"line {line.look}", line.label, drawing)


def _labels(scale: Scale, values: Sequence[float], side: str) -> Markup:
    label = Markup('<span style="{}:{:.2f}%">{}</span>')
    write = power if max(abs(scale.low), abs(scale.high)) < 0.002 else compact
    return Markup("").join(label.format(side, scale.at(value) * 100 / SIDE, write(value)) for value in values)


def _legend(lines: Sequence[Line]) -> Markup:
    if len(lines) == 1 and not lines[0].label:
        return Markup("")
    entry = Markup('<span class="key {}">{}</span>')
    return Markup('<span class="legend">{}</span>').format(
        Markup("").join(entry.format(line.look, line.label) for line in lines if line.label)
    )


def _in_words(lines: Sequence[Line]) -> str:
    """What someone who cannot see the chart is told."""
    said = [line for line in lines if line.look != "raw"] or lines

    def value(point: Point) -> str:
        return f"{point[1]:.4g}"

    return "; ".join(f"{line.label} from {value(line.points[0])} to {value(line.points[-1])}".strip() for line in said)
