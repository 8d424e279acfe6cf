"""The files of tpu/ are what the programs that read them accept. Checks whose program is not installed are skipped."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxgpt.config.load import load

ROOT = Path(__file__).parents[2]
TPU = ROOT / "tpu"
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def program(name: str) -> str:
    """The program of that name, beside this Python or on PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip(f"no {name}")
    return found


def test_shellcheck_has_nothing_to_say() -> None:
    scripts = [*TPU.glob("*.sh"), TPU / "slurm.sbatch", ROOT / ".ci" / "run"]
    found = subprocess.run([program("shellcheck"), "-x", *map(str, scripts)], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_hadolint_has_nothing_to_say() -> None:
    found = subprocess.run([program("hadolint"), str(TPU / "Dockerfile")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_image_has_all_that_the_program_is_made_from() -> None:
    copied = set(re.findall(r"^COPY --chown=\d+ (.*) \S+$", (TPU / "Dockerfile").read_text(), re.MULTILINE))
    assert {"jaxgpt", "configs", "tpu"} <= copied
    assert all((ROOT / name).exists() for names in copied for name in names.split())


def jobsets() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((TPU / "jobset.yaml").read_text()))


def lost(given: Any, kept: Any, place: str = "") -> Iterator[str]:
    """What a schema has no room for, or reads as something else."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or key not in kept:
                yield f"{place}/{key}"
            else:
                yield from lost(value, kept[key], f"{place}/{key}")
    elif isinstance(given, list):
        for i, (value, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(value, other, f"{place}/{i}")
    elif given != kept:
        yield f"{place}: {given} -> {kept}"


@pytest.mark.parametrize("number", [0, 1], ids=["tpu", "gpu"])
def test_jobsets_fit_the_schema_of_kubernetes_whole(number: int) -> None:
    kubernetes = pytest.importorskip("kubernetes_validate")
    models = pytest.importorskip("kubeflow_trainer_api.models")
    jobset = jobsets()[number]
    assert list(lost(jobset, models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict())) == []
    assert list(lost({"spec": {"suspended": True}}, models.JobsetV1alpha2JobSet.from_dict(
        {**jobset, "spec": {**jobset["spec"], "suspended": True}}).to_dict())) == ["/spec/suspended"]  # fmt: skip
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        kubernetes.validate(job, kubernetes.latest_version(), strict=True)


def test_hosts_of_a_jobset_are_as_many_as_its_chips_need() -> None:
    for jobset in jobsets():
        (replicated,) = jobset["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        pod = job["template"]["spec"]
        (container,) = pod["containers"]
        topology = pod["nodeSelector"].get("cloud.google.com/gke-tpu-topology")
        if topology is not None:
            x, y = map(int, topology.split("x"))
            assert job["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == x * y
            continue
        environment = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert environment["JAXGPT_NUM_PROCESSES"] == str(job["parallelism"])
        name = jobset["metadata"]["name"]
        assert environment["JAXGPT_COORDINATOR"].startswith(f"{name}-{replicated['name']}-0-0.{name}:")
        assert job["parallelism"] == job["completions"]


def test_commands_of_the_examples_name_configs_that_are_there() -> None:
    named = {
        name for path in TPU.iterdir() if path.is_file() for name in re.findall(r"configs/\w+\.yaml", path.read_text())
    }
    for name in named - {"configs/FILE.yaml"}:
        assert load(ROOT / name, []).config.name


def test_the_table_of_readme_multiplies_out() -> None:
    rows = re.findall(
        r"^\| `(v\w+)-(\d+)` \| (\d+) \| (\d+) \| (\d+) \| ([\dx]+) \|", (TPU / "README.md").read_text(), re.M
    )
    assert len(rows) >= 10
    for kind, number, chips, hosts, memory, topology in rows:
        sides = [int(side) for side in topology.split("x")]
        flat = kind in ("v5litepod", "v6e")
        assert math.prod(sides) == int(chips) and len(sides) == (2 if flat else 3), topology
        assert int(number) == int(chips) * (1 if flat else 2)  # v4 and v5p count cores
        assert int(hosts) == (1 if flat and int(chips) == 8 else int(chips) // 4)
        assert int(memory) == int(chips) * {"v4": 32, "v5litepod": 16, "v5p": 95, "v6e": 32}[kind]


COMPILE = """
import sys, jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
chip = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices[0]
x = jax.ShapeDtypeStruct((128, 128), "float32", sharding=SingleDeviceSharding(chip))
jax.jit(lambda x: x @ x).lower(x).compile()
"""


def compiled(generation: str, more: str = "") -> subprocess.CompletedProcess[str]:
    """A small program by the TPU compiler, with the flags of a generation."""
    source = f'. {TPU / "flags" / generation}.env && echo "$LIBTPU_INIT_ARGS"'
    flags = subprocess.run(["bash", "-euc", source], capture_output=True, text=True, check=True).stdout.strip()
    python = os.environ.get("JAXGPT_TPU_PYTHON", sys.executable)
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # the tests themselves may have it too
        "LIBTPU_INIT_ARGS": f"{flags} {more}",
    }
    command = [python, "-c", COMPILE, TOPOLOGIES[generation]]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_the_compiler_takes_every_flag(generation: str) -> None:
    found = compiled(generation)
    assert found.returncode == 0, found.stderr


@pytest.mark.tpu_compile
def test_the_compiler_refuses_a_misspelt_flag() -> None:
    found = compiled("v5e", "--xla_tpu_enable_async_colective_fusion=true")
    assert found.returncode != 0 and "xla_tpu_enable_async_colective_fusion" in found.stderr


def test_each_flag_has_its_reason() -> None:
    for path in (TPU / "flags").glob("*.env"):
        lines = path.read_text().splitlines()
        flags = [i for i, line in enumerate(lines) if line.startswith("LIBTPU_INIT_ARGS")]
        assert flags and all(lines[i - 1].startswith("# ") for i in flags), path
