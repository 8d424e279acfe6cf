"""All figures of one stage on one machine, gathered from the other modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgpt.config.planned import Planned
from jaxgpt.config.schema import Config, MeshConfig, ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.plan.chips import Target
from jaxgpt.plan.flops import Flops
from jaxgpt.plan.memory import has_kernel
from jaxgpt.plan.meshes import Advice, Layout, advice, layouts, problems, ranked
from jaxgpt.plan.roofline import counted, flops_of
from jaxgpt.plan.weights import Mesh, by_part, count
from jaxgpt.plan.work import Work, work

HOUR, DAY = 3600.0, 86400.0


@dataclass(frozen=True)
class Estimate:
    """What a stage takes."""

    plan: Work
    target: Target
    flops: Flops
    """Of a token of the trained model, in its update."""
    layouts: tuple[Layout, ...]
    """The meshes that divide it, the best first."""
    asked: Mesh | None
    """The file's own mesh, where it says one."""
    refused: tuple[str, ...]
    """What speaks against that."""
    reasons: Mapping[str, int]
    """Why meshes were left out, and how many by each."""
    advice: Advice | None
    """What to change, where nothing fits."""
    options: Planned

    @property
    def chosen(self) -> Layout | None:
        """The file's mesh, or the best."""
        own = [layout for layout in self.layouts if layout.mesh == self.asked]
        return own[0] if own else self.layouts[0] if self.layouts else None

    @property
    def fits(self) -> bool:
        """Whether any mesh does."""
        return any(layout.fits for layout in self.layouts)

    @property
    def seconds(self) -> float | None:
        """Of the stage on the chosen mesh; of one round of its programs where its length is not known."""
        return None if self.chosen is None else self.chosen.seconds(self.plan, self.options.mfu, self.options.reached)

    @property
    def total(self) -> float:
        """Operations of the stage, as utilisation counts them."""
        return sum((program.times or 1) * counted(self.plan, program) for program in self.plan.programs)

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        if self.options.price is None or self.seconds is None:
            return None
        return self.seconds / HOUR * self.target.chips * self.options.price

    def utilisation(self, layout: Layout) -> float:
        """The most that the stage's programs could reach on a mesh: operations counted over what the roofline lets."""
        bound = sum((p.times or 1) * t.bound for p, t in zip(self.plan.programs, layout.times, strict=True))
        return self.total / self.target.devices / self.target.chip.flops / bound if bound else 0.0


def estimate(
    config: Config, stage: str, target: Target, options: Planned, rankings: int | None, judge: ModelConfig | None
) -> Estimate:
    """The figures of a stage. Raises UserError where the file's mesh cannot be laid on the target."""
    plan = work(config, stage, rankings, judge)
    update = next(program for program in plan.programs if program.kind == "train")
    rows = update.reads[0]
    asked = own_mesh(config.mesh, target)
    refused = tuple(problems(plan, asked, target)) if asked is not None else ()
    found, reasons = layouts(config, stage, target, plan)
    found = ranked(found, plan, options.mfu, options.reached)
    told = None if any(layout.fits for layout in found) else advice(config, stage, target, judge)
    return Estimate(
        plan, target, flops_of(plan.models[rows.role], rows), tuple(found), asked, refused, reasons, told, options
    )


def own_mesh(config: MeshConfig, target: Target) -> Mesh | None:
    """The mesh that a file says; None where it says nothing. Raises UserError where the chips do not make it."""
    if config == MeshConfig():
        return None
    sizes = [getattr(config, axis) for axis in Mesh._fields]
    fixed = Mesh(*(1 if size == "auto" else size for size in sizes)).devices
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(Mesh._fields, sizes, strict=True))
    if target.devices % fixed or ("auto" not in sizes and target.devices != fixed):
        raise UserError(
            f"{asked}: {fixed} devices, and {target.name} has {target.devices}; change the mesh, or another target, or "
            "let the plan choose: mesh=null"
        )
    return Mesh(*(target.devices // fixed if size == "auto" else size for size in sizes))


def kernel_notes(plan: Work, layout: Layout, target: Target) -> list[str]:
    """Programs whose attention keeps all scores, because no kernel takes their rows."""
    lost = dict[int, None]()
    for program in plan.programs:
        for rows in program.reads:
            c = plan.models[rows.role].config
            if program.kind != "generate" and not has_kernel(c, rows.tokens, layout.mesh, target.chip):
                lost[rows.tokens] = None
    if not lost or target.chip.kind == "cpu":
        return []
    on_tpu = target.chip.kind == "tpu"
    what = (
        "rows of a multiple of 128 tokens a device" if on_tpu else "heads of at most 128, no soft cap, mesh.context=1"
    )
    return [f"attention over {' and '.join(map(str, lost))} tokens keeps all scores: its kernel wants {what}"]


def as_json(found: Estimate) -> dict[str, Any]:
    """Everything, in plain types: bytes, seconds, operations."""
    plan, chosen = found.plan, found.chosen
    return {
        "stage": plan.name,
        "target": found.target.name,
        "chips": found.target.chips,
        "parameters": {role: by_part(model.weights) for role, model in plan.models.items()},
        "trained": {role: count(model.learned) for role, model in plan.models.items()},
        "tokens": plan.tokens,
        "updates": plan.updates,
        "flops_per_token": {"causal": found.flops.train(), "full": found.flops.train(full=True)},
        "flops": found.total,
        "fits": found.fits,
        "mesh": None if chosen is None else chosen.mesh._asdict(),
        "seconds": found.seconds if plan.updates is not None else None,
        "chip_hours": None if found.seconds is None else found.seconds / HOUR * found.target.chips,
        "cost": found.cost,
        "assumed": {"mfu": found.options.mfu, "reached": found.options.reached},
        "advice": None if found.advice is None else dataclasses.asdict(found.advice),
        "left_out": dict(found.reasons),
        "notes": list(plan.notes),
        "meshes": [_layout(found, layout) for layout in found.layouts],
    }


def _layout(found: Estimate, layout: Layout) -> dict[str, Any]:
    return {
        "mesh": layout.mesh._asdict(),
        "fits": layout.fits,
        "bytes": layout.memory.peak,
        "resident": dict(layout.memory.resident),
        "programs": {
            name: {"arguments": dict(use.arguments), "temporaries": dict(use.temporaries)}
            for name, use in layout.memory.programs.items()
        },
        "seconds": [
            {"program": t.name, "compute": t.compute, "hbm": t.hbm, "ici": t.ici, "dcn": t.dcn} for t in layout.times
        ],
        "mfu_at_most": found.utilisation(layout),
    }
