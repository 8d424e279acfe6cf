"""`jaxgpt plan ... compile=true`: every program of a file's stages through the compiler of its target."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from rich.console import Console

from jaxgpt.aot.compiled import Compiled, compile_program, target_devices
from jaxgpt.aot.programs import programs
from jaxgpt.config.schema import Config, MeshConfig
from jaxgpt.errors import UserError
from jaxgpt.mesh import make_mesh
from jaxgpt.plan.chips import GIB, Target
from jaxgpt.plan.estimate import Estimate
from jaxgpt.plan.show import put, table


def compile_stages(config: Config, found: Sequence[Estimate], target: Target) -> int:
    """Compiles on the chosen mesh of each stage's estimate, and prints the figures beside the estimated ones.

    1 where a program does not fit or the partitioner had to make a tensor whole that is split, else 0.
    Raises UserError where the target is no TPU or its compiler is not installed.
    """
    if target.chip.kind != "tpu":
        raise UserError(f"compile: {target.name} is no TPU, expected a target such as v5p:4x4x8")
    devices, failed, console = target_devices(target.topology, target.slices), 0, Console(highlight=False)
    for one in found:
        if one.chosen is None:
            continue
        mesh = make_mesh(MeshConfig(**one.chosen.mesh._asdict()), devices)
        console.print(
            f"\n{one.plan.name}, compiled for {target.name}, mesh {' x '.join(map(str, mesh.shape.values()))}"
        )
        with jax.set_mesh(mesh):
            for program in programs(config, one.plan.name, mesh):
                try:
                    compiled = compile_program(program, mesh)
                except UserError as error:
                    console.print(f"  {error}", style="red", soft_wrap=True)
                    failed = 1
                    continue
                use = one.chosen.memory.programs.get(program.name)
                show(console, compiled, None if use is None else use.total, target.chip.hbm or 0.0)
                failed |= bool(compiled.rematerialized)
    return failed


def show(console: Console, compiled: Compiled, planned: float | None, memory: float) -> None:
    """The figures of one program."""
    parts = f"arguments {compiled.arguments / GIB:.2f} + temporaries {compiled.temporaries / GIB:.2f}"
    beside = "" if planned is None else f"; planned {planned / GIB:.2f}, {planned / compiled.peak - 1:+.0%}"
    console.print(
        f"  {compiled.name}: {compiled.peak / GIB:.2f} of {memory / GIB:.1f} GiB a chip ({parts}{beside}), "
        f"compiled in {compiled.seconds:.0f} s",
        soft_wrap=True,
    )
    console.print(f"    kernels: {', '.join(compiled.kernels) or 'none'}", soft_wrap=True)
    console.print(
        f"    largest buffers: {', '.join(f'{name} {size / GIB:.2f}' for size, name in compiled.largest[:3])}"
    )
    made = table("    exchanges", "along", "times", "GiB a chip", right=(2, 3))
    for one in compiled.collectives[:8]:
        made.add_row(f"    {one.kind}", " x ".join(one.axes), f"{one.count:,}", f"{one.bytes / GIB:.3f}")
    put(console, made)
    for warning in compiled.rematerialized:
        console.print(f"    involuntary rematerialization: {warning}", style="red", soft_wrap=True)
