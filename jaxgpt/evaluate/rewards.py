"""How often a reward model agrees with rankings, by kind and by how sure it is, and how its scores are spread.

Each pair of responses of different rank counts once; ties in rank make no pair, and ties in score count half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from jaxgpt.api import Model
from jaxgpt.data.rankings import RankingRows
from jaxgpt.evaluate.calibration import calibration, right

MARGINS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Edges of the bins of |score difference|; the last bin is open."""
BARS = 24
"""Bins of the histogram of scores."""
NO_KIND = "all"
"""The kind of a record that names none."""


@dataclass(frozen=True)
class Pairs:
    """The pairs of a set of rankings, under one model's scores."""

    chosen: np.ndarray
    """Score of the better response, [pairs] float64."""
    rejected: np.ndarray
    """Score of the other."""
    ranking: np.ndarray
    """Number of the ranking that the pair is of."""
    kinds: Sequence[str]
    """Of each ranking."""
    best: np.ndarray
    """Whether a ranking's best response scores highest, [rankings]: a share where several score highest."""

    @property
    def difference(self) -> np.ndarray:
        """Better minus other."""
        return self.chosen - self.rejected

    def of(self, kind: str) -> np.ndarray:
        """Which pairs are of a kind, bool [pairs]."""
        return np.array([self.kinds[number] == kind for number in self.ranking], bool)


def score_pairs(model: Model, rows: RankingRows, batch: int) -> Pairs:
    """Scores every response once, `batch` at a time, and compares those of each ranking."""
    responses = [(number, ids) for number, ranking in enumerate(rows.rankings) for ids in ranking.ids]
    order = sorted(range(len(responses)), key=lambda i: len(responses[i][1]))  # rows of one pass are of similar lengths
    scores = np.zeros(len(responses))
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        scores[part] = model.score_tokens([responses[i][1].tolist() for i in part])
    pairs, best, at = [], [], 0
    for number, ranking in enumerate(rows.rankings):
        known = list(zip(scores[at : at + len(ranking.ids)].tolist(), ranking.ranks, strict=True))
        at += len(ranking.ids)
        highest, first = max(score for score, _ in known), min(ranking.ranks)
        top = [rank == first for score, rank in known if score == highest]
        best.append(sum(top) / len(top))
        for (a, rank_a), (b, rank_b) in combinations(known, 2):
            if rank_a != rank_b:
                pairs.append((a, b, number) if rank_a < rank_b else (b, a, number))
    columns = np.array(pairs, np.float64).reshape(-1, 3)
    kinds = [ranking.kind or NO_KIND for ranking in rows.rankings]
    return Pairs(columns[:, 0], columns[:, 1], columns[:, 2].astype(int), kinds, np.array(best))


def accuracy(pairs: Pairs, kind: str | None = None) -> dict[str, Any]:
    """Accuracy over pairs with its standard error (pairs of one ranking are not independent: over rankings), the share
    of rankings whose best response scores highest, and the numbers of both; of one kind, or of all."""
    inside = np.ones(len(pairs.chosen), bool) if kind is None else pairs.of(kind)
    hits, ranking = right(pairs.difference[inside]), pairs.ranking[inside]
    best = pairs.best[[kind in (None, found) for found in pairs.kinds]]
    if not len(hits):
        return {"accuracy": None, "error": None, "best": None, "pairs": 0, "rankings": len(best)}
    share = float(hits.mean())
    off = np.bincount(ranking, hits - share)
    return {
        "accuracy": share,
        "error": float(np.sqrt(np.sum(np.square(off))) / len(hits)),
        "best": float(best.mean()),
        "pairs": len(hits),
        "rankings": len(best),
    }


def reward_report(pairs: Pairs, gain: float) -> dict[str, Any]:
    """Everything about one model on one set of rankings, as JSON; `gain` is what its scores were multiplied by.

    accuracy, error, best, pairs, rankings; by_kind and pairs_by_kind; by_margin, bins of the score difference;
    calibration; scores, the histogram of better and other responses. Empty where no response is preferred.
    """
    whole = accuracy(pairs)
    if not whole["pairs"]:
        return {}
    kinds = {kind: found for kind in sorted(set(pairs.kinds)) if (found := accuracy(pairs, kind))["pairs"]}
    return {
        **whole,
        "by_kind": {kind: found["accuracy"] for kind, found in kinds.items()},
        "pairs_by_kind": {kind: found["pairs"] for kind, found in kinds.items()},
        "by_margin": by_margin(pairs.difference),
        "calibration": calibration(pairs.difference / gain),
        "scores": distribution(pairs.chosen, pairs.rejected),
    }


def by_margin(differences: np.ndarray) -> list[dict[str, Any]]:
    """Accuracy by the size of the score difference; empty bins are left out."""
    size, bins = np.abs(differences), []
    for low, high in zip(MARGINS, (*MARGINS[1:], None), strict=True):
        inside = differences[(size >= low) & (size < (np.inf if high is None else high))]
        if inside.size:
            found = {"low": low, "high": high, "pairs": int(inside.size), "accuracy": float(right(inside).mean())}
            bins.append(found)
    return bins


def distribution(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """Histograms of the scores of better and other responses over common edges, with means and deviations; a response
    counts once for each of its pairs."""
    low, high = float(min(chosen.min(), rejected.min())), float(max(chosen.max(), rejected.max()))
    edges = np.linspace(low, high if high > low else low + 1.0, BARS + 1)
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        "edges": edges.tolist(),
        **{
            name: {
                "counts": np.histogram(scores, edges)[0].tolist(),
                "mean": float(scores.mean()),
                "std": float(scores.std()),
            }
            for name, scores in sides.items()
        },
    }
