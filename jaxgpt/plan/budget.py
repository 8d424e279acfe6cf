"""`jaxgpt plan --chinchilla`: sizes and tokens for a budget, and which published sizes are near.

Reads configs/model; writes the file that is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from jaxgpt.config.load import load
from jaxgpt.config.planned import Budgeted
from jaxgpt.plan.laws import BESIROGLU, Split, published
from jaxgpt.plan.show import line, put, short, table, title
from jaxgpt.plan.verb import write
from jaxgpt.plan.weights import count, weights

CONFIGS = Path("configs")
NEAR = 5
"""Published sizes that are shown."""


@dataclass(frozen=True)
class Sized:
    """A published size, and what a budget makes of it."""

    name: str
    parameters: int
    tokens: float
    loss: float
    """By the corrected law, nats per token of its authors' text."""


def plan_budget(options: Budgeted, console: Console | None = None) -> int:
    """Prints the optimum of a budget by each published way, and the nearest published sizes."""
    console = console or Console(highlight=False)
    splits, best = published(options.budget), BESIROGLU.optimum(options.budget)
    title(console, f"{options.budget:.3g} operations, spent as 6 x parameters x tokens")
    made = table("by", "parameters", "tokens", "a parameter")
    for name, split in splits.items():
        made.add_row(name, short(split.parameters), short(split.tokens), f"{split.tokens / split.parameters:.1f}")
    put(console, made)
    sizes = nearest_sizes(options.budget, best)
    if sizes:
        console.print()
        made = table("configs/model", "parameters", "tokens", "a parameter", "loss", "over the least")
        least = BESIROGLU.loss(*best)
        for one in sizes:
            made.add_row(
                one.name,
                short(one.parameters),
                short(one.tokens),
                f"{one.tokens / one.parameters:.1f}",
                f"{one.loss:.3f}",
                f"{one.loss - least:.3f}",
            )
        put(console, made)
        line(console, "note", "losses by the corrected law, nats a token of its authors' text", "dim")
    if options.out is not None:
        figures = {name: split._asdict() for name, split in splits.items()}
        near = {one.name: {"parameters": one.parameters, "tokens": one.tokens, "loss": one.loss} for one in sizes}
        write(Path(options.out), {"budget": options.budget, "optimum": figures, "near": near})
    return 0


def nearest_sizes(budget: float, best: Split) -> Sequence[Sized]:
    """The published sizes nearest to an optimum, small ones first; of equal counts the first by name."""
    files = sorted(CONFIGS.glob("*.yaml"))
    found: dict[int, Sized] = {}
    for path in sorted((CONFIGS / "model").glob("*.yaml")) if files else ():
        c = load(files[0], [f"model={path.stem}"]).config.model
        if c.vocab is not None:
            size = count(weights(c, c.vocab))
            tokens = budget / 6 / size
            found.setdefault(size, Sized(path.stem, size, tokens, BESIROGLU.loss(size, tokens)))
    near = sorted(found.values(), key=lambda one: abs(math.log(one.parameters / best.parameters)))[:NEAR]
    return sorted(near, key=lambda one: one.parameters)
