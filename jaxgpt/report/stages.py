"""What the page shows of a stage: its facts, its charts in groups, its warnings and its episodes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from jaxgpt.report import numbers
from jaxgpt.report.charts import Line, line_chart, smooth
from jaxgpt.report.collect import Point, Stage
from jaxgpt.report.episodes import episodes_view
from jaxgpt.report.figures import TITLES, key_result
from jaxgpt.report.judged import reward_charts
from jaxgpt.runs import ALIGNED


@dataclass(frozen=True)
class Chart:
    """Which metrics a chart shows; keys are of training lines, "eval/..." of evaluations."""

    title: str
    unit: str
    key: str
    label: str = ""
    """Of the first metric, where there is a second."""
    second: tuple[str, str] | None = None
    """Key and label of a second metric."""
    dots: tuple[str, str] | None = None
    """Key and label of what is measured now and then."""
    smoothed: bool = True
    log: bool = False
    floor: float | None = None
    ceiling: float | None = None
    span: int = 1
    first: bool = False
    """Only the first update of each rollout counts."""
    varied: bool = False
    """Left out where nothing ever changes."""


Group = tuple[str, Sequence[Chart]]
"""A heading, empty where a stage has one group alone, and its charts."""

VALIDATION = "validation"
LEARNING_RATE = Chart("Learning rate", "", "lr", smoothed=False, floor=0.0)
GRADIENT = Chart("Gradient norm", "before clipping", "grad_norm", floor=0.0)
SPEED = Chart("Speed", "tokens/s", "time/tokens_per_second", floor=0.0)
SKIPPED = Chart("Updates left out", "something was not finite", "skipped", smoothed=False, floor=0.0, varied=True)
LANGUAGE: Sequence[Group] = (
    (
        "",
        (
            Chart("Loss", "nats per token", "nll", log=True, span=3, dots=("eval/nll", VALIDATION)),
            LEARNING_RATE,
            GRADIENT,
            SPEED,
            SKIPPED,
        ),
    ),
)
REWARD: Sequence[Group] = (
    (
        "",
        (
            Chart("Accuracy", "share of pairs", "accuracy", ceiling=1.0, span=2, dots=("eval/accuracy", VALIDATION)),
            Chart("Loss", "nats per pair", "loss", dots=("eval/loss", VALIDATION)),
            Chart("Margin", "score of better minus worse", "margin"),
            LEARNING_RATE,
            GRADIENT,
            SKIPPED,
        ),
    ),
)
DPO: Sequence[Group] = (
    (
        "",
        (
            Chart(
                "Accuracy", "share of pairs", "rewards/accuracies",
                ceiling=1.0, span=2, dots=("eval/rewards/accuracies", VALIDATION),
            ),
            Chart("Loss", "of a ranking", "loss", dots=("eval/loss", VALIDATION)),
            Chart(
                "Margin", "reward of better minus worse", "rewards/margins",
                dots=("eval/rewards/margins", VALIDATION),
            ),
            Chart(
                "Rewards", "beta times the gain over the reference", "rewards/chosen",
                label="better response", second=("rewards/rejected", "worse response"),
            ),
            Chart(
                "Log-probability", "nats per response", "logps/chosen",
                label="better response", second=("logps/rejected", "worse response"),
            ),
            LEARNING_RATE,
            GRADIENT,
            SKIPPED,
        ),
    ),
)  # fmt: skip
ROLLOUTS: Sequence[Group] = (
    (
        "What it is rewarded for",
        (
            Chart(
                "Score", "mean of a rollout", "objective/scores",
                span=2, label="score", second=("objective/rlhf_reward", "score minus KL penalty"),
            ),
            Chart("Spread of the scores", "standard deviation", "objective/scores_std", floor=0.0),
            Chart(
                "Gold score", "held-out prompts", "eval/gold",
                smoothed=False, span=2, label="now", second=("eval/gold_start", "at the start"),
            ),
            Chart("Wins", "share of prompts against the start", "eval/win_rate", smoothed=False),
            Chart("Best of each prompt", "score", "objective/best_score"),
            Chart("Groups without a winner", "share of equal scores", "objective/zero_std", floor=0.0, ceiling=1.0),
        ),
    ),
    (
        "How far the policy moves",
        (
            Chart(
                "KL from the reference", "nats per response", "objective/kl",
                floor=0.0, span=2, label="k1", second=("objective/kl_k3", "k3"), dots=("eval/kl", "held-out prompts"),
            ),
            Chart("KL coefficient", "", "objective/kl_coef", smoothed=False, floor=0.0, varied=True),
            Chart("Entropy", "nats per token", "objective/entropy", floor=0.0),
            Chart("Approximate KL of an update", "k2, nats", "policy/approxkl_avg", floor=0.0),
            Chart("Clipped", "share", "policy/clipfrac_avg", floor=0.0),
            Chart("Ratio", "mean", "val/ratio"),
            Chart("Largest ratio", "in a minibatch", "val/ratio_max", log=True),
            Chart(
                "Ratio off 1", "largest, on the first update of a rollout", "val/ratio_gap",
                smoothed=False, log=True, first=True,
            ),
        ),
    ),
    (
        "What it says",
        (
            Chart("Length", "tokens per response", "objective/length", floor=0.0),
            Chart("Ended by itself", "share of responses", "objective/eos_rate", floor=0.0, ceiling=1.0),
            Chart("Loss", "nats per token of the best responses", "nll"),
            Chart("Pretraining loss", "nats per token", "loss/ptx"),
        ),
    ),
    (
        "What the critic knows",
        (
            Chart("Returns", "mean over tokens", "objective/returns"),
            Chart("Value loss", "", "loss/value_avg", floor=0.0),
            Chart("Explained variance", "of the returns", "val/explained_variance", ceiling=1.0),
            Chart("Clipped values", "share of tokens", "val/clipfrac_avg", floor=0.0),
        ),
    ),
    (
        "Optimiser and speed",
        (
            LEARNING_RATE,
            GRADIENT,
            SPEED,
            SKIPPED,
            Chart("Idle updates", "nothing to learn from", "idle", smoothed=False, floor=0.0, varied=True),
        ),
    ),
)  # fmt: skip
CHARTS: Mapping[str, Sequence[Group]] = {
    "pretrain": LANGUAGE,
    "sft": LANGUAGE,
    "reward": REWARD,
    **dict.fromkeys(ALIGNED, ROLLOUTS),
    "dpo": DPO,
}


def stage_view(figures: Mapping[str, Any], stage: Stage) -> dict[str, Any]:
    """What the page's template needs of a stage; `figures` is the content of report.json."""
    return {
        "id": stage.name,
        "title": TITLES[stage.name],
        "result": key_result(figures, stage.name),
        "finished": stage.done is not None,
        "facts": _facts(stage),
        "warnings": [str(warning["text"]) for warning in stage.warnings],
        "groups": [group for group in _groups(figures, stage) if group["charts"]],
        "episodes": episodes_view(stage.samples),
    }


