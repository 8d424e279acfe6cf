"""tpu/queue.sh brings a run to its end, whatever the cloud does; a stub stands for gcloud, the shells are real."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from stub_cloud import QUEUE, Cloud, told

COMMAND = ("run", "configs/a b.yaml", "runs=gs://bucket/runs")
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (QUEUE.parents[1] / ".git").exists(), reason="queue.sh sends what is committed"
)


def test_a_run_goes_through_the_queue_a_broken_line_and_a_preemption_to_its_end(tmp_path: Path) -> None:
    states = ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", *["ACTIVE"] * 3, "SUSPENDED", "NONE", "ACTIVE"]
    cloud = Cloud(tmp_path, states, ["works", "75", "0"], ssh=["broken", "good"])
    found = cloud.queue(*COMMAND)
    assert found.returncode == 0, found.stdout + found.stderr
    said = told(found)
    assert said[:8] == [
        "asked for 1 x v5litepod-16 (spot)",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "no answer over ssh (1 of 20)",
        "setting the machines up",
        "started",
        "running",
        "preempted: asking for it again",
    ]
    assert [line for line in said[8:] if line != "running"] == [
        "asked for 1 x v5litepod-16 (spot)",
        "setting the machines up",
        "started",
        "stopped with its state saved; starting it again",
        "finished; the logs are in night.log",
    ]
    words, flags = zip(*(line.split("|") for line in cloud.commands()), strict=True)
    assert set(words) == {" ".join(COMMAND)} and len(words) == 3
    assert all("--xla_tpu_enable_async_collective_fusion=true" in flag for flag in flags)
    assert len(cloud.calls("create")) == 2 and len(cloud.calls("delete")) == 2
    assert not (tmp_path / "machine").exists() and not list((tmp_path / "state/jaxgpt").iterdir())


def test_a_failed_run_ends_the_queue_and_the_costs_unless_kept(tmp_path: Path) -> None:
    for keep, deleted in (("0", 1), ("1", 0)):
        home = tmp_path / keep
        home.mkdir()
        cloud = Cloud(home, ["NONE", "ACTIVE"], ["2"])
        found = cloud.queue(*COMMAND, KEEP=keep)
        assert found.returncode == 1 and told(found)[-1] == "failed; the logs are in night.log"
        assert len(cloud.calls("delete")) == deleted
        assert "== " in (home / "night.log").read_text()


def test_slices_and_reserved_capacity_are_asked_for(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["OFFLINE", "NONE", "ACTIVE"], ["0"])
    found = cloud.queue(*COMMAND, TYPE="v5p-128", SLICES="2", CAPACITY="reserved")
    assert found.returncode == 0 and told(found)[0] == "no answer from gcloud: ERROR: no network"
    asked = cloud.calls("create")[0].split()
    assert {"--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--reserved"} <= set(asked)
    assert {"--node-count=2", "--node-prefix=night", "--zone=us-central1-a"} <= set(asked) and "--spot" not in asked
    assert all("--node=all --worker=all" in call for call in cloud.calls("ssh"))


def test_machines_that_cannot_be_set_up_are_given_back(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["NONE", "ACTIVE"], [])
    (tmp_path / "bin/uv").write_text("#!/bin/sh\necho no wheel for this machine; exit 1\n")
    found = cloud.queue(*COMMAND)
    assert found.returncode == 1 and len(cloud.calls("delete")) == 1
    assert told(found)[-1] == "refused (5 of 5): the machines are not set up: no wheel for this machine"


def test_a_request_refused_again_and_again_is_given_up(tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["NONE"], [])
    (tmp_path / "quota").touch()
    found = cloud.queue(*COMMAND)
    assert found.returncode == 1 and len(cloud.calls("create")) == 5
    assert told(found)[-1] == "refused (5 of 5): ERROR: quota exceeded"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TYPE": "v9-1"}, "TYPE=v9-1: expected v4-N, v5litepod-N, v5p-N or v6e-N"),
        ({"CAPACITY": "free"}, "CAPACITY=free: expected spot, on-demand or reserved"),
        ({"ZONE": ""}, "set ZONE to the zone of the TPU"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_asked_for(settings, message, tmp_path: Path) -> None:
    cloud = Cloud(tmp_path, ["NONE"], [])
    found = cloud.queue(*COMMAND, **settings)
    assert found.returncode != 0 and message in found.stderr and not cloud.calls("create")
