"""What `jaxgpt plan` takes beside a config file, written key=value."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from jaxgpt.config.schema import Count, Positive, Section

Reached = Annotated[float, Field(gt=0.0, le=1.0)]


class Planned(Section):
    """What `jaxgpt plan FILE.yaml` takes beside the file's settings."""

    target: str = "cpu"
    """Machine: a TPU slice (v4, v5e, v5p, v6e, tpu7x) as v5p:4x4x8, a number of GPUs (a100, h100, h200) as h100x8, or
    cpu."""
    slices: Count = 1
    """Slices of that size, which mesh.data goes across."""
    price: Positive | None = None
    """Of a chip for an hour, in any currency."""
    mfu: Reached = 0.4
    """Share of the chips' peak that training is taken to reach (model FLOPs utilisation, causal attention)."""
    reached: Reached = 0.7
    """Share of memory's and network's datasheet rates that is taken to be reached."""
    judge: str | None = None
    """Size of reward models and of the critic that begins as one, a file of configs/model; unset means the policy's."""
    meshes: Count = 6
    """Meshes that are listed of each stage."""
    compile: bool = False
    """Also compile every program for the target, by the TPU's own compiler: no TPU is needed, but libtpu (the extra
    tpu), minutes and memory."""
    out: str | None = None
    """JSON file for all figures."""


class Budgeted(Section):
    """What `jaxgpt plan --chinchilla` takes."""

    budget: Positive
    """Floating-point operations of the training."""
    out: str | None = None
    """JSON file for all figures."""


class Fitted(Section):
    """What `jaxgpt plan --isoflop RUN RUN ...` takes beside the runs."""

    tolerance: Positive = 0.1
    """Budgets that differ by no more than this share count as one."""
    budget: Positive | None = None
    """Operations to extrapolate to; unset extrapolates to none."""
    out: str | None = None
    """JSON file for all figures."""