def _facts(stage: Stage) -> list[tuple[str, str]]:
    waits = [value for _, value in stage.curve("time/wait")]
    skipped = [value for _, value in stage.curve("skipped")]
    facts = [
        ("Updates", numbers.count(stage.steps)),
        ("Tokens" if stage.name == "pretrain" else "Tokens, padding included", numbers.count(stage.tokens)),
        ("Time", numbers.duration(stage.seconds)),
        ("Tokens/s", numbers.count(stage.tokens_per_second)),
    ]
    if rollouts := len(stage.curve("objective/scores")):
        facts.insert(1, ("Rollouts", numbers.count(rollouts)))
    if stage.done and stage.done["step"] != stage.steps:
        facts.append(("Handed on: update", numbers.count(stage.done["step"])))
    if waits:
        facts.append(("Waiting for data", numbers.percent(sum(waits) / len(waits), 1)))
    if skipped and skipped[-1]:
        facts.append(
            ("Updates skipped", f"{numbers.count(skipped[-1])}, {numbers.percent(skipped[-1] / stage.steps, 1)}")
        )
    return facts


def _groups(figures: Mapping[str, Any], stage: Stage) -> Iterator[dict[str, Any]]:
    for number, (title, charts) in enumerate(CHARTS[stage.name]):
        terms = _reward_terms(stage) if number == 0 and CHARTS[stage.name] is ROLLOUTS else []
        drawn = [_draw(stage, chart) for chart in (*charts, *terms)]
        yield {"title": title, "charts": [chart for chart in drawn if chart]}
    if stage.name == "reward":
        yield {"title": "On held-out rankings", "charts": reward_charts(figures["reward"])}


def _reward_terms(stage: Stage) -> list[Chart]:
    """A chart for each reward, where there are several."""
    names = sorted({name for line in stage.train[:1] for name in line if name.startswith("rewards/")})
    return [Chart(f"Reward: {name.partition('/')[2]}", "before its weight", name) for name in names if len(names) > 1]


def _curve(stage: Stage, key: str, first: bool = False) -> list[Point]:
    found = stage.eval_curve(key.removeprefix("eval/")) if key.startswith("eval/") else stage.curve(key)
    if first:
        starts = {step for step, _ in stage.curve("objective/scores")}
        return [point for point in found if point[0] in starts]
    return found


def _draw(stage: Stage, chart: Chart) -> Markup:
    raw = _curve(stage, chart.key, chart.first)
    if not raw and chart.key == "nll" and CHARTS[stage.name] is LANGUAGE:
        raw = stage.curve("loss")
    if chart.varied and len({value for _, value in raw}) < 2:
        return Markup("")
    dots = _curve(stage, chart.dots[0]) if chart.dots else []
    second = _curve(stage, chart.second[0]) if chart.second else []
    if not second and not dots:
        chart = replace(chart, label="")
    label = chart.label or ("training, smoothed" if dots else "")
    smoothed = chart.smoothed and len(raw) > 8
    each = "each rollout" if chart.key.startswith("objective/") else "each update"
    lines = [Line(each if label else "", raw, "raw")] if smoothed else []
    lines.append(Line(label, smooth(raw) if smoothed else raw, "main"))
    if chart.second:
        lines.append(Line(chart.second[1], smooth(second) if smoothed else second, "second"))
    if chart.dots:
        lines.append(Line(chart.dots[1], dots, "dots"))
    return line_chart(
        chart.title, chart.unit, lines, log=chart.log, floor=chart.floor, ceiling=chart.ceiling, span=chart.span
    )
