"""`jaxgpt plan --isoflop`: the optimum of one's own runs, by parabolas and by a law of the loss.

Reads run folders; writes the file that is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from jaxgpt.config.planned import Fitted
from jaxgpt.config.schema import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.plan.flops import per_token
from jaxgpt.plan.laws import Law, Point, Power, Valley, budgets, fit, lacking, power, spread, valley
from jaxgpt.plan.show import line, put, short, table, title
from jaxgpt.plan.verb import write
from jaxgpt.plan.weights import count, weights
from jaxgpt.report.collect import read_run


def plan_fitted(folders: Sequence[Path], options: Fitted, console: Console | None = None) -> int:
    """Prints the runs, the least loss of each budget, and the laws; 1 where the runs are too few for any."""
    console = console or Console(highlight=False)
    points = [read_point(folder) for folder in folders]
    if len(points) < 2:
        raise UserError(f"--isoflop: found {len(points)} runs, expected several finished run folders")
    valleys = [valley(group) for group in budgets(points, options.tolerance)]
    title(console, f"{len(points)} runs of {len(valleys)} budgets")
    _show_runs(console, points)
    console.print()
    _show_valleys(console, valleys)
    sound = [one for one in valleys if not one.trouble]
    figures: dict[str, Any] = {"runs": [point._asdict() for point in points]}
    figures["budgets"] = [dataclasses.asdict(one) for one in valleys]
    parabolas = _parabolas(console, sound, options.budget)
    law = _law(console, points, options.budget)
    figures |= {"isoflop": parabolas, "law": None if law is None else dataclasses.asdict(law)}
    if options.out is not None:
        write(Path(options.out), figures)
    return 0 if parabolas or law else 1


def read_point(folder: Path) -> Point:
    """A finished pretraining run: size, tokens, operations and held-out loss.

    Raises UserError where it is not finished or has no held-out loss.
    """
    run = read_run(folder.parent if (folder / "done.json").is_file() else folder)
    stage = run.stages.get("pretrain")
    if stage is None or stage.done is None:
        raise UserError(f"{folder}: no finished pretraining there; the command that began it goes on with it")
    loss, tokens, size = stage.measured("nll"), stage.tokens, stage.done.get("params")
    if loss is None:
        raise UserError(f"{folder}: no held-out loss there; train it with data.val_fraction above 0")
    if tokens is None or size is None:
        raise UserError(f"{folder}/pretrain/done.json: no count of tokens or parameters; train it again")
    return Point(folder.name, size, tokens, tokens * _flops(folder, run.config, size), loss)


def _flops(folder: Path, values: Any, size: int) -> float:
    """Operations of a trained token, causal attention; the vocabulary is what the count of parameters leaves for it."""
    try:
        c = ModelConfig.model_validate(values["model"])
        length = int(values["pretrain"]["context"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'config.yaml'}: no model and pretrain.context as this version has them") from error
    rows = (size - count(weights(c, 0))) // (c.width * (1 if c.tied else 2))
    return per_token(c, weights(c, rows), length, length).train()


def _show_runs(console: Console, points: Sequence[Point]) -> None:
    made = table("run", "parameters", "tokens", "a parameter", "FLOPs", "loss")
    for point in sorted(points, key=lambda point: (point.flops, point.parameters)):
        ratio = f"{point.tokens / point.parameters:.3g}"
        made.add_row(
            point.name,
            short(point.parameters),
            short(point.tokens),
            ratio,
            f"{point.flops:.3g}",
            f"{point.loss:.4f}",
        )
    put(console, made)


def _show_valleys(console: Console, valleys: Sequence[Valley]) -> None:
    made = table("budget", "runs", "best size", "tokens", "loss", "", right=(1, 2, 3, 4))
    for one in valleys:
        sizes = (short(one.parameters), short(one.tokens), f"{one.loss:.4f}")
        made.add_row(f"{one.flops:.3g}", str(one.runs), *sizes, one.trouble, style="dim" if one.trouble else "")
    put(console, made)


def _parabolas(console: Console, sound: Sequence[Valley], budget: float | None) -> dict[str, Any] | None:
    """The power laws through the valleys."""
    if len(sound) < 2:
        told = f"{len(sound)} budgets with a least loss among their sizes; a power law needs 2, and 3 to be trusted"
        line(console, "IsoFLOP", f"too few: {told}", "yellow")
        return None
    flops = [one.flops for one in sound]
    sizes: Power = power(flops, [one.parameters for one in sound])
    tokens: Power = power(flops, [one.tokens for one in sound])
    trust = "" if len(sound) > 2 else " (2 budgets: a line through two points)"
    line(
        console,
        "IsoFLOP",
        f"N_opt = {sizes.scale:.3g} C^{sizes.exponent:.3f}, D_opt = {tokens.scale:.3g} C^{tokens.exponent:.3f}{trust}",
    )
    if budget is not None:
        told = f"{short(sizes.at(budget))} parameters, {short(tokens.at(budget))} tokens"
        line(console, f"at {budget:.3g}", f"{told}; {budget / max(flops):,.3g} times the largest budget")
    return {"N_opt": sizes._asdict(), "D_opt": tokens._asdict()}


def _law(console: Console, points: Sequence[Point], budget: float | None) -> Law | None:
    """The law of the loss, where the runs are enough for it."""
    missing = lacking(points)
    if missing:
        line(console, "L(N, D)", f"too few: {'; '.join(missing)}", "yellow")
        return None
    law = fit(points)
    low, high = spread(points)
    told = f"{law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"
    line(console, "L(N, D)", f"{told}; N_opt ~ C^{law.exponent:.3f}, 80 % of redrawn fits {low:.3f} to {high:.3f}")
    if high - low > 0.2:
        line(console, "", "so wide that the exponent is not told: more sizes or budgets are needed", "yellow")
    if budget is not None:
        best = law.optimum(budget)
        loss = f"loss {law.loss(*best):.3f}"
        line(console, f"at {budget:.3g}", f"{short(best.parameters)} parameters, {short(best.tokens)} tokens, {loss}")
    return law
