"""Whether there are other processes is told by the environment alone, and wrong settings are told at once."""

from __future__ import annotations

import pytest
from many_hosts import given, slurm

from jaxgpt.errors import UserError
from jaxgpt.launch import Start, find_start

OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911", "OMPI_COMM_WORLD_RANK": "0"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        (given(4, 8476, 2), Start("JAXGPT_COORDINATOR", "deactivate", "127.0.0.1:8476", 4, 2)),
        (given(4, 8476, 2) | slurm(8, 8476, 1), Start("JAXGPT_COORDINATOR", "deactivate", "127.0.0.1:8476", 4, 2)),
        (slurm(2, 8476, 1), Start("Slurm", "slurm")),
        (slurm(1, 8476, 0), None),
        ({key: value for key, value in slurm(2, 1, 1).items() if key != "SLURM_STEP_NODELIST"}, None),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "2"}, Start("Open MPI", "ompi")),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "0"}, Start("GKE", "gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, Start("GKE", "gketpu")),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_the_environment_tells_who_started_the_processes(environment, found, tmp_path):
    assert find_start(environment, devices=tmp_path) == found


def test_a_cloud_tpu_machine_is_known_by_its_chips(tmp_path):
    (tmp_path / "accel0").touch()
    assert find_start({}, devices=tmp_path) == Start("Cloud TPU")
    assert find_start({"JAX_PLATFORMS": "cpu"}, devices=tmp_path) is None
    assert find_start({"TPU_SKIP_MDS_QUERY": "1"}, devices=tmp_path) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"JAXGPT_NUM_PROCESSES": ""}, "JAXGPT_NUM_PROCESSES: not set, and JAXGPT_COORDINATOR, JAXGPT_PROCESS_ID is"),
        ({"JAXGPT_COORDINATOR": "10.0.0.1"}, "found '10.0.0.1', expected HOST:PORT"),
        ({"JAXGPT_NUM_PROCESSES": "two"}, "JAXGPT_NUM_PROCESSES: found 'two', expected a whole number"),
        ({"JAXGPT_PROCESS_ID": "2"}, "JAXGPT_PROCESS_ID: found 2 of JAXGPT_NUM_PROCESSES=2; expected 0 to 1"),
    ],
)
def test_what_is_set_wrongly_is_told(change, told):
    with pytest.raises(UserError, match=told):
        find_start(given(2, 8476, 0) | change)
