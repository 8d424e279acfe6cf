"""Whether this process is one of several that train together, as its environment tells. Nothing here needs jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.errors import UserError

GIVEN = ("JAXGPT_COORDINATOR", "JAXGPT_NUM_PROCESSES", "JAXGPT_PROCESS_ID")
"""Address HOST:PORT of process 0, how many processes there are, and which one this is."""
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
OPEN_MPI = ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK")


@dataclass(frozen=True)
class Start:
    """How several processes find each other; what is None is found out by jax."""

    by: str
    """Who started them, in words."""
    method: str | None = None
    """The name of that in jax, `cluster_detection_method`."""
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


def find_start(environment: Mapping[str, str], devices: Path = Path("/dev")) -> Start | None:
    """What the environment says of other processes; None where this one is alone.

    The variables of GIVEN come first, then Slurm, Open MPI, GKE and Cloud TPU, whose machines are known by their chips
    in `devices`. Raises UserError where GIVEN is incomplete or wrong.
    """
    if any(environment.get(name) for name in GIVEN):
        return _given(environment)
    if all(name in environment for name in SLURM):
        return Start("Slurm", "slurm") if _several(environment["SLURM_NTASKS"]) else None
    if all(name in environment for name in OPEN_MPI):
        return Start("Open MPI", "ompi") if _several(environment["OMPI_COMM_WORLD_SIZE"]) else None
    if "tpu" not in (environment.get("JAX_PLATFORMS") or "tpu"):
        return None
    slices = _several(environment.get("MEGASCALE_NUM_SLICES", "1"))
    if slices or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return Start("GKE", "gketpu" if "TPU_WORKER_HOSTNAMES" in environment else None)
    chips = any(next(devices.glob(pattern), None) for pattern in ("accel[0-9]*", "vfio/[0-9]*"))
    return Start("Cloud TPU") if chips and "TPU_SKIP_MDS_QUERY" not in environment else None


def _given(environment: Mapping[str, str]) -> Start:
    lacking = [name for name in GIVEN if not environment.get(name)]
    if lacking:
        found = ", ".join(name for name in GIVEN if name not in lacking)
        raise UserError(f"{' and '.join(lacking)}: not set, and {found} is; set all three, or none for one process")
    host, colon, port = environment[GIVEN[0]].rpartition(":")
    if not (host and colon and port.isdigit()):
        raise UserError(f"{GIVEN[0]}: found '{environment[GIVEN[0]]}', expected HOST:PORT, such as 10.0.0.1:8476")
    count, number = (_whole(environment, name) for name in GIVEN[1:])
    if not 0 <= number < max(count, 1):
        raise UserError(f"{GIVEN[2]}: found {number} of {GIVEN[1]}={count}; expected 0 to {max(count - 1, 0)}")
    return Start("JAXGPT_COORDINATOR", "deactivate", environment[GIVEN[0]], count, number)


def _whole(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdigit():
        raise UserError(f"{name}: found '{environment[name]}', expected a whole number")
    return int(environment[name])


def _several(count: str) -> bool:
    return count.isdigit() and int(count) > 1
