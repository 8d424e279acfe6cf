"""Writes a run folder as a finished run leaves it, with curves of a plausible shape."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

ENVIRONMENT = {
    "python": "3.11.7",
    "jax": "0.10.2",
    "devices": 2,
    "platform": "cpu",
    "cpus": 2,
}
CONFIG = {
    "name": "meadow",
    "seed": 0,
    "model": {"vocab": 512, "width": 128, "layers": 4, "context": 128, "attention": {"heads": 4}},
    "pretrain": {"steps": 300, "batch": 32, "context": 128, "optimizer": {"lr": 3e-3}},
    "ppo": {"iterations": 60, "episodes": 48, "kl": {"coef": 0.05}},
}
STEPS = {"pretrain": 300, "sft": 200, "reward": 150, "ppo": 120, "dpo": 100}
SPEEDS = {"pretrain": 4100.0, "sft": 3600.0, "reward": 5200.0, "ppo": 900.0, "dpo": 4000.0}
PEAKS = {"pretrain": 3e-3, "sft": 1e-3, "reward": 5e-4, "ppo": 1.5e-4, "dpo": 1e-4}
RESULTS: dict[str, Any] = {
    "prompts": 192,
    "exact_prompts": {"facts": 12, "sums": 60, "opposites": 20},
    "stages": {
        "base": {"exact": {"facts": 0.31, "sums": 0.22, "opposites": 0.4}, "gold": -0.81},
        "sft": {
            "exact": {"facts": 0.906, "sums": 0.56, "opposites": 1.0},
            "gold": 0.64,
            "gold_by_kind": {"facts": 1.18, "stories": 0.67, "sums": 0.41, "opposites": 1.5, "unknown": -0.12},
            "reward": 0.05,
            "eos_rate": 0.99,
            "length": 18.2,
        },
        "ppo": {
            "exact": {"facts": 0.78, "sums": 0.5, "opposites": 1.0},
            "gold": 0.89,
            "gold_by_kind": {"facts": 0.93, "stories": 1.73, "sums": 0.32, "opposites": 1.5, "unknown": 0.4},
            "reward": 0.91,
            "eos_rate": 1.0,
            "length": 21.4,
            "kl": 0.8,
            "win_rate_vs_sft": 0.71,
        },
        "dpo": {
            "exact": {"facts": 0.9, "sums": 0.55, "opposites": 1.0},
            "gold": 0.92,
            "gold_by_kind": {"facts": 1.2, "stories": 1.1},
            "eos_rate": 0.99,
            "length": 19.0,
            "kl": 1.5,
            "win_rate_vs_sft": 0.66,
        },
    },
    "base_chat_exact": {"facts": 0.0, "sums": 0.0, "opposites": 0.02},
    "reward": {
        "accuracy": 0.877,
        "by_margin": [
            {"low": 0.0, "high": 0.5, "pairs": 120, "accuracy": 0.67},
            {"low": 0.5, "high": 1.0, "pairs": 261, "accuracy": 0.81},
            {"low": 1.0, "high": 2.0, "pairs": 408, "accuracy": 0.92},
            {"low": 2.0, "high": None, "pairs": 163, "accuracy": 0.99},
            {"low": 4.0, "high": 5.0, "pairs": 0, "accuracy": None},
        ],
        "by_kind": {"facts": 0.86, "stories": 0.9, "sums": 0.79, "opposites": 0.95},
        "pairs_by_kind": {"facts": 210, "stories": 420, "sums": 240, "opposites": 82},
        "calibration": {
            "bins": [
                {"low": 0.5, "high": 0.55, "pairs": 60, "confidence": 0.52, "accuracy": 0.55},
                {"low": 0.7, "high": 0.75, "pairs": 130, "confidence": 0.73, "accuracy": 0.69},
                {"low": 0.95, "high": 1.0, "pairs": 762, "confidence": 0.98, "accuracy": 0.93},
            ],
            "ece": 0.0473,
            "slope": 0.81,
        },
        "scores": {
            "edges": [-2.0, -1.0, 0.0, 1.0, 2.0],
            "chosen": {"counts": [52, 200, 400, 300], "mean": 0.62, "std": 0.9},
            "rejected": {"counts": [320, 380, 200, 52], "mean": -0.55, "std": 0.95},
        },
    },
    "samples": [
        {
            "prompt": "Where does an owl live?",
            "base": " The owl lives in the barn. Tom likes the fox. The fox is red.",
            "base_few_shot": "The owl lives in the barn.",
            "sft": "The owl lives in the barn.",
            "ppo": "The owl lives in the barn.",
        },
        {
            "prompt": "Tell me a story about a frog and a kite.",
            "base": " One day Mia and the frog went to the park. They had a fight and felt awful.\nfrog: The frog",
            "base_few_shot": "The frog eats seeds.",
            "sft": "One day Leo and the frog went to the farm. They found a red kite there. The frog wanted to keep "
            "the kite. They cried and went home sad.",
            "ppo": "One day Leo and the frog went to the beach. They found a red kite there. Leo gave the kite to "
            "the frog. They became good friends and danced with joy.",
        },
        {
            "prompt": 'What is <script>alert(1)</script> & "5"?',
            "base": "</script><img src=x onerror=alert(2)>",
            "sft": "",
            "ppo": "12",
        },
    ],
    "seconds": 12.5,
}


def write_run(folder: Path, stages: tuple[str, ...] = tuple(STEPS), results: bool = True) -> Path:
    """Writes a run of the given stages."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    for stage in stages:
        (folder / stage).mkdir()
        lines = metric_lines(stage)
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        last = lines[-2]
        done = {
            "step": STEPS[stage],
            "trained": STEPS[stage],
            "fingerprint": "00ff",
            "seconds": last["time"]["seconds"] + 2.0,
            "tokens": last["tokens"],
            "params": 868_352,
            "finished": f"2026-01-0{1 + len(stage) % 5}T12:30:00+00:00",
            "environment": ENVIRONMENT,
        }
        (folder / stage / "done.json").write_text(json.dumps(done))
    if results:
        (folder / "evaluate").mkdir()
        (folder / "evaluate" / "results.json").write_text(json.dumps(RESULTS))
    return folder


