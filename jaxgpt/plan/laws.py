"""Laws of loss, size and data: those that were published, and fits to one's own runs.

L(N, D) = E + A / N^alpha + B / D^beta, nats per token, of N parameters after D tokens; a budget of C operations is
spent as C = 6 N D (Hoffmann et al. 2022, "Chinchilla", arXiv 2203.15556).

Letters: R runs, 5 numbers of the law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Split(NamedTuple):
    """How a budget is spent."""

    parameters: float
    tokens: float


@dataclass(frozen=True)
class Law:
    """The loss as a function of size and data."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        """Nats per token."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta

    @property
    def exponent(self) -> float:
        """a, in N_opt ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, budget: float) -> Split:
        """Size and data of the least loss with 6 N D = budget (Hoffmann et al., eq. 4)."""
        scale = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return Split(scale * (budget / 6) ** self.exponent, (budget / 6) ** (1 - self.exponent) / scale)


HOFFMANN = Law(E=1.6934, A=406.4, B=410.7, alpha=0.3392, beta=0.2849)
"""Approach 3 with the digits of the paper's source; its text rounds them (1.69, 0.34, 0.28), which is not the same."""
BESIROGLU = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""The same data fitted until convergence (Besiroglu et al. 2024, arXiv 2404.10102, table 1)."""

SIZES = (4e8, 1e9, 1e10, 6.7e10, 1.75e11, 2.8e11, 5.2e11, 1e12, 1e13)
TABLE_3 = (1.92e19, 1.21e20, 1.23e22, 5.76e23, 3.85e24, 9.90e24, 3.43e25, 1.27e26, 1.30e28)
"""Hoffmann et al., table 3: the operations with which SIZES are optimal by approach 1."""
TABLE_A3 = (1.84e19, 1.20e20, 1.32e22, 6.88e23, 4.54e24, 1.18e25, 4.19e25, 1.59e26, 1.75e28)
"""The same of approach 2, table A3."""


def tabled(budget: float, operations: Sequence[float]) -> Split:
    """The optimum by a table of operations for SIZES: between rows, and beyond them as between the last two, along
    straight lines of logarithms."""
    x, y = np.log(operations), np.log(SIZES)
    at = int(np.clip(np.searchsorted(x, math.log(budget)) - 1, 0, len(x) - 2))
    slope = (y[at + 1] - y[at]) / (x[at + 1] - x[at])
    parameters = math.exp(y[at] + slope * (math.log(budget) - x[at]))
    return Split(parameters, budget / 6 / parameters)


def published(budget: float) -> dict[str, Split]:
    """The optimum of a budget by each published way."""
    return {
        "Hoffmann 2022, approach 1": tabled(budget, TABLE_3),
        "Hoffmann 2022, approach 2": tabled(budget, TABLE_A3),
        "Hoffmann 2022, approach 3": HOFFMANN.optimum(budget),
        "Besiroglu 2024, corrected 3": BESIROGLU.optimum(budget),
    }


class Point(NamedTuple):
    """A finished run."""

    name: str
    parameters: float
    tokens: float
    flops: float
    loss: float
    """On held-out text, nats per token."""


@dataclass(frozen=True)
class Valley:
    """The parabola of loss over log N through the runs of one budget."""

    flops: float
    """Their geometric mean."""
    runs: int
    parameters: float
    """At its least."""
    tokens: float
    loss: float
    trouble: str = ""
    """Why it says nothing, where that is so."""


def budgets(points: Sequence[Point], tolerance: float) -> list[list[Point]]:
    """Runs by budget: sorted, a new one begins where it is more than the tolerance above the first."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.flops):
        if groups and point.flops <= groups[-1][0].flops * (1 + tolerance):
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def valley(group: Sequence[Point]) -> Valley:
    """The least loss of a budget (Hoffmann et al., section 3.2)."""
    flops = math.exp(sum(math.log(point.flops) for point in group) / len(group))
    n, loss = np.log([point.parameters for point in group]), np.array([point.loss for point in group])
    best = min(group, key=lambda point: point.loss)
    if len(np.unique(n)) < 3:
        told = f"{len(np.unique(n))} sizes, and a parabola needs 3"
        return Valley(flops, len(group), best.parameters, best.tokens, best.loss, told)
    centre = n.mean()
    curve = np.polyfit(n - centre, loss, 2)
    least = centre - curve[1] / (2 * curve[0])
    if curve[0] <= 0 or not n.min() <= least <= n.max():
        smaller = best.parameters <= math.exp(float(n.mean()))
        told = f"the least loss is not among its sizes: train a {'smaller' if smaller else 'larger'} one"
        return Valley(flops, len(group), best.parameters, best.tokens, best.loss, told)
    along = np.polyfit(n - centre, np.log([point.tokens for point in group]), 1)
    tokens = math.exp(np.polyval(along, least - centre))
    return Valley(flops, len(group), math.exp(least), tokens, float(np.polyval(curve, least - centre)))


class Power(NamedTuple):
    """y = scale x^exponent."""

    scale: float
    exponent: float

    def at(self, x: float) -> float:
        """y."""
        return self.scale * x**self.exponent


def power(x: Sequence[float], y: Sequence[float]) -> Power:
    """The power law nearest to points by least squares of logarithms."""
    exponent, log_scale = np.polyfit(np.log(x), np.log(y), 1)
    return Power(math.exp(log_scale), float(exponent))


