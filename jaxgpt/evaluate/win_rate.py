"""Which of two models answers better: wins, ties and losses over the same prompts, and what length does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from rich.table import Table

from jaxgpt.evaluate.answers import kind_of
from jaxgpt.evaluate.formulas import Vote, bradley_terry, length_controlled, mean_and_error, rating_intervals, wilson
from jaxgpt.evaluate.judges import Judged
from jaxgpt.evaluate.named import Results
from jaxgpt.evaluate.replies import Asked, Replies


def counts(outcomes: np.ndarray) -> Results:
    """Wins, ties, losses and the win rate, ties half, with its 95 % interval (Wilson's, over prompts)."""
    share = float(np.mean(outcomes))
    return {
        "prompts": int(outcomes.size),
        "wins": int(np.sum(outcomes == 1.0)),
        "ties": int(np.sum(outcomes == 0.5)),
        "losses": int(np.sum(outcomes == 0.0)),
        "win_rate": share,
        "interval": wilson(share, outcomes.size),
    }


def win_rate_results(asked: Asked, ours: Replies, theirs: Replies, judged: Judged) -> Results:
    """All that is known of a comparison, for JSON. Lengths are characters."""
    outcomes, longer = judged.outcomes, ours.lengths - theirs.lengths
    decided = (outcomes != 0.5) & (longer != 0)
    kinds: dict[str, list[float]] = defaultdict(list)
    for record, outcome in zip(asked.records, outcomes, strict=True):
        kinds[kind_of(record)].append(float(outcome))
    found = counts(outcomes) | {
        "length": {"ours": float(np.mean(ours.lengths)), "theirs": float(np.mean(theirs.lengths))},
        "longer_won": float(np.mean((longer > 0)[decided] == (outcomes == 1.0)[decided])) if decided.any() else None,
        "length_controlled": length_controlled(outcomes, longer),
        "ended": {"ours": float(np.mean(ours.ended)), "theirs": float(np.mean(theirs.ended))},
    }
    if judged.scores is not None:
        means = [mean_and_error(scores) for scores in judged.scores]
        found["scores"] = {
            side: {"mean": mean, "error": error} for side, (mean, error) in zip(("ours", "theirs"), means, strict=True)
        }
    if judged.asked_twice is not None:
        found["asked_twice"] = judged.asked_twice
    return found | {"by_kind": {kind: counts(np.array(values)) for kind, values in sorted(kinds.items())}}


def pairs(asked: Asked, ours: Replies, theirs: Replies, judged: Judged) -> Iterator[dict[str, Any]]:
    """One JSON object a prompt: what was asked, both responses, and who won."""
    for i, record in enumerate(asked.records):
        scores = {} if judged.scores is None else {"scores": [float(one[i]) for one in judged.scores]}
        won = {1.0: "ours", 0.0: "theirs"}.get(float(judged.outcomes[i]), "tie")
        asking = {"prompt": record["prompt"]} if "prompt" in record else {"messages": record["messages"]}
        yield {**asking, "ours": ours.texts[i], "theirs": theirs.texts[i], "won": won, **scores}


def win_rate_table(title: str, found: Results) -> Table:
    """Wins by kind and over all, with what to know about length and order below."""
    table = Table(title=title, title_justify="left", box=None, caption="\n".join(notes(found)), caption_justify="left")
    table.add_column("kind")
    for name in ("prompts", "wins", "ties", "losses", "win rate", "95 %"):
        table.add_column(name, justify="right", no_wrap=True)
    by_kind = found["by_kind"] if len(found["by_kind"]) > 1 else {}
    for kind, one in {**by_kind, "all": found}.items():
        low, high = one["interval"]
        cells = [f"{one[key]}" for key in ("prompts", "wins", "ties", "losses")]
        style = "bold" if kind == "all" else None
        table.add_row(kind, *cells, f"{one['win_rate']:.1%}", f"{low:.1%} to {high:.1%}", style=style)
    return table


def notes(found: Results) -> list[str]:
    """What to know before a win rate is believed."""
    length, said = found["length"], []
    if "scores" in found:
        ours, theirs = (f"{one['mean']:.3f} ± {one['error']:.3f}" for one in found["scores"].values())
        said.append(f"score {ours} against {theirs}")
    line = f"length {length['ours']:.0f} characters against {length['theirs']:.0f}"
    if found["longer_won"] is not None:
        line += f"; the longer response won {found['longer_won']:.0%} of the decided pairs"
    said.append(f"{line}; win rate at equal length {found['length_controlled']:.1%}")
    twice = found.get("asked_twice")
    if twice is not None:
        line = f"asked in both orders: {twice['flipped']} of {twice['compared']} verdicts flipped and count as ties"
        if twice["first_share"] is not None:
            line += f"; {twice['first_share']:.0%} of the verdicts are for the one shown first"
        said.append(line + (f"; {twice['unreadable']} of the replies had none" if twice["unreadable"] else ""))
    return said


def ratings_results(names: Sequence[str], outcomes: dict[tuple[int, int], np.ndarray], seed: int) -> Results:
    """Bradley-Terry ratings of models from all comparisons of two (by their places in `names`), for JSON; a reason in
    their place where there are none."""
    votes: list[Vote] = []
    for a, b in combinations(range(len(names)), 2):
        votes += [(names[a], names[b], float(outcome)) for outcome in outcomes[a, b]]
    try:
        ratings, intervals = bradley_terry(votes), rating_intervals(votes, seed=seed)
    except ValueError as error:
        return {"ratings": {}, "reason": str(error)}
    return {"ratings": {name: {"rating": ratings[name], "interval": intervals[name]} for name in ratings}}


def ratings_table(found: Results) -> Table:
    """Ratings, best first."""
    caption = f"no ratings: {found['reason']}" if "reason" in found else None
    table = Table("model", title="ratings (mean 1000, 400 a factor of ten in the odds)", box=None, caption=caption)
    table.title_justify = table.caption_justify = "left"
    table.add_column("rating", justify="right")
    table.add_column("95 %", justify="right")
    for name, one in found["ratings"].items():
        table.add_row(name, f"{one['rating']:.0f}", "{:.0f} to {:.0f}".format(*one["interval"]))
    return table
