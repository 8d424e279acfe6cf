"""Figures of evaluations as plain functions of NumPy arrays.

Letters: M prompts, S samples of each, K models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Vote = tuple[str, str, float]
"""Two models and the outcome for the first: 1 it won, 0 it lost, 0.5 a tie."""
SlopeAndBend = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
NORMAL_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""
MEAN, SCALE = 1000.0, 400.0 / math.log(10.0)
"""Ratings: their mean, and the points that a factor of e in the odds of winning is worth."""


def bon_kl(n: int) -> float:
    """KL of the best of n independent samples from one sample, nats: log n - (n - 1) / n.

    An upper bound, reached where no two samples score the same (Stiennon et al. 2020, appendix G.3; arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(proxy_scores: np.ndarray, gold_scores: np.ndarray, n: int) -> np.ndarray:
    """Expected gold score of the best of n samples by the proxy, from S >= n samples [..., S]; gives [...].

    The mean over all subsets of n samples, which has no bias (Nakano et al. 2021, arXiv 2112.09332, appendix I): the
    i-th smallest of S is the largest of a subset with probability C(i - 1, n - 1) / C(S, n). Samples that the proxy
    scores the same are chosen equally often. Raises ValueError where there are fewer samples than n.
    """
    proxy = np.asarray(proxy_scores, np.float64)
    size = proxy.shape[-1]
    if not 1 <= n <= size:
        raise ValueError(f"n is {n}, expected 1 to {size}, the number of samples")
    rank = np.arange(n + 1, size + 1)
    falling = np.concatenate([[1.0], np.cumprod(((rank - n) / (rank - 1))[::-1])])
    upto = np.cumsum(np.concatenate([np.zeros(n), (n / size) * falling[::-1]]))  # upto[i]: the first i hold the best
    order = np.sort(proxy, axis=-1)
    flat, ordered = proxy.reshape(-1, size), order.reshape(-1, size)
    below = np.stack([np.searchsorted(o, p, "left") for o, p in zip(ordered, flat, strict=True)])
    above = np.stack([np.searchsorted(o, p, "right") for o, p in zip(ordered, flat, strict=True)])
    weights = ((upto[above] - upto[below]) / (above - below)).reshape(proxy.shape)
    return np.sum(weights * np.asarray(gold_scores, np.float64), axis=-1)


def pass_at_k(n: int, correct: np.ndarray | int, k: int) -> np.ndarray:
    """Chance that at least one of k samples is right where `correct` [...] of n >= k were: 1 - C(n - c, k) / C(n, k).

    Without bias (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError for k above n and counts above n.
    """
    counts = np.asarray(correct)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, expected 1 to {n}, the number of samples")
    if counts.size and not 0 <= counts.min() <= counts.max() <= n:
        raise ValueError(f"{counts.min()} to {counts.max()} of {n} samples are right, expected 0 to {n}")
    known = np.array([1.0 - math.comb(n - c, k) / math.comb(n, k) for c in range(n + 1)])
    return known[counts]


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of values [M]; the error of a single value is not known: nan."""
    values = np.asarray(values, np.float64)
    error = float(np.std(values, ddof=1)) / math.sqrt(values.size) if values.size > 1 else math.nan
    return float(np.mean(values)), error


def wilson(share: float, n: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Wilson's score interval of a share of n trials. With ties counted as half a success it is wider than need be:
    half successes vary less than whole ones."""
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(centre - reach, 0.0), min(centre + reach, 1.0)


def length_controlled(outcomes: np.ndarray, longer: np.ndarray) -> float:
    """Win rate that would be expected between responses of the same length.

    Outcomes [M] are 1, 0.5 or 0 for the first model, `longer` [M] is by how much its responses are longer. The log-odds
    of a win are fitted as a + b tanh(longer / its standard deviation), and the result is sigmoid(a): AlpacaEval 2's
    control (Dubois et al. 2024, arXiv 2404.04475) without its term for the difficulty of an instruction. A weak normal
    prior (deviation 10) on a and b keeps them finite where one model always wins.
    """
    longer = np.asarray(longer, np.float64)
    spread = float(np.std(longer))
    x = np.stack([np.ones_like(longer), np.tanh(longer / spread) if spread > 0 else np.zeros_like(longer)], axis=1)

    def probability(ab: np.ndarray) -> np.ndarray:
        return 0.5 + 0.5 * np.tanh(0.5 * (x @ ab))

    def slope_and_bend(ab: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = probability(ab)
        return x.T @ (outcomes - p) - ab / 100.0, (x * (p * (1 - p))[:, None]).T @ x + np.eye(2) / 100.0

    ab = _climb(slope_and_bend, np.zeros(2))
    return float(0.5 + 0.5 * np.tanh(0.5 * ab[0]))


def bradley_terry(votes: Sequence[Vote]) -> dict[str, float]:
    """Ratings that make the votes likeliest where P(a beats b) = sigmoid((s_a - s_b) ln 10 / 400), of mean 1000; a tie
    is half a win for both. By name, best first.

    Raises ValueError where no finite ratings are the likeliest: the models fall in two groups of which one never lost
    to the other (Ford 1957).
    """
    names = sorted({name for a, b, _ in votes for name in (a, b)})
    place = {name: number for number, name in enumerate(names)}
    wins = np.zeros((len(names), len(names)))
    for a, b, outcome in votes:
        wins[place[a], place[b]] += outcome
        wins[place[b], place[a]] += 1.0 - outcome
    found = _ratings(wins)
    if found is None:
        raise ValueError("some models never lost to the others, or never met them: no finite ratings")
    return dict(sorted(zip(names, found.tolist(), strict=True), key=lambda item: -item[1]))


def rating_intervals(
    votes: Sequence[Vote], resamples: int = 1000, seed: int = 0, share: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Intervals of the ratings by a bootstrap over the votes, by name: percentiles of ratings of as many votes drawn
    with replacement. Draws that have no finite ratings are drawn again.

    Raises ValueError where the votes themselves have none, or hardly any draw does.
    """
    names = list(bradley_terry(votes))
    place = {name: number for number, name in enumerate(names)}
    pair = np.array([(place[a], place[b]) for a, b, _ in votes])
    outcome = np.array([float(outcome) for _, _, outcome in votes])
    rng, drawn = np.random.default_rng(seed), []
    for _ in range(10 * resamples):
        chosen = rng.integers(len(votes), size=len(votes))
        wins = np.zeros((len(names), len(names)))
        np.add.at(wins, (pair[chosen, 0], pair[chosen, 1]), outcome[chosen])
        np.add.at(wins, (pair[chosen, 1], pair[chosen, 0]), 1.0 - outcome[chosen])
        found = _ratings(wins)
        if found is not None:
            drawn.append(found)
        if len(drawn) == resamples:
            break
    else:
        raise ValueError("most draws of the votes have no finite ratings: too few votes")
    low, high = np.quantile(np.stack(drawn), [(1 - share) / 2, (1 + share) / 2], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}


def _ratings(wins_KK: np.ndarray) -> np.ndarray | None:
    """Ratings [K] from how often each model (row) beat each other; None where none are finite."""
    size = len(wins_KK)
    reached = (wins_KK > 0) | np.eye(size, dtype=bool)
    for _ in range(size):
        reached = (reached.astype(float) @ reached.astype(float)) > 0
    if not reached.all():
        return None
    met = wins_KK + wins_KK.T

    def slope_and_bend(s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        p = 0.5 + 0.5 * np.tanh(0.5 * (s[:, None] - s[None, :]))
        weight = met * p * (1 - p)
        bend = np.diag(weight.sum(axis=1)) - weight + 1.0 / size  # the last term holds the mean, which nothing moves
        return (wins_KK - met * p).sum(axis=1), bend

    strength = _climb(slope_and_bend, np.zeros(size))
    return MEAN + SCALE * (strength - strength.mean())


def _climb(slope_and_bend: SlopeAndBend, at: np.ndarray) -> np.ndarray:
    """Newton's way up a concave function, in steps of length 2 at most, to a slope of 1e-9 or as near as it gets.

    `slope_and_bend` gives the gradient [n] and minus the Hessian [n, n].
    """
    for _ in range(200):
        slope, bend = slope_and_bend(at)
        step = np.linalg.solve(bend, slope)
        at = at + step * min(1.0, 2.0 / max(float(np.linalg.norm(step)), 1e-12))
        if float(np.abs(slope).max()) < 1e-9:
            break
    return at
