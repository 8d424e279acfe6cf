"""Random arrays, and float64 twins of the means, for the tests of losses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

B, T, V, K = 8, 7, 16, 5
CLOSE = {"rtol": 1e-6, "atol": 1e-6}
NORM = 11.0
AGGREGATIONS = ("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "fixed-norm")


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def draw_mask(seed: int) -> np.ndarray:
    """The first row has no token."""
    mask = (np.random.default_rng(seed).random((B, T)) < 0.6).astype(np.float32)
    mask[0], mask[1, 0] = 0.0, 1.0
    return mask


def rankings(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, ranks and validity; the first prompt is all ties, later ones have 0 to K responses."""
    rng = np.random.default_rng(seed)
    scores, ranks = draw(seed, B, K, scale=2.0), rng.integers(1, 4, (B, K), dtype=np.int32)
    valid = np.arange(K) < rng.integers(0, K + 1, (B, 1))
    ranks[0], valid[0] = 2, True
    return scores, ranks, valid


def aggregate_by_hand(term: Callable[[int, int], float], mask: np.ndarray, how: str) -> float:
    """The mean of term(row, position), one token after the other."""
    rows = [[term(b, t) for t in range(T) if mask[b, t]] for b in range(B)]
    rows = [row for row in rows if row]
    tokens = sum(len(row) for row in rows)
    if how == "token-mean":
        return sum(sum(row) for row in rows) / tokens
    if how == "seq-mean-token-sum":
        return sum(sum(row) for row in rows) / len(rows)
    if how == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in rows) / len(rows)
    return sum(sum(row) for row in rows) / (NORM * len(rows))


def slope_by_hand(f: Callable[[np.ndarray], float], x: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of f, entry by entry, by central differences in float64."""
    x, slope = x.astype(np.float64), np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[place] += step
        down[place] -= step
        slope[place] = (f(up) - f(down)) / (2.0 * step)
    return slope
