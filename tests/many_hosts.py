"""Runs of several real processes on this machine: the program as a cluster starts it, with collectives over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CONFIG = """
name: small
hosts: {start_timeout: 60, barrier_timeout: 60, heartbeat_timeout: 20}
prepare: {type: meadow, documents: 300, instructions: 60, rankings: 40, prompts: 40, held_out: 16}
data: {path: "{run}/data/text/commoncrawl.jsonl", val_fraction: 0.05}
tokenizer: {vocab: 512, path_text: "{run}/data/instructions.jsonl", fields: [messages]}
model: {width: 16, layers: 1, context: 160, attention: {heads: 4}, mlp: {width: 32}}
pretrain: {steps: 6, batch: 8, context: 32, eval_every: 3, log_every: 1, checkpoint: {every: 2}}
sft:
  steps: 3
  batch: 8
  context: 160
  dropout: 0.1
  data: {path: "{run}/data/instructions.jsonl", eval_path: "{run}/data/instructions_eval.jsonl"}
reward:
  steps: 2
  batch: 8
  responses: 4
  context: 160
  normalize: policy
  normalize_over: 16
  data: {path: "{run}/data/rankings.jsonl", eval_path: "{run}/data/rankings_eval.jsonl"}
ppo:
  iterations: 2
  episodes: 16
  batch: 8
  epochs: 1
  prompt_length: 40
  response_length: 8
  rewards: [{type: model}, {type: length, target: 5, weight: 0.1}]
  gold: {prompts: 8, rewards: [{type: length, target: 5}], data: {path: "{run}/data/prompts_eval.jsonl"}}
  data: {path: "{run}/data/prompts.jsonl"}
grpo:
  iterations: 2
  episodes: 16
  responses: 4
  batch: 8
  prompt_length: 40
  response_length: 8
  rewards: [{type: model}]
  optimizer: {eps: 1.0e-3}  # a gradient as small as this one's is no matter of signs
  data: {path: "{run}/data/prompts.jsonl"}
evaluate:
  data: {path: "{run}/data/prompts_eval.jsonl"}
  scorer: jaxgpt.data.meadow:gold_score
  max_tokens: 8
  batch: 16
  samples: ["Who are you?"]
"""
TRAINED = ("pretrain", "sft", "reward", "ppo", "grpo")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def given(count: int, port: int, host: int) -> dict[str, str]:
    return {
        "JAXGPT_COORDINATOR": f"127.0.0.1:{port}",
        "JAXGPT_NUM_PROCESSES": str(count),
        "JAXGPT_PROCESS_ID": str(host),
    }


def slurm(count: int, port: int, host: int) -> dict[str, str]:
    """As srun sets them; jax takes its port from the number of the job."""
    return {
        "SLURM_JOB_ID": str((port - 61440) % 4096),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(host),
        "SLURM_LOCALID": str(host),
    }


class Hosts:
    """Processes of one command, with what each prints."""

    def __init__(
        self,
        home: Path,
        words: Sequence[str],
        hosts: Sequence[int],
        count: int,
        devices: int = 1,
        start: Any = given,
        compiled: Path | None = None,
    ):
        home.mkdir(exist_ok=True)
        (home / "small.yaml").write_text(CONFIG)
        port = free_port()
        flags = f"--xla_force_host_platform_device_count={devices}"
        common = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        if compiled is not None:
            common["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        self.logs = [home / f"host-{host}.log" for host in hosts]
        self.processes = []
        for host, log in zip(hosts, self.logs, strict=True):
            environment = common | (start(count, port, host) if count > 1 else {})
            with log.open("w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "jaxgpt", *words],
                        cwd=home,
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self, seconds: float = 900) -> list[int]:
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    process.kill()

    def told(self, number: int = 0) -> str:
        return self.logs[number].read_text()


def run(home: Path, verb: str, count: int, *words: str, devices: int = 1, start: Any = given, **more: Any) -> Hosts:
    """A command on so many hosts, to its good end."""
    hosts = Hosts(home, [verb, "small.yaml", *words], range(count), count, devices, start, **more)
    codes = hosts.wait()
    assert codes == [0] * count, "\n".join(hosts.told(i)[-3000:] for i in range(count))
    return hosts


def figures(home: Path, stage: str) -> list[Mapping[str, Any]]:
    """The lines of a stage's metrics.jsonl without times."""
    lines = [json.loads(line) for line in (home / "runs/small" / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def done(home: Path, stage: str) -> dict[str, Any]:
    return json.loads((home / "runs/small" / stage / "done.json").read_text())
