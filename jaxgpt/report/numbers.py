"""Numbers as people read them. A missing value is a dash."""

from __future__ import annotations

import math

GAP = "\u202f"  # narrow no-break space: between a number and its unit, and between groups of digits
DASH = "\u2013"
MINUS = "\u2212"


def count(value: float | None) -> str:
    """1234 -> "1 234", 868352 -> "868 k", 1228800 -> "1.23 M"."""
    if value is None:
        return DASH
    if abs(value) < 10_000:
        return f"{value:,.0f}".replace(",", GAP).replace("-", MINUS)
    for unit, scale in (("k", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if abs(value) < 999.5 * scale or unit == "T":
            return f"{_significant(value / scale, 3)}{GAP}{unit}"
    return DASH


def decimal(value: float | None, digits: int = 2) -> str:
    """0.634 -> "0.63"; a true minus sign."""
    if value is None or not math.isfinite(value):
        return DASH
    text = f"{value:.{digits}f}"
    return text.replace("-", "" if float(text) == 0 else MINUS)


def signed(value: float | None, digits: int = 2) -> str:
    """0.25 -> "+0.25"."""
    text = decimal(value, digits)
    return text if text in (DASH, decimal(0.0, digits)) or text.startswith(MINUS) else f"+{text}"


def percent(share: float | None, digits: int = 0) -> str:
    """0.906 -> "91 %"."""
    return DASH if share is None else f"{decimal(100 * share, digits)}{GAP}%"


def points(change: float | None) -> str:
    """A change of a share, in percentage points: -0.19 -> "−19"."""
    return DASH if change is None else signed(100 * change, 0)


def duration(seconds: float | None) -> str:
    """75 -> "1 min 15 s"."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{_significant(seconds, 2)}{GAP}s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}{GAP}min {rest}{GAP}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}{GAP}h {minutes}{GAP}min"
    days, hours = divmod(hours, 24)
    return f"{days}{GAP}d {hours}{GAP}h"


def compact(value: float) -> str:
    """A short exact form for the ticks of an axis: 0.0015 -> "0.0015", 20000 -> "20 k"."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return count(value)
    return f"{value:.6f}".rstrip("0").rstrip(".").replace("-", MINUS)


def power(value: float) -> str:
    """The same for axes of very small numbers: 0.00015 -> "1.5e−4"."""
    if value == 0:
        return "0"
    factor, _, exponent = f"{value:.2e}".partition("e")
    return f"{factor.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", MINUS)


def _significant(value: float, digits: int) -> str:
    """`digits` significant digits at least, never in exponent form."""
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", MINUS)
