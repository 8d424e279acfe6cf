"""What is known of a stage's figures so far, and when one of them is worth a word."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import fmean, median, stdev
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Limits:
    """When a figure of metrics.jsonl is worth a word. Shares are of 1, KL and entropy in nats."""

    rollouts: int = 5
    """Rollouts whose mean counts; the first so many are the start that later ones are compared with."""
    updates: int = 20
    """The same for figures that every update has."""
    calm: int = 10
    """Measurements without a condition after which it counts as over, and is told again when it comes back."""
    negative_kl: float = 0.05
    """KL below minus this, nats a response, mean of twice `rollouts`, and below 0 by two standard errors of that.
    A true KL is never negative; its estimate k1 is by noise alone."""
    kl: float = 25.0
    """KL above both this, nats a response ..."""
    kl_per_token: float = 0.1
    """... and this, nats a token. Models of 1B parameters over-optimise at 50 to 85 nats in 53 tokens (2403.17031)."""
    coef_factor: float = 30.0
    """KL coefficient this many times its first value, or as many times smaller."""
    ratio_gap: float = 1e-2
    """Largest |ratio - 1| on a rollout's first update. Arithmetic in float32 leaves 1e-5; bfloat16 needs 0.1."""
    sampler_gap: float = 1e-2
    """Largest difference of a sampled token's log-probability, sampler against trainer, nats; bfloat16 needs 0.5."""
    ratio: float = 100.0
    """Largest ratio of any token (of any response in RLOO)."""
    approx_kl: float = 0.1
    """k2 of the policy from the one that made the episodes, nats a token; RLOO's, of a response, needs 1."""
    clipped: float = 0.5
    """Share of clipped tokens."""
    entropy: float = 0.3
    """Entropy below this share of the start's."""
    eos: float = 0.5
    """Rate of responses that end by themselves below this share of the start's ..."""
    eos_floor: float = 0.05
    """... or below this in any case."""
    length: float = 0.9
    """Mean length above this share of the longest response allowed, and a fifth above the start's."""
    longest: int | None = None
    """The longest response allowed, in tokens; unset where there is none."""
    explained: float = -0.5
    """Explained variance of the critic below this, median of twice `rollouts`."""
    value_loss: float = 10.0
    """Value loss this many times the start's."""
    scores_std: float = 1e-6
    """Standard deviation of a rollout's scores at most this, three times in a row."""
    zero_std: float = 0.95
    """Share of groups whose scores are all equal."""
    errors: float = 2.0
    """Gold score or win rate this many standard errors below its best, in two evaluations, while the score rose."""
    chosen: float = 1.0
    """DPO: the reward of the chosen responses fell by more than this many times the margin."""
    loss: float = 1.1
    """Loss of a supervised stage this many times the start's; half of what was gained lost again counts as well."""
    validation: float = 1.1
    """Validation loss this many times its lowest, in two evaluations."""
    gradient: float = 20.0
    """Gradient norm this many times the mean of the last 50."""
    skipped: float = 0.05
    """Share of the last 100 updates that were left out because something was not finite."""


@dataclass
class Series:
    """The values of one figure: the first ones, the latest ones, and the lowest mean of `window` of them."""

    window: int
    first: list[float] = field(default_factory=list)
    latest: deque[float] = field(default_factory=lambda: deque(maxlen=100))
    count: int = 0
    lowest: float = float("inf")

    def add(self, value: float) -> None:
        """Takes the next value."""
        self.count += 1
        self.latest.append(value)
        if len(self.first) < self.window:
            self.first.append(value)
        if self.count >= self.window:
            self.lowest = min(self.lowest, self.recent(self.window))

    @property
    def start(self) -> float:
        """Mean of the first `window` values."""
        return fmean(self.first)

    @property
    def last(self) -> float:
        """The latest value."""
        return self.latest[-1]

    def recent(self, number: int) -> float:
        """Mean of the latest `number` values, or of all where there are fewer."""
        return fmean(list(self.latest)[-number:])

    def error(self, number: int) -> float:
        """Standard error of that mean, from the spread of the values."""
        return stdev(list(self.latest)[-number:]) / number**0.5

    def middle(self, number: int) -> float:
        """Median of the latest `number` values."""
        return median(list(self.latest)[-number:])


class Evaluated(NamedTuple):
    """One evaluation of a figure that training does not see."""

    step: int
    value: float
    error: float
    """Its standard error; a twentieth of the value where the evaluation does not say."""
    score: float | None
    """What the reward said at the time, the mean of the latest rollouts; None before the first."""


class Found(NamedTuple):
    """A condition that holds."""

    value: float
    limit: float
    text: str
    """What is wrong, with figures, and what to change: a clause without the step and the full stop."""


@dataclass
class Record:
    """What is known of a stage's figures so far."""

    limits: Limits
    step: int = 0
    new: frozenset[str] = frozenset()
    """Names in the latest line."""
    series: dict[str, Series] = field(default_factory=dict)
    evaluated: dict[str, list[Evaluated]] = field(default_factory=dict)
    skipped: int = 0

    def of(self, name: str, least: int = 1) -> Series | None:
        """The series of a figure that has at least so many values."""
        series = self.series.get(name)
        return series if series is not None and series.count >= least else None

    def take(self, line: Mapping[str, Any]) -> None:
        """Adds a line of metrics.jsonl; figures that are not finite (null) are left out."""
        self.step = line["step"]
        inside = line.get("eval")
        if inside is not None:
            values = {f"eval/{name}": value for name, value in inside.items() if value is not None}
            self._evaluate(values)
        else:
            values = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "tokens")}
            if "skipped" in values:
                values["left out"] = float(values["skipped"] > self.skipped)
                self.skipped = int(values["skipped"])
            if "objective/scores" in values and "val/ratio_gap" in values:
                values["first ratio_gap"] = values["val/ratio_gap"]
        self.new = frozenset(values)
        for name, value in values.items():
            rare = name.startswith(("objective/", "val/explained", "first "))
            window = self.limits.rollouts if rare else self.limits.updates
            self.series.setdefault(name, Series(window)).add(float(value))

    def _evaluate(self, values: Mapping[str, float]) -> None:
        scores = self.of("objective/scores")
        score = None if scores is None else scores.recent(self.limits.rollouts)
        starts = {"gold": values.get("eval/gold_start"), "win_rate": 0.5 if "eval/gold_start" in values else None}
        for name, start in starts.items():
            if (value := values.get(f"eval/{name}")) is not None:
                error = values.get(f"eval/{name}_error", abs(value) / 20)
                known = self.evaluated.setdefault(name, [])
                if not known and start is not None and scores is not None:
                    known.append(Evaluated(0, start, error, scores.start))
                known.append(Evaluated(self.step, value, error, score))


class Symptom(NamedTuple):
    """A condition by name, the figure whose arrival is the time to look, and the look itself."""

    name: str
    figure: str
    look: Callable[[Record], Found | None]
