"""Random rollouts for the tests of advantages."""

from __future__ import annotations

import numpy as np

B, T = 8, 9
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def draw_mask(seed: int) -> np.ndarray:
    """Two prompt positions, then responses of 1 to T - 2 tokens; the last row has none."""
    lengths = np.random.default_rng(seed).integers(1, T - 1, (B, 1))
    place = np.arange(T) - 2
    mask = ((place >= 0) & (place < lengths)).astype(np.float32)
    mask[-1] = 0.0
    return mask


def junk(mask: np.ndarray, x: np.ndarray, value: float) -> np.ndarray:
    return np.where(mask > 0, x, np.float32(value))
