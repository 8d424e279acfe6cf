"""What choosing the best of n responses by a proxy brings, and how often one of k is right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Table

from jaxgpt.evaluate.answers import kind_of
from jaxgpt.evaluate.formulas import best_of_n, bon_kl, mean_and_error, pass_at_k
from jaxgpt.evaluate.named import Results
from jaxgpt.evaluate.replies import Asked, Replies
from jaxgpt.graders import GRADES, grader


def right_answers(asked: Asked, replies: Replies, how: str) -> np.ndarray:
    """1 where a response is its record's answer, 0 where not, nan where the record has none, [M]."""
    grade = grader(GRADES[how], "grade")
    found = np.full(len(asked), np.nan)
    for i, (record, text) in enumerate(zip(asked.records, replies.texts, strict=True)):
        if record.get("answer") is not None:
            found[i] = grade(record, text, len(replies.answers.responses[i].tokens))
    return found


def best_of_results(
    numbers: Sequence[int], proxy_MS: np.ndarray | None, judge_MS: np.ndarray | None, right_MS: np.ndarray
) -> list[Results]:
    """For each n, over prompts: KL from one sample (its bound), and mean and standard error of the best by the proxy:
    the proxy's own score, the judge's, and the share that is right, where there are such."""
    curve = []
    for n in numbers:
        point: dict[str, Any] = {"n": n, "kl": bon_kl(n)}
        if proxy_MS is not None:
            scores = {"proxy": proxy_MS, "gold": judge_MS, "right": right_MS}
            for name, values_MS in scores.items():
                known = None if values_MS is None else ~np.isnan(values_MS).any(axis=1)
                if values_MS is not None and known is not None and known.any():
                    best = best_of_n(proxy_MS[known], values_MS[known], n)
                    point[name], point[f"{name}_error"] = mean_and_error(best)
        curve.append(point)
    return curve


def pass_results(numbers: Sequence[int], asked: Asked, right_MS: np.ndarray) -> list[Results]:
    """For each k the chance that one of k responses is right, over the prompts with an answer, all and by kind; empty
    where none has one. `asked` has each prompt once."""
    known = ~np.isnan(right_MS).any(axis=1)
    if not known.any():
        return []
    samples, kinds = right_MS.shape[1], defaultdict(list)
    counts = np.where(known, np.nan_to_num(right_MS).sum(axis=1), 0).astype(int)
    for i in np.flatnonzero(known):
        kinds[kind_of(asked.records[i])].append(i)
    found = []
    for k in numbers:
        chance = pass_at_k(samples, counts, k)
        mean, error = mean_and_error(chance[known])
        by_kind = {kind: float(np.mean(chance[rows])) for kind, rows in sorted(kinds.items())}
        found.append({"k": k, "share": mean, "error": error, "prompts": int(known.sum()), "by_kind": by_kind})
    return found


def best_of_table(title: str, curve: Sequence[Results], passes: Sequence[Results]) -> Table:
    """A line for each n."""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("n", justify="right")
    table.add_column("KL, at most", justify="right")
    shown = [name for name in ("proxy", "gold", "right") if name in curve[0]]
    for name in shown:
        table.add_column({"right": "chosen is right"}.get(name, name), justify="right")
    if passes:
        table.add_column("pass@n", justify="right")
    for number, point in enumerate(curve):
        cells = [f"{point['n']}", f"{point['kl']:.3f}"]
        for name in shown:
            style = ".1%" if name == "right" else ".3f"
            cells.append(f"{point[name]:{style}} ± {point[f'{name}_error']:{style}}")
        if passes:
            cells.append(f"{passes[number]['share']:.1%} ± {passes[number]['error']:.1%}")
        table.add_row(*cells)
    return table
