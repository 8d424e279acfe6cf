"""How a gold score follows the distance from where optimisation began (Gao et al. 2022, arXiv 2210.10760).

The distance is d = sqrt(KL), KL in nats from the first policy; a gain is a mean score minus the first policy's, so that
it is 0 at d = 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Form = Literal["bon", "rl"]
FARTHEST = 20.0
"""Of alpha / beta; a maximum of R_RL beyond is a fit of points that only rise."""


@dataclass(frozen=True)
class Law:
    """R_bon(d) = d (alpha - beta d) for best-of-n, R_RL(d) = d (alpha - beta log d) for reinforcement learning."""

    form: Form
    alpha: float
    beta: float
    r2: float
    """Share of the gains' variance that it explains."""

    def gain(self, d: np.ndarray | float) -> np.ndarray:
        """The gain at distances [...], in units of the score."""
        linear, bent = _features(self.form, np.asarray(d, np.float64))
        return self.alpha * linear + self.beta * bent

    @property
    def peak(self) -> float | None:
        """The distance at which the gain is largest; None where it has no maximum within reach."""
        if self.beta <= 0 or (self.alpha <= 0 and self.form == "bon"):
            return None
        if self.form == "bon":
            return self.alpha / (2 * self.beta)
        return math.exp(self.alpha / self.beta - 1) if self.alpha / self.beta < FARTHEST else None


def fit(form: Form, d: np.ndarray, gain: np.ndarray) -> Law:
    """The law nearest to points [n] by least squares, in which alpha and beta are linear.

    Raises ValueError for fewer than two points with d > 0, or none that differ.
    """
    d, gain = np.asarray(d, np.float64), np.asarray(gain, np.float64)
    if len(np.unique(d[d > 0])) < 2:
        raise ValueError(f"a law has two numbers, and there are {len(np.unique(d[d > 0]))} distances above 0")
    columns = np.stack(_features(form, d), axis=1)
    (alpha, beta), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    left = float(np.sum(np.square(gain - columns @ (alpha, beta))))
    spread = float(np.sum(np.square(gain - np.mean(gain))))
    return Law(form, float(alpha), float(beta), 1.0 - left / spread if spread > 0 else math.nan)


def _features(form: Form, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What alpha and beta are multiplied with; d log d is 0 at 0."""
    if form == "bon":
        return d, -np.square(d)
    return d, -d * np.log(np.where(d > 0, d, 1.0))
