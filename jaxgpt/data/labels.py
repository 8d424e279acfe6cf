"""What labellers make of scored responses: ranks, as rankings files have them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Any

Json = dict[str, Any]


def ranks(scores: Sequence[float], tie: float = 0.0) -> list[int]:
    """Ranks of scores, 1 the best; one that is within `tie` of the next better shares its rank."""
    order = sorted(range(len(scores)), key=lambda index: -scores[index])
    found = [1] * len(scores)
    for place, (better, worse) in enumerate(pairwise(order), start=2):
        found[worse] = found[better] if scores[better] - scores[worse] <= tie else place
    return found


def noisy_rankings(lines: Sequence[Json], noise: float, seed: int) -> list[Json]:
    """Rankings of records with "responses" and "gold", their scores: by score with Gaussian noise of deviation `noise`.

    A record whose responses are all felt as equal makes no ranking. The noise of a record does not depend on how many
    there are, and another deviation only scales it.
    """
    found = []
    for number, line in enumerate(lines):
        rng = Random(f"{seed}/{number}")
        ranking = {key: value for key, value in line.items() if key != "gold"}
        ranking["ranks"] = ranks([gold + noise * rng.gauss(0.0, 1.0) for gold in line["gold"]])
        if len(set(ranking["ranks"])) > 1:
            found.append(ranking)
    return found