LEAST_RUNS, LEAST_SIZES, LEAST_SPAN = 8, 3, 4.0
"""Below these, five numbers are not to be had from the runs: of sizes and of token counts each, and their ratios."""


def lacking(points: Sequence[Point]) -> list[str]:
    """What keeps L(N, D) from being fitted."""
    found = []
    if len(points) < LEAST_RUNS:
        found.append(f"{len(points)} runs, and at least {LEAST_RUNS} are needed for five numbers")
    for what, values in (
        ("sizes", [point.parameters for point in points]),
        ("token counts", [point.tokens for point in points]),
    ):
        if len(set(values)) < LEAST_SIZES:
            found.append(f"{len(set(values))} different {what}, and at least {LEAST_SIZES} are needed")
        elif max(values) < LEAST_SPAN * min(values):
            found.append(f"{what} that span a factor of {max(values) / min(values):.2g}; {LEAST_SPAN:g} is the least")
    return found


DELTA = 1e-3
"""Of the Huber loss, in log L: that of Hoffmann et al."""


def fit(points: Sequence[Point]) -> Law:
    """The law nearest to runs by the Huber loss of log L (Hoffmann et al., section 3.3 and eq. 3).

    E, A and B are linear, so that exponents are first looked for on a grid; then all five numbers are refined by damped
    Gauss-Newton steps with Huber's weights.
    """
    n, d, loss = (np.array([getattr(p, name) for p in points], float) for name in ("parameters", "tokens", "loss"))
    n0, d0 = math.exp(np.log(n).mean()), math.exp(np.log(d).mean())  # in units of the middle, exponents stand alone
    x, y = np.log(n / n0), np.log(d / d0)
    grid = np.linspace(0.05, 1.2, 24)
    begun = [(_linear(x, y, loss, alpha, beta), alpha, beta) for alpha in grid for beta in grid]
    begun = [(terms, alpha, beta) for terms, alpha, beta in begun if terms is not None]
    starts = [np.array([*np.log(terms), alpha, beta]) for terms, alpha, beta in begun]
    starts = sorted(starts, key=lambda theta: _huber(_residual(theta, x, y, loss)))[:8]
    if not starts:
        starts = [np.array([math.log(loss.min() * 0.9), *np.log([loss.min() * 0.05] * 2), 0.3, 0.3])]
    theta = min((_refined(start, x, y, loss) for start in starts), key=lambda t: _huber(_residual(t, x, y, loss)))
    e, a, b, alpha, beta = theta
    return Law(math.exp(e), math.exp(a) * n0**alpha, math.exp(b) * d0**beta, float(alpha), float(beta))


def _linear(x: np.ndarray, y: np.ndarray, loss: np.ndarray, alpha: float, beta: float) -> np.ndarray | None:
    """E, A and B by least squares of the relative error, where all come out positive."""
    columns = np.stack([np.ones_like(x), np.exp(-alpha * x), np.exp(-beta * y)], axis=1)
    terms, *_ = np.linalg.lstsq(columns / loss[:, None], np.ones_like(loss), rcond=None)
    return terms if np.all(terms > 0) else None


def _parts(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    e, a, b, alpha, beta = theta
    return math.exp(e), np.exp(a - alpha * x), np.exp(b - beta * y)


def _residual(theta: np.ndarray, x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Predicted less found log L, [R]."""
    E, in_n, in_d = _parts(theta, x, y)
    return np.log(E + in_n + in_d) - np.log(loss)


def _huber(residual: np.ndarray) -> float:
    size = np.abs(residual)
    return float(np.sum(np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2))))


def _refined(theta: np.ndarray, x: np.ndarray, y: np.ndarray, loss: np.ndarray) -> np.ndarray:
    damping, now = 1e-3, _huber(_residual(theta, x, y, loss))
    for _ in range(300):
        residual = _residual(theta, x, y, loss)
        E, in_n, in_d = _parts(theta, x, y)
        whole = E + in_n + in_d
        slopes = np.stack([np.full_like(x, E), in_n, in_d, -x * in_n, -y * in_d], axis=1) / whole[:, None]
        weight = np.minimum(1.0, DELTA / np.maximum(np.abs(residual), 1e-300))
        square, slope = slopes.T @ (weight[:, None] * slopes), slopes.T @ (weight * residual)
        step = np.linalg.solve(square + damping * (np.diag(np.diag(square)) + 1e-12 * np.eye(5)), -slope)
        made = theta + np.clip(step, -1.0, 1.0)
        then = _huber(_residual(made, x, y, loss))
        if then < now:
            done = now - then < 1e-14 * max(now, 1e-30)
            theta, now, damping = made, then, max(damping / 3, 1e-12)
            if done:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return theta


def spread(points: Sequence[Point], draws: int = 60) -> tuple[float, float]:
    """Where 80 % of the exponents a of N_opt ~ C^a lie in fits to runs drawn again with replacement; seed 0."""
    rng, found = np.random.default_rng(0), []
    for _ in range(draws):
        drawn = [points[i] for i in rng.integers(len(points), size=len(points))]
        if not lacking(drawn):
            found.append(fit(drawn).exponent)
    if not found:
        return 0.0, 1.0
    low, high = np.quantile(found, [0.1, 0.9])
    return float(low), float(high)
