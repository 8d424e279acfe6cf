"""Rankings as rows for a policy: the tokens of each response are its targets, those of the prompt are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from jaxgpt.data.rankings import Ranking, RankingRows
from jaxgpt.errors import UserError

Pairs = Literal["all", "extremes"]
"""Pairs made of a ranking: every one that is not a tie, or the best response with the worst."""


class PreferenceRows:
    """Rankings as rows: `rows[i]` is a dict of [K, context] arrays, int32 but `mask`, float32, and of "ranks" [K].

    tokens; targets (the next token); mask (1 where the target is the response's or the token that ends it); segments
    (1 on tokens, 0 on padding). K is the number of responses of the longest of the rankings, or 2 where only the
    `extremes` are kept (of equal ranks the first one). A response that a ranking lacks has rank 0 and no segment.
    Padding is 0 everywhere.
    """

    def __init__(self, rankings: Sequence[Ranking], context: int, pairs: Pairs = "all"):
        self.rankings = list(rankings)
        self.context = context
        self._kept = [_extremes(r.ranks) if pairs == "extremes" else range(len(r.ranks)) for r in self.rankings]
        self.responses = max(map(len, self._kept))
        """K; it may be raised."""

    def __len__(self) -> int:
        return len(self.rankings)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        shape = (self.responses, self.context)
        out = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
        out |= {"mask": np.zeros(shape, np.float32), "ranks": np.zeros(self.responses, np.int32)}
        ranking = self.rankings[row]
        for place, number in enumerate(self._kept[row]):
            ids, length = ranking.ids[number], len(ranking.ids[number]) - 1
            out["tokens"][place, :length] = ids[:-1]
            out["targets"][place, :length] = ids[1:]
            out["mask"][place, :length] = ranking.spans[number][1:]
            out["segments"][place, :length] = 1
            out["ranks"][place] = ranking.ranks[number]
        return out

    @property
    def pairs(self) -> int:
        """Pairs of different rank."""
        kept = [[r.ranks[number] for number in kept] for r, kept in zip(self.rankings, self._kept, strict=True)]
        return sum(better < worse for ranks in kept for better in ranks for worse in ranks)


def preferences(rows: RankingRows, pairs: Pairs = "all") -> PreferenceRows:
    """Rankings as a policy's rows.

    Raises UserError with file and line where a response has no token that the template marks as the assistant's.
    """
    for ranking in rows.rankings:
        for number, span in enumerate(ranking.spans):
            if not span[1:].any():
                raise UserError(
                    f"{ranking.where}: the chat template marks no token of response {number + 1} as the assistant's"
                )
    return PreferenceRows(rows.rankings, rows.context, pairs)


def _extremes(ranks: Sequence[int]) -> tuple[int, int]:
    return min(range(len(ranks)), key=ranks.__getitem__), max(range(len(ranks)), key=ranks.__getitem__)
