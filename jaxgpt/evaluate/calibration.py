"""Whether a reward model is as sure as it is right: its probability that a response is preferred, against how often.

Everything here takes `logits`: for each pair the score of the response that people preferred minus that of the other,
in units in which the model's own probability of that is sigmoid(logit).
"""

from __future__ import annotations

from typing import Any

import numpy as np

BINS = 10
"""Bins of confidence, equally wide from 0.5 to 1."""
STEEPEST = 1e3
"""A slope beyond this is none: every pair is right."""


def right(logits: np.ndarray) -> np.ndarray:
    """1 where the preferred response scores higher, 0 where lower, 0.5 where equal."""
    return 0.5 * (1.0 + np.sign(logits))


def calibration(logits: np.ndarray, bins: int = BINS) -> dict[str, Any]:
    """The calibration curve, its expected error and its slope, over [n] pairs.

    The model's confidence is the probability of what it prefers itself, sigmoid(|logit|), so that the labels' own
    order does not count. A bin has the mean confidence and the accuracy of its pairs; empty ones are left out. "ece" is
    the mean of |confidence - accuracy| over bins, weighted by pairs (expected calibration error, arXiv 1706.04599).
    """
    logits = np.asarray(logits, np.float64)
    confidence, hits = 1.0 / (1.0 + np.exp(-np.abs(logits))), right(logits)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    found = []
    for number in np.unique(place):
        inside = place == number
        found.append(
            {
                "low": 0.5 + 0.5 * int(number) / bins,
                "high": 0.5 + 0.5 * (int(number) + 1) / bins,
                "pairs": int(inside.sum()),
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(hits[inside].mean()),
            }
        )
    ece = sum(b["pairs"] * abs(b["confidence"] - b["accuracy"]) for b in found) / len(logits)
    return {"bins": found, "ece": float(ece), "slope": slope(logits)}


def slope(logits: np.ndarray) -> float | None:
    """The factor of the logits under which the labels are likeliest: 1 where the model is as sure as it should be, less
    where it is too sure. None where no factor is: all pairs right, or all scores equal. Found by Newton's method."""
    logits = np.asarray(logits, np.float64)
    if not np.any(logits < 0) or not np.any(logits > 0):
        return None
    factor = 0.0
    for _ in range(100):
        doubt = 1.0 / (1.0 + np.exp(np.clip(factor * logits, -500, 500)))
        gradient, curvature = np.mean(logits * doubt), np.mean(np.square(logits) * doubt * (1.0 - doubt))
        step = gradient / max(curvature, 1e-12)
        factor += float(np.clip(step, -1.0 - abs(factor), 1.0 + abs(factor)))
        if abs(step) < 1e-10 * max(abs(factor), 1.0):
            break
    return factor if abs(factor) < STEEPEST else None