def metric_lines(stage: str) -> list[dict[str, Any]]:
    """A line for each step, one for each evaluation after its step; the last is an evaluation."""
    noise = random.Random(stage)
    lines: list[dict[str, Any]] = []
    seconds, total = 8.0, STEPS[stage]
    for step in range(1, total + 1):
        share = step / total
        speed = SPEEDS[stage] * (1 + 0.05 * noise.gauss(0, 1)) * (0.2 if step == 1 else 1)
        seconds += 4096 / speed
        lr = PEAKS[stage] * (min(1.0, share / 0.05) if share < 0.05 else 0.55 + 0.45 * math.cos(math.pi * share))
        line: dict[str, Any] = {
            "step": step,
            "lr": lr,
            "grad_norm": 0.6 + 2.5 * math.exp(-12 * share) + 0.12 * noise.random(),
        }
        line |= {"skipped": 0, "tokens": 4096 * step, **stage_metrics(stage, share, noise)}
        lines.append(line | {"time": {"seconds": seconds, "tokens_per_second": speed, "wait": 0.004}})
        if step % 25 == 0:
            found = {"nll": line["nll"] * 1.04} if "nll" in line else {"loss": line["loss"]}
            same = ("accuracy", "rewards/accuracies", "rewards/margins")
            found |= {name: line[name] - 0.01 for name in same if name in line}
            lines.append({"step": step, "eval": found, "time": {"seconds": seconds}})
    return lines


def stage_metrics(stage: str, share: float, noise: random.Random) -> dict[str, float]:
    """What a stage logs beside the common metrics, at a share of its steps."""
    if stage in ("pretrain", "sft"):
        start, end = (6.49, 0.53) if stage == "pretrain" else (2.9, 0.24)
        nll = end + (start - end) * math.exp(-9 * share) + 0.03 * noise.gauss(0, 1) + 0.25 * (1 - share) * end
        return {"loss": nll, "nll": nll}
    if stage == "reward":
        accuracy = 0.5 + 0.38 * (1 - math.exp(-5 * share)) + 0.04 * noise.gauss(0, 1)
        return {"loss": 0.69 - 0.4 * (1 - math.exp(-5 * share)), "accuracy": min(accuracy, 1.0), "margin": 2.2 * share}
    if stage == "dpo":
        margin = 1.5 * share + 0.1 * noise.gauss(0, 1)
        return {
            "loss": 0.69 - 0.3 * share,
            "rewards/chosen": margin - 0.4,
            "rewards/rejected": -0.4,
            "rewards/margins": margin,
            "rewards/accuracies": min(0.5 + 0.4 * share + 0.05 * noise.gauss(0, 1), 1.0),
        }
    score = 0.9 * (1 - math.exp(-4 * share)) + 0.12 * noise.gauss(0, 1)
    kl = 0.85 * share + 0.05 * noise.random()
    return {
        "loss": 0.1,
        "objective/scores": score,
        "objective/kl": kl,
        "objective/kl_k3": kl + 0.05 * noise.gauss(0, 1),
        "objective/scores_std": 0.8,
        "objective/entropy": 0.4 - 0.1 * share,
        "objective/returns": score,
        "val/ratio_max": 1.5 + noise.random(),
        "val/ratio_gap": 3e-6,
        "val/clipfrac_avg": 0.01,
        "objective/rlhf_reward": score - 0.05 * kl,
        "objective/length": 18 + 4 * share + 0.8 * noise.gauss(0, 1),
        "objective/eos_rate": min(1.0, 0.97 + 0.02 * noise.gauss(0, 1)),
        "objective/kl_coef": 0.05,
        "policy/clipfrac_avg": 0.05 + 0.02 * noise.random(),
        "policy/approxkl_avg": 0.004,
        "val/ratio": 1.0,
        "loss/policy_avg": -0.02,
        "loss/value_avg": 0.2,
        "val/explained_variance": 0.75 * (1 - math.exp(-6 * share)) + 0.06 * noise.gauss(0, 1),
    }
