"""How often a reward model agrees with rankings, by kind and by how sure it is."""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import Any

import numpy as np

from jaxgpt.api import Model
from jaxgpt.data.rankings import RankingRows

MARGINS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Edges of the bins of |score difference|; the last bin is open."""


def reward_accuracy(model: Model, rows: RankingRows, kinds: list[str], batch: int) -> dict[str, Any]:
    """Pair accuracy on held-out rankings (ties in rank make no pair, ties in score count half).

    Returns accuracy, pairs, by_kind and by_margin: bins of the model's own score difference.
    """
    items = [rows[i] for i in range(len(rows))]
    sequences = [item["tokens"][k, :n].tolist() for item in items for k, n in enumerate(item["lengths"]) if n > 0]
    found = np.concatenate([model.score_tokens(sequences[at : at + batch]) for at in range(0, len(sequences), batch)])
    scores = iter(found.tolist())
    pairs: list[tuple[str, float]] = []
    for item, kind in zip(items, kinds, strict=True):
        known = [(next(scores), int(rank)) for n, rank in zip(item["lengths"], item["ranks"], strict=True) if n > 0]
        for (a, rank_a), (b, rank_b) in combinations(known, 2):
            if rank_a != rank_b:
                pairs.append((kind, a - b if rank_a < rank_b else b - a))
    by_kind: dict[str, list[float]] = defaultdict(list)
    for kind, difference in pairs:
        by_kind[kind].append(_right(difference))
    differences = np.array([difference for _, difference in pairs])
    bins = []
    for low, high in zip(MARGINS, (*MARGINS[1:], None), strict=True):
        size = np.abs(differences)
        inside = differences[(size >= low) & (size < (np.inf if high is None else high))]
        if inside.size:
            accuracy = float(np.mean([_right(d) for d in inside]))
            bins.append({"low": low, "high": high, "pairs": int(inside.size), "accuracy": accuracy})
    return {
        "accuracy": float(np.mean([_right(d) for d in differences])),
        "pairs": len(pairs),
        "by_kind": {kind: float(np.mean(hits)) for kind, hits in sorted(by_kind.items())},
        "by_margin": bins,
    }


def _right(difference: float) -> float:
    return 0.5 if difference == 0 else float(difference > 0)
