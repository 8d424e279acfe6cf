"""A run killed at any moment and repeated by the same command is, bit for bit, the run that was never disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

STAGES = ("pretrain", "sft", "reward", "ppo", "dpo")
CONFIG = """
name: small
prepare: {type: meadow, documents: 300, instructions: 60, rankings: 40, prompts: 40, held_out: 16}
data:
  val_fraction: 0.05
  sources:
    commoncrawl: {path: "{run}/data/text/commoncrawl.jsonl", weight: 3}
    wikipedia: {path: "{run}/data/text/wikipedia.jsonl", weight: 1}
tokenizer:
  vocab: 512
  path_text: ["{run}/data/text/*.jsonl", "{run}/data/instructions.jsonl"]
  fields: [text, messages]
model: {width: 16, layers: 1, context: 160, attention: {heads: 2}, mlp: {width: 32}}
pretrain: {steps: 40, batch: 8, context: 32, eval_every: 10, log_every: 5, checkpoint: {every: 4}, best: best}
sft:
  steps: 20
  batch: 8
  context: 160
  dropout: 0.1
  eval_every: 10
  checkpoint: {every: 3}
  data: {path: "{run}/data/instructions.jsonl", eval_path: "{run}/data/instructions_eval.jsonl"}
reward:
  steps: 20
  batch: 4
  responses: 4
  context: 160
  eval_every: 10
  checkpoint: {every: 3}
  data: {path: "{run}/data/rankings.jsonl", eval_path: "{run}/data/rankings_eval.jsonl"}
ppo:
  iterations: 12
  episodes: 8
  batch: 4
  epochs: 2
  prompt_length: 40
  response_length: 8
  checkpoint: {every: 4}
  kl: {controller: adaptive, horizon: 100}
  data: {path: "{run}/data/prompts.jsonl"}
dpo:
  steps: 12
  batch: 4
  context: 160
  eval_every: 6
  checkpoint: {every: 3}
  data: {path: "{run}/data/rankings.jsonl", eval_path: "{run}/data/rankings_eval.jsonl"}
"""


def start(folder: Path, compiled: Path) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(CONFIG)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": str(compiled),
    }
    command = [sys.executable, "-m", "jaxgpt", "run", "small.yaml"]
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(folder: Path, compiled: Path) -> None:
    code = start(folder, compiled).wait(timeout=600)
    assert code == 0, (folder / "log.txt").read_text()


def outcome(folder: Path) -> dict[str, Any]:
    """Every stage's parameters and figures, without the times."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        home = folder / "runs/small" / stage
        done = json.loads((home / "done.json").read_text())
        lines = [json.loads(line) for line in (home / "metrics.jsonl").read_text().splitlines()]
        for line in lines:
            del line["time"]
        found[stage] = ({key: done[key] for key in ("step", "fingerprint", "tokens", "params", "skipped")}, lines)
        assert not list(home.rglob("*tmp*")) and not list(home.glob("checkpoints/damaged*"))
    return found


def steps_done(folder: Path, stage: str) -> int:
    """The newest checkpoint of a stage."""
    saved = (folder / "runs/small" / stage / "checkpoints").glob("[0-9]*")
    return max((int(path.name) for path in saved if path.name.isdigit()), default=0)


def wait_until(process: subprocess.Popen, ready) -> None:
    for _ in range(60_000):
        if ready() or process.poll() is not None:
            return
        time.sleep(0.005)
    raise AssertionError("the run stands still")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    return Path(given) if given else tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder, compiled)
    return outcome(folder)


def killed(folder: Path, compiled: Path, moments: list[tuple[str, int, float]]) -> int:
    """Kills the run some seconds after a stage has a checkpoint of a step; how many kills met it alive."""
    met = 0
    for stage, step, delay in moments:
        process = start(folder, compiled)
        home = folder / "runs/small" / stage
        wait_until(process, lambda: (home / "config.yaml").exists() and steps_done(folder, stage) >= step)  # noqa: B023
        time.sleep(delay)
        met += process.poll() is None
        process.kill()
        process.wait()
    return met


def test_four_kills_leave_no_trace(undisturbed, compiled, tmp_path):
    rng = random.Random(1)
    moments = [
        ("pretrain", rng.randrange(4, 30), 0.1 * rng.random()),
        ("reward", rng.randrange(0, 12), 0.5 * rng.random()),
        ("ppo", rng.randrange(4, 40), 0.1 * rng.random()),
        ("dpo", rng.randrange(3, 6), 0.1 * rng.random()),
    ]
    assert killed(tmp_path / "run", compiled, moments) == 4
    assert not (tmp_path / "run/runs/small/dpo/done.json").exists()
    finish(tmp_path / "run", compiled)
    assert outcome(tmp_path / "run") == undisturbed


def test_a_polite_stop_saves_and_exits_with_75(undisturbed, compiled, tmp_path):
    folder = tmp_path / "run"
    process = start(folder, compiled)
    wait_until(process, lambda: steps_done(folder, "sft") >= 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 75
    last = (folder / "log.txt").read_text().splitlines()[-1]
    at = steps_done(folder, "sft")
    assert last == f"sft: stopped after step {at} of 20; the same command goes on"
    assert (folder / "runs/small/pretrain/done.json").exists() and not (folder / "runs/small/sft/done.json").exists()
    finish(folder, compiled)
    assert outcome(folder) == undisturbed


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_any_time_leave_no_trace(undisturbed, compiled, tmp_path, seed):
    rng, folder, kills = random.Random(seed), tmp_path / "run", 0
    for _ in range(12):
        process = start(folder, compiled)
        try:
            process.wait(timeout=rng.uniform(1.0, 12.0))
        except subprocess.TimeoutExpired:
            process.kill()
            kills += 1
        if process.wait() == 0:
            break
    finish(folder, compiled)
    assert kills > 0 and outcome(folder) == undisturbed
