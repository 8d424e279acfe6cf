"""Several processes that train together are the run of one: the same figures, files and stop; a missing one is named.

Real processes and real collectives. Those that take longer than a minute have the marker `multihost`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from many_hosts import Hosts, done, figures, free_port, run, slurm

from jaxgpt import hosts
from jaxgpt.errors import UserError


def same(home: Path, other: Path, stage: str) -> None:
    """Losses agree to 1e-5, every other figure to 1e-4."""
    ours, theirs = figures(home, stage), figures(other, stage)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for one, two in zip(ours, theirs, strict=True):
        one, two = flat(one), flat(two)
        for name in ("loss", "nll"):
            assert one.get(name, 0.0) == pytest.approx(two.get(name, 0.0), abs=1e-5), (stage, name)
        assert one == pytest.approx(two, rel=1e-4, abs=1e-4), stage


def flat(line: Any) -> dict[str, float]:
    return {**{key: value for key, value in line.items() if key != "eval"}, **line.get("eval", {})}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, compiled: Path) -> Path:
    """Pretraining by one process."""
    home = tmp_path_factory.mktemp("alone")
    run(home, "pretrain", 1, compiled=compiled)
    return home


def test_two_hosts_pretrain_as_one_does(alone, compiled, tmp_path):
    found = run(tmp_path, "pretrain", 2, compiled=compiled)
    same(tmp_path, alone, "pretrain")
    environment = done(tmp_path, "pretrain")["environment"]
    assert (environment["hosts"], environment["devices"]) == (2, 2)
    assert "pretrain step 6/6" in found.told(0) and "pretrain" not in found.told(1)


def test_a_host_that_never_starts_is_named_in_time(tmp_path):
    started = time.monotonic()
    words = ["pretrain", "small.yaml", "hosts.start_timeout=4"]
    found = Hosts(tmp_path, words, [0, 2], 3)
    assert found.wait(60) == [2, 2]
    assert time.monotonic() - started < 45
    for i in range(2):
        assert "host 1 of 3 did not come within hosts.start_timeout, 4 s; here: 0 (" in found.told(i)


def test_host_0_is_named_where_it_is_the_one(tmp_path):
    found = Hosts(tmp_path, ["pretrain", "small.yaml", "hosts.start_timeout=2"], [1], 2)
    assert found.wait(60) == [2]
    assert "host 0 at 127.0.0.1:" in found.told() and "did not answer within hosts.start_timeout" in found.told()


def test_everybody_learns_everybodys_name():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        called = [pool.submit(hosts.roll_call, f"localhost:{port}", 3, host, 20.0) for host in range(3)]
        names = [call.result() for call in called]
    assert names[0] == names[1] == names[2] and sorted(names[0]) == [0, 1, 2]


def test_two_processes_with_one_number_are_told():
    port = free_port()
    with ThreadPoolExecutor(3) as pool:
        called = [pool.submit(hosts.roll_call, f"localhost:{port}", 3, host, 20.0) for host in (0, 1, 1)]
        for call in called[:1]:
            with pytest.raises(UserError, match="two processes say that they are host 1"):
                call.result()


LATE = """
import sys, time
from jaxgpt import hosts
from jaxgpt.config.schema import HostsConfig
from jaxgpt.launch import Start
config = HostsConfig(start_timeout=30, barrier_timeout=2, heartbeat_timeout=20)
with hosts.together(Start("test", "deactivate", sys.argv[1], 2, int(sys.argv[2])), config):
    hosts.barrier("the first meeting")
    hosts.lead(lambda: print("led"))
    if hosts.number() == 1:
        time.sleep(6)
    hosts.barrier("the second meeting")
"""


def test_a_host_that_does_not_come_to_a_meeting_is_named():
    port, environment = free_port(), {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    found = [
        subprocess.Popen(
            [sys.executable, "-c", LATE, f"127.0.0.1:{port}", str(host)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for host in range(2)
    ]  # fmt: skip
    (out, told), (other, _) = [process.communicate(timeout=120) for process in found]
    assert found[0].returncode == 2 and found[1].returncode != 0
    assert "jaxgpt: host 0 of 2: the second meeting: host 1 (" in told
    assert "did not come within hosts.barrier_timeout, 2 s" in told
    assert out.count("led") == 1 and "led" not in other


def test_a_mesh_that_leaves_a_host_out_is_refused(tmp_path):
    found = Hosts(tmp_path, ["pretrain", "small.yaml", "mesh.fsdp=1"], range(2), 2)
    assert found.wait(120) == [2, 2]
    assert "1 of 2 devices are used, none of host 1" in found.told(0)


@pytest.mark.multihost
@pytest.mark.parametrize("mesh", ["mesh.tensor=2", "mesh.data=2", "mesh.context=4"])
def test_axes_may_go_across_hosts(mesh, alone, compiled, tmp_path):
    run(tmp_path, "pretrain", 2, mesh, devices=2, compiled=compiled)
    same(tmp_path, alone, "pretrain")


@pytest.mark.multihost
def test_four_hosts_of_slurm_stop_together_and_one_or_two_go_on(alone, compiled, tmp_path):
    """SIGTERM to one of four; the same step is saved by all, and restored by other numbers of hosts."""
    longer = "pretrain.steps=300"
    run(tmp_path / "alone", "pretrain", 1, longer, compiled=compiled)
    four = Hosts(tmp_path / "four", ["pretrain", "small.yaml", longer], range(4), 4, start=slurm, compiled=compiled)
    saved = tmp_path / "four/runs/small/pretrain/checkpoints/2"
    while not saved.exists() and four.processes[0].poll() is None:
        time.sleep(0.1)
    four.processes[2].send_signal(signal.SIGTERM)
    assert four.wait() == [75] * 4, four.told(0)
    assert "stopped after step" in four.told(0)
    for count in (2, 1):
        home = tmp_path / f"goes on by {count}"
        shutil.copytree(tmp_path / "four", home)
        run(home, "pretrain", count, longer, compiled=compiled)
        same(home, tmp_path / "alone", "pretrain")


@pytest.mark.multihost
def test_every_stage_and_the_evaluation_of_two_hosts_are_those_of_one(compiled, tmp_path):
    run(tmp_path / "one", "run", 1, compiled=compiled)
    run(tmp_path / "two", "run", 2, compiled=compiled)
    for stage in ("pretrain", "sft", "reward", "ppo", "grpo"):
        same(tmp_path / "two", tmp_path / "one", stage)
    assert (tmp_path / "two/runs/small/report.html").is_file()


@pytest.mark.multihost
def test_a_host_that_dies_ends_the_others(compiled, tmp_path):
    words = ["pretrain", "small.yaml", "pretrain.steps=3000", "hosts.heartbeat_timeout=10"]
    found = Hosts(tmp_path, words, range(2), 2, compiled=compiled)
    while "step 2/" not in found.told(0) and found.processes[0].poll() is None:
        time.sleep(0.2)
    found.processes[1].kill()
    began = time.monotonic()
    assert found.processes[0].wait(90) not in (0, 75)
    assert time.monotonic() - began < 60
