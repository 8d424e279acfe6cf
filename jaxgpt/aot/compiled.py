"""The real compile of a program for a machine that is not there, and its figures.

The TPU compiler comes with libtpu and needs no TPU (`jax.experimental.topologies`).
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import jax

from jaxgpt.aot.hlo import Collective, collectives, largest
from jaxgpt.aot.programs import Program
from jaxgpt.errors import UserError

ADVICE = (
    "what takes less: a larger mesh.fsdp, mesh.context or mesh.tensor; model.remat=full; a smaller batch, or a larger "
    "accumulate (of a stage over rollouts also a smaller rollout_batch)"
)
PALLAS = "tpu_custom_call"


class Compiled(NamedTuple):
    """A program as the compiler made it; bytes are of one device."""

    name: str
    seconds: float
    arguments: int
    temporaries: int
    outputs: int
    """Those that take the place of no argument."""
    collectives: tuple[Collective, ...]
    largest: tuple[tuple[int, str], ...]
    """(bytes, shape) of the largest buffers it makes for itself."""
    kernels: tuple[str, ...]
    """Pallas kernels in it, by name."""
    rematerialized: tuple[str, ...]
    """What the partitioner warned of: tensors that it makes whole on every device because it knew no better way."""

    @property
    def peak(self) -> int:
        """What a device needs while the program runs."""
        return self.arguments + self.temporaries + self.outputs


def target_devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """The devices of a TPU topology such as v5p:4x4x8, `slices` times.

    libtpu is to find TPU_SKIP_MDS_QUERY=1 and TPU_WORKER_HOSTNAMES=localhost in the environment, and jax
    JAX_PLATFORMS=cpu. Raises UserError where it is missing or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "compile: the TPU compiler is not installed; it needs no TPU: run the same command as "
            "'uv run --extra tpu jaxgpt plan ...' (Linux)"
        )
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except Exception as error:
        told = str(error).strip().splitlines()[0]
        raise UserError(f"target={topology}: the TPU compiler knows no such topology ({told})") from error


def compile_program(program: Program, mesh: jax.sharding.Mesh) -> Compiled:
    """Compiles; call under `jax.set_mesh(mesh)`. Takes minutes and cores for a large model.

    Raises UserError where it does not fit the device's memory, with the compiler's figures and what to change.
    """
    begin = time.monotonic()
    with _warnings() as said:
        try:
            compiled = program.function.lower(*program.arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"{program.name}: {explained(str(error))}") from error
    memory, text = compiled.memory_analysis(), compiled.as_text()
    names = re.findall(r'%([\w.\-]+) = [^\n]*custom_call_target="' + PALLAS, text)
    return Compiled(
        name=program.name,
        seconds=time.monotonic() - begin,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0),
        collectives=tuple(collectives(text, dict(mesh.shape))),
        largest=tuple(largest(text)[:8]),
        kernels=tuple(sorted({re.sub(r"\.\d+$", "", name) for name in names})),
        rematerialized=tuple(re.findall(r"[^\n]*nvoluntary full rematerialization[^\n]*", said[0])),
    )


def explained(message: str) -> str:
    """The compiler's error, in a sentence that says what to change where memory is short."""
    used = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) (\w+)", message) or re.search(
        r"\(([\d.]+\w)\) exceeds available (?:HBM|hbm) \(([\d.]+\w)\)", message
    )
    if used is None and "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
        return message.strip().splitlines()[0]
    found = "" if used is None else f" {used[1]} of {used[2]} a device would be used;"
    return f"it does not fit in memory:{found} {ADVICE}"


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the compiler writes to standard error meanwhile: it is not Python that writes."""
    said = [""]
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said[0] = file.read().decode(errors="replace")
