"""Metrics of healthy stages, made up with noise, and ways to spoil one figure of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

from jaxgpt.health import Health, Limits, Notice

UPDATES = 4
"""Updates on one rollout."""
EPISODES = 16
"""Episodes of one: a mean of k1 has a variance of about 2 KL / EPISODES."""
Line = dict[str, Any]
Spoil = Mapping[str, Callable[[int], float | None]]
"""By figure: its value at a step."""


def rollout_lines(steps: int, spoil: Spoil | None = None) -> list[Line]:
    """PPO that goes well: the score rises, the KL stays small, every fourth line begins a rollout."""
    noise, spoil, lines = Random(0), spoil or {}, []
    for step in range(1, steps + 1):
        share, first = step / steps, step % UPDATES == 1
        line: Line = {
            "step": step,
            "loss": noise.gauss(0, 0.1),
            "grad_norm": noise.lognormvariate(-0.5, 0.7),
            "skipped": 0,
            "idle": 0,
            "tokens": 2048 * step,
            "policy/approxkl_avg": noise.uniform(0, 0.01),
            "policy/clipfrac_avg": noise.uniform(0, 0.1),
            "val/ratio": noise.gauss(1, 0.005),
            "val/ratio_max": noise.lognormvariate(0.7, 0.5),
            "val/ratio_gap": 3e-6 if first else noise.lognormvariate(-1, 1),
            "loss/value_avg": 0.25 * (1 - share) + noise.uniform(0, 0.05),
        }
        if first:
            line |= {
                "objective/kl": share + noise.gauss(0, (2 * share / EPISODES) ** 0.5),
                "objective/kl_k3": share * noise.lognormvariate(0, 0.3),
                "objective/kl_coef": 0.05 * (1 + share),
                "objective/scores": share + noise.gauss(0, 0.1),
                "objective/scores_std": noise.uniform(0.6, 1.0),
                "objective/entropy": 0.35 - 0.1 * share + noise.gauss(0, 0.02),
                "objective/length": 24 + noise.gauss(0, 2),
                "objective/eos_rate": min(1.0, noise.gauss(0.97, 0.03)),
                "objective/zero_std": noise.uniform(0.0, 0.6),
                "val/explained_variance": 0.8 * share + noise.gauss(0, 0.1),
                "val/sampler_gap": 4e-6,
            }
        lines.append(line | {name: at(step) for name, at in spoil.items() if name in line})
    return lines


def supervised_lines(steps: int, spoil: Spoil | None = None) -> list[Line]:
    """A loss that falls from 6.5 to 0.5."""
    noise, spoil, lines = Random(1), spoil or {}, []
    for step in range(1, steps + 1):
        loss = 0.5 + 6 * 0.95**step + noise.gauss(0, 0.05)
        line = {"step": step, "loss": loss, "nll": loss, "grad_norm": noise.lognormvariate(-1, 0.4), "skipped": 0}
        lines.append(line | {name: at(step) for name, at in spoil.items()})
    return lines


def evaluations(lines: list[Line], every: int, figures: Callable[[int], dict[str, float]]) -> list[Line]:
    """The lines, with an evaluation after each `every` steps."""
    return [
        one
        for line in lines
        for one in (
            [line, {"step": line["step"], "eval": figures(line["step"])}] if line["step"] % every == 0 else [line]
        )
    ]


def told(lines: list[Line], limits: Limits | None = None) -> list[Notice]:
    """All that is said of a series, as it would be read from the file."""
    health = Health(limits or Limits())
    return [notice for line in lines for notice in health.see(json.loads(json.dumps(line)))]
