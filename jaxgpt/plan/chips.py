"""What machines can do, from their datasheets, and the targets that the command line names.

Sources: cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e, tpu7x): compute, HBM, ICI (half of what is given as
bidirectional), chips a host; jax-ml.github.io/scaling-book, part 2: DCN per chip, and which axes of a slice close to a
ring; nvidia.com datasheets of A100 80 GB SXM, H100 SXM and H200 SXM: dense bfloat16, HBM, NVLink (half of what is
given), and one network card a GPU as in DGX A100 (200 Gb/s) and DGX H100 (400 Gb/s).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from jaxgpt.errors import UserError, nearest

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator, or all of a CPU; rates are peaks."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    flops: float
    """bfloat16 products a second; float32 on a CPU."""
    hbm: float | None
    """Bytes of memory that a program can have; None where that is not known."""
    hbm_rate: float
    """Bytes a second."""
    link: float
    """Bytes a second along one link, one way; of a GPU all of NVLink."""
    dimensions: int
    """Of the torus; each has two links. 0 where chips of a host all reach each other."""
    ring: int
    """A dimension of a slice closes to a ring where its length is a multiple of this."""
    dcn: float
    """Bytes a second to other slices, or to other hosts of GPUs, one way and per chip."""
    host: int
    """Chips a host."""
    devices: int = 1
    """What JAX counts a chip as; all rates and sizes here are of one device."""


def _tpu(
    name: str,
    tflops: float,
    hbm: float,
    hbm_gbs: float,
    link: float,
    dims: int,
    ring: int,
    dcn: float,
    host: int,
    devices: int = 1,
) -> Chip:
    # the compiler keeps about 1/64 of the HBM: of v5e's 16 GiB a program can have 15.75
    usable = hbm * GIB * 63 / 64
    flops, room, rate, one, far = (x / devices for x in (tflops * 1e12, usable, hbm_gbs * 1e9, link * 1e9, dcn * 1e9))
    return Chip(name, "tpu", flops, room, rate, one, dims, ring, far, host, devices)


def _gpu(name: str, tflops: float, hbm: float, hbm_gbs: float, link: float, dcn: float) -> Chip:
    # of a GPU's memory XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 is taken (unset it is 0.75)
    return Chip(name, "gpu", tflops * 1e12, hbm * GIB * 0.92, hbm_gbs * 1e9, link * 1e9, 0, 1, dcn * 1e9, 8)


CHIPS = {
    chip.name: chip
    for chip in (
        #      TFLOP/s  GiB  HBM GB/s  link GB/s  torus  ring  DCN GB/s  host
        _tpu("v4", 275, 32, 1200, 50, 3, 4, 6.25, 4),
        _tpu("v5e", 197, 16, 819, 50, 2, 16, 3.125, 8),
        _tpu("v5p", 459, 95, 2765, 100, 3, 4, 6.25, 4),
        _tpu("v6e", 918, 32, 1638, 100, 2, 16, 12.5, 8),
        _tpu("tpu7x", 2307, 192, 7380, 100, 3, 4, 12.5, 4, devices=2),
        _gpu("a100", 312, 80, 2039, 300, 25),
        _gpu("h100", 989.5, 79.6, 3350, 450, 50),
        _gpu("h200", 989.5, 140.4, 4800, 450, 50),
        # float32 products of one core, measured: 82 GFLOP/s; memory as of two channels of DDR4
        Chip("cpu", "cpu", 0.082e12, None, 30e9, 10e9, 0, 1, 1e9, 1),
    )
}
EXAMPLES = "v5p:4x4x8, v5e:16x16, v6e:4x4, v4:4x4x4, tpu7x:4x4x4, h100x8, h200x64, a100x8, cpu"


@dataclass(frozen=True)
class Target:
    """Chips that are to be had together."""

    chip: Chip
    shape: tuple[int, ...]
    """Of one slice; of GPUs their number."""
    slices: int = 1

    @property
    def chips(self) -> int:
        """Of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Of all chips, as JAX counts them."""
        return self.chips * self.chip.devices

    @property
    def topology(self) -> str:
        """One slice as the TPU compiler names it: "v5p:4x4x8"."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def name(self) -> str:
        """As the command line names it."""
        if self.chip.kind == "tpu":
            return self.topology if self.slices == 1 else f"{self.slices} slices of {self.topology}"
        return f"{self.chip.name}x{self.chips}" if self.chips > 1 else self.chip.name

    @property
    def near(self) -> int:
        """Devices that reach each other without the slower network: of a slice, or a host of GPUs."""
        return self.chip.host if self.chip.kind == "gpu" else math.prod(self.shape) * self.chip.devices


def parse_target(text: str, slices: int = 1) -> Target:
    """ "v5p:4x4x8", "h100x8", "cpu". Raises UserError with what was expected."""
    found = re.fullmatch(r"([a-z0-9]+?)(?:(?::|(?<=[0-9u])x)(\d+(?:x\d+)*))?", text.strip().lower())
    name = found[1] if found else re.split(r"[:x]", text.lower())[0]
    chip = CHIPS.get(name)
    if found is None or chip is None:
        raise UserError(f"target={text}: no such machine.{nearest(name, CHIPS)} Expected something like {EXAMPLES}")
    sizes = tuple(int(n) for n in found[2].split("x")) if found[2] else ()
    if 0 in sizes:
        raise UserError(f"target={text}: a size of 0; expected something like {EXAMPLES}")
    if chip.kind == "tpu":
        if len(sizes) != chip.dimensions:
            example = "x".join("4" for _ in range(chip.dimensions))
            raise UserError(
                f"target={text}: found {len(sizes)} sizes; slices of {name} have {chip.dimensions}: {name}:{example}"
            )
        return Target(chip, sizes, slices)
    if len(sizes) > 1 or slices != 1:
        raise UserError(f"target={text}: expected a number of chips, as in {name}x8; slices are of TPUs")
    return Target(chip, sizes or (1,))
