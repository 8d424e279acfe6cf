"""What was paid in KL for a reward: models on the way of a training run, measured from the one that they began as."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.table import Table

from jaxgpt.api import Model
from jaxgpt.errors import UserError
from jaxgpt.evaluate.answers import log_ratios
from jaxgpt.evaluate.formulas import mean_and_error
from jaxgpt.evaluate.judges import InWords, Judged, Scores
from jaxgpt.evaluate.named import Point, Results
from jaxgpt.evaluate.replies import Asked, Replies, Sampling
from jaxgpt.evaluate.win_rate import counts

COLUMNS = {
    "kl": "KL, k1",
    "kl_k3": "KL, k3",
    "proxy": "proxy",
    "gold": "gold",
}


def check_tokenizer(reference: Model, model: Model) -> None:
    """Raises UserError for models whose log-probabilities are of different tokens."""
    if reference.tokenizer.hash != model.tokenizer.hash:
        raise UserError(
            f"frontier: {model.folder} has another tokenizer than {reference.folder}, so there is no KL between them"
        )


def distances(reference: Model, replies: Replies, sampling: Sampling) -> dict[str, np.ndarray]:
    """KL of the replies' model from the reference by each response, nats, [M]: k1, the log-ratio, and k3, r - 1 - log r
    with r the reference's probability over the model's; both are summed over tokens and have no bias, and k3 is never
    below 0."""
    ratios = log_ratios(reference, replies.answers, sampling.temperature, sampling.batch)
    return {
        "kl": np.array([one.sum() for one in ratios]),
        "kl_k3": np.array([(np.expm1(-one) + one).sum() for one in ratios]),
    }


def point_results(
    point: Point,
    asked: Asked,
    replies: Replies,
    kl: dict[str, np.ndarray],
    proxy: Scores | None,
    judge: Scores | InWords | None,
    reference: Replies | None,
) -> Results:
    """What is known of one model, for JSON: means over prompts with their standard errors; the win rate where there is
    a judge and a `reference` to win against."""
    found: Results = {"model": str(point.folder), "group": point.group, "step": point.step}
    values = dict(kl)
    if proxy is not None:
        values["proxy"] = proxy.score(asked, replies)
    judged: Judged | None = None
    if judge is not None and reference is not None:
        judged = judge.compare(asked, replies, reference)
        if judged.scores is not None:
            values["gold"] = judged.scores[0]
    elif isinstance(judge, Scores):
        values["gold"] = judge.score(asked, replies)
    for name, one in values.items():
        found[name], found[f"{name}_error"] = mean_and_error(one)
    if judged is not None:
        found |= {key: value for key, value in counts(judged.outcomes).items() if key != "prompts"}
        if judged.asked_twice is not None:
            found["asked_twice"] = judged.asked_twice
    return found | {"tokens": float(np.mean(replies.tokens)), "ended": float(np.mean(replies.ended))}


def frontier_table(title: str, points: Sequence[Results]) -> Table:
    """A line for each model, the reference first."""
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("model", min_width=6, overflow="fold")
    shown = {key: name for key, name in COLUMNS.items() if any(key in point for point in points)}
    wins = any("win_rate" in point for point in points)
    for name in (*shown.values(), *(("win rate",) if wins else ()), "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        cells = [f"{point[key]:.2f} ± {point[f'{key}_error']:.2f}" if key in point else "" for key in shown]
        if wins:
            won = "{win_rate:.0%}, {interval[0]:.0%} to {interval[1]:.0%}"
            cells.append(won.format(**point) if "win_rate" in point else "")
        table.add_row(point["label"], *cells, f"{point['tokens']:.1f}")
    return table
