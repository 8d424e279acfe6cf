"""Episodes of a stage to read: the earliest ones beside the latest, and some from between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.report import numbers

MOST = 8
"""Rollouts shown at most, the first and the last among them."""


def episodes_view(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Columns of the page: "ends" are the first and the last rollout of samples.jsonl, "between" some of the others.

    None without a sample.
    """
    rollouts: dict[int, list[Mapping[str, Any]]] = {}
    for sample in samples:
        rollouts.setdefault(int(sample["step"]), []).append(sample)
    if not rollouts:
        return None
    columns = [_column(step, found) for step, found in sorted(rollouts.items())]
    ends = columns if len(columns) < 3 else [columns[0], columns[-1]]
    inner = columns[1:-1]
    stretch = max(1, -(-len(inner) // (MOST - 2)))
    return {"ends": ends, "between": inner[stretch // 2 :: stretch]}


def _column(step: int, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"step": step, "episodes": [_episode(sample) for sample in samples]}


def _episode(sample: Mapping[str, Any]) -> dict[str, Any]:
    facts = [
        f"{label} {numbers.decimal(sample[key])}"
        for key, label in (("score", "score"), ("kl", "KL"))
        if isinstance(sample.get(key), int | float)
    ]
    if isinstance(sample.get("length"), int):
        facts.append(f"{numbers.count(sample['length'])} tokens")
    if sample.get("ended") is False:
        facts.append("cut off")
    return {
        "prompt": str(sample.get("prompt", "")),
        "response": str(sample.get("response", "")),
        "facts": ", ".join(facts),
    }
