"""The meshes that so many devices can be laid out as, what speaks against each, and how fast each would be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from jaxgpt.config.schema import Config, ModelConfig, RolloutConfig
from jaxgpt.plan.chips import Target
from jaxgpt.plan.memory import Memory, memory
from jaxgpt.plan.roofline import Time, times
from jaxgpt.plan.weights import Mesh
from jaxgpt.plan.work import Program, Work, work


@dataclass(frozen=True)
class Layout:
    """A mesh that divides a stage, with what it takes."""

    mesh: Mesh
    memory: Memory
    times: tuple[Time, ...]
    """Of each program, once."""
    fits: bool

    def seconds(self, plan: Work, mfu: float, reached: float) -> float:
        """Of the whole stage, or where its length is not known of one round of its programs."""
        once = zip(plan.programs, self.times, strict=True)
        return sum((program.times or 1) * time.expected(mfu, reached) for program, time in once)


def shapes(devices: int) -> Iterator[Mesh]:
    """Every mesh of so many devices."""
    for data in divisors(devices):
        for fsdp in divisors(devices // data):
            for context in divisors(devices // data // fsdp):
                yield Mesh(data, fsdp, context, devices // data // fsdp // context)


def divisors(n: int) -> list[int]:
    """From 1 to n."""
    return [d for d in range(1, n + 1) if n % d == 0]


def problems(plan: Work, mesh: Mesh, target: Target) -> list[str]:
    """What keeps a stage from a mesh, in the words of the settings that would have to change; the rules of
    `jaxgpt.mesh`."""
    found = []
    if mesh.data % target.slices:
        found.append(f"mesh.data is no multiple of {target.slices} slices, which only data goes across")
    if not on_torus(mesh, target):
        found.append(f"an axis that is no product of whole dimensions of {target.topology}")
    for model in plan.models.values():
        c, heads = model.config, model.config.attention.heads
        wanted = (
            ("model.width", c.width, "mesh.fsdp x mesh.context", mesh.width),
            ("model.attention.heads", heads, "mesh.tensor", mesh.tensor),
            ("model.attention.kv_heads", c.kv_heads, "mesh.tensor", 1 if c.kv_heads in (1, heads) else mesh.tensor),
            ("model.mlp.width", c.hidden, "mesh.tensor", mesh.tensor),
            ("model.vocab", model.vocab, "mesh.tensor", mesh.tensor),
        )
        found += [f"{name} {size} does not divide by {axes}" for name, size, axes, ways in wanted if size % ways]
    for program in plan.programs:
        for rows in program.reads:
            if rows.rows % mesh.rows:
                found.append(f"{_rows(plan, program)} {rows.rows} does not divide by mesh.data x mesh.fsdp")
            if program.kind != "generate" and mesh.context > 1 and rows.tokens % (2 * mesh.context):
                found.append(f"rows of {rows.tokens} tokens do not divide by 2 x mesh.context")
    return list(dict.fromkeys(found))


def on_torus(mesh: Mesh, target: Target) -> bool:
    """Whether `jax.make_mesh` can lay a mesh on a slice: each axis on whole dimensions of the torus, the last one first
    and on as many as there are. Dimensions are split on v5e alone, and only within one slice; small slices are rings.
    """
    chip, inside = target.chip, (mesh.data // target.slices, *mesh[1:])
    if chip.kind != "tpu" or (chip.name == "v5e" and target.slices == 1) or target.near <= 8:
        return True
    free = [*target.shape, *([chip.devices] if chip.devices > 1 else [])]
    for ways in reversed(inside):
        chosen = next(
            (
                places
                for number in range(len(free), 0, -1)
                for places in itertools.combinations(range(len(free)), number)
                if math.prod(free[place] for place in places) == ways
            ),
            None,
        )
        if chosen is None and ways > 1:
            return False
        free = [0 if chosen and place in chosen else size for place, size in enumerate(free)]
    return True


def _rows(plan: Work, program: Program) -> str:
    name = plan.name
    if program.kind == "train":
        return f"{name}.batch / {name}.accumulate" if program.parts > 1 else f"{name}.batch"
    return f"{name}.rollout_batch" if any(p.kind == "generate" for p in plan.programs) else f"{name}.batch"


def layouts(
    config: Config, stage: str, target: Target, plan: Work | None = None
) -> tuple[list[Layout], dict[str, int]]:
    """The meshes that divide a stage, and for the others how many each reason leaves out."""
    plan = plan or work(config, stage)
    found, reasons = [], dict[str, int]()
    for mesh in shapes(target.devices):
        against = problems(plan, mesh, target)
        for reason in against:
            reasons[reason] = reasons.get(reason, 0) + 1
        if against or _idle(plan, mesh):
            continue
        room = memory(config, stage, mesh, target.chip, plan)
        fits = target.chip.hbm is None or room.peak <= target.chip.hbm
        found.append(Layout(mesh, room, times(plan, mesh, target), fits))
    return found, dict(sorted(reasons.items(), key=lambda one: -one[1]))


def _idle(plan: Work, mesh: Mesh) -> bool:
    """Whether sequences are cut shorter than attention kernels work with, for no gain."""
    return mesh.context > 1 and any(
        rows.tokens // mesh.context < 256 for program in plan.programs for rows in program.reads
    )


def ranked(found: Sequence[Layout], plan: Work, mfu: float, reached: float) -> list[Layout]:
    """Those that fit first, by time, and of equal times the one with the least to compute and to move in all; those
    that do not by their memory."""

    def order(layout: Layout) -> tuple[bool, float, float]:
        if not layout.fits:
            return True, layout.memory.peak, 0.0
        everything = sum(time.compute + time.hbm + time.ici + time.dcn for time in layout.times)
        return False, round(layout.seconds(plan, mfu, reached), 9), everything

    return sorted(found, key=order)


def changes(config: Config, stage: str, target: Target) -> Iterator[tuple[str, Config]]:
    """Settings that take less memory, the cheapest first, each laid on those before it."""
    section = getattr(config, stage)
    now = config

    def model(**values: object) -> Config:
        return now.model_copy(update={"model": now.model.model_copy(update=values)})

    def part(**values: object) -> Config:
        return now.model_copy(update={stage: getattr(now, stage).model_copy(update=values)})

    if config.model.dtype == "float32" and target.chip.kind != "cpu":
        now = model(dtype="bfloat16")
        yield "model.dtype=bfloat16", now
    if isinstance(section, RolloutConfig) and section.frozen_dtype == "float32":
        now = part(frozen_dtype="bfloat16")
        yield f"{stage}.frozen_dtype=bfloat16", now
    order = ("none", "dots", "full")
    for remat in order[order.index(config.model.remat) + 1 :] if config.model.remat in order else ("full",):
        now = model(remat=remat)
        yield f"model.remat={remat}", now
    for _ in range(6):
        section = getattr(now, stage)
        if section.batch % (2 * section.accumulate):
            break
        now = part(accumulate=2 * section.accumulate)
        yield f"{stage}.accumulate={2 * section.accumulate}", now
    if isinstance(section, RolloutConfig):
        for _ in range(6):
            section = getattr(now, stage)
            size = section.rollout_batch or section.episodes
            if size % 2 or (size // 2) % section.responses:
                break
            now = part(rollout_batch=size // 2)
            yield f"{stage}.rollout_batch={size // 2}", now


@dataclass(frozen=True)
class Advice:
    """What to change where nothing fits."""

    settings: tuple[str, ...]
    least: float
    """Bytes a device with them, on the mesh that takes the least."""
    fits: bool


def advice(config: Config, stage: str, target: Target, judge: ModelConfig | None = None) -> Advice | None:
    """The first of `changes` with which the stage fits, or where none does all of them; None where no mesh divides."""
    told, best = dict[str, str](), None
    for words, changed in ((None, config), *changes(config, stage, target)):
        if words is not None:
            setting, _, value = words.partition("=")
            told[setting] = value
        found, _ = layouts(changed, stage, target, work(changed, stage, judge=judge))
        if not found:
            continue
        least = min(layout.memory.peak for layout in found)
        settings = tuple(f"{setting}={value}" for setting, value in told.items())
        if best is None or least < best.least:
            best = Advice(settings, least, any(layout.fits for layout in found))
        if best.fits:
            break
    return best
