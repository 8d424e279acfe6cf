"""How long a program takes where nothing but its arithmetic, its memory or its network held it up.

Each is a lower bound: work over the datasheet's rate. The largest bounds the program, for a good compiler overlaps the
others with it. What is counted of the network, per update and device:

- fsdp and context: weights joined in the compute type, forward and again backward, and gradients scattered;
- data: an all-reduce of the gradients' shards; across slices, on the slow network;
- tensor: activations gathered before and scattered behind each sub-layer, forward, backward and where recomputed;
- context: keys and values gathered, forward, backward and where recomputed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxgpt.plan.chips import Target
from jaxgpt.plan.flops import Flops, per_token
from jaxgpt.plan.memory import Share
from jaxgpt.plan.weights import Mesh
from jaxgpt.plan.work import Model, Program, Rows, Work


@dataclass(frozen=True)
class Time:
    """Lower bounds of one run of a program, seconds."""

    name: str
    compute: float
    """Of everything that is computed, also what is computed twice."""
    counted: float
    """Of the operations that utilisation counts: causal attention, nothing twice."""
    hbm: float
    ici: float
    dcn: float

    @property
    def bound(self) -> float:
        """The largest."""
        return max(self.compute, self.hbm, self.ici, self.dcn)

    @property
    def by(self) -> str:
        """Which that is."""
        return max(("compute", "hbm", "ici", "dcn"), key=lambda name: getattr(self, name))

    def expected(self, mfu: float, reached: float) -> float:
        """Seconds at a utilisation `mfu` of the peak, where memory and network reach the share `reached` of theirs."""
        return max(self.compute, self.counted / mfu, max(self.hbm, self.ici, self.dcn) / reached)


def times(plan: Work, mesh: Mesh, target: Target) -> tuple[Time, ...]:
    """Of every program of a stage, in their order."""
    links = _links(mesh, target)
    return tuple(_time(plan, program, mesh, target, links) for program in plan.programs)


def flops_of(model: Model, rows: Rows) -> Flops:
    """Operations of one token of these rows."""
    return per_token(
        model.config, model.weights, rows.tokens, rows.predicted, model.kind == "scalar",
        model.trained and model.lora is not None,
    )  # fmt: skip


def counted(plan: Work, program: Program, full: bool = False) -> float:
    """Operations of one run of a program on all devices, as utilisation counts them."""
    total = 0.0
    for rows in program.reads:
        flops, tokens = flops_of(plan.models[rows.role], rows), rows.rows * rows.tokens * program.parts
        total += tokens * (flops.train(full) if program.kind == "train" else flops.forward(full))
        if program.kind == "generate":
            total += rows.rows * program.new * _drawn(plan.models[rows.role], rows, program).forward(full)
    return total


def _drawn(model: Model, rows: Rows, program: Program) -> Flops:
    """Operations of a token that is drawn: it sees the prompt and half of the response."""
    sees = rows.tokens + program.new // 2
    every = per_token(model.config, model.weights, 2 * sees, 2 * sees)
    return every


def _time(plan: Work, program: Program, mesh: Mesh, target: Target, links: Links) -> Time:
    chip, train = target.chip, program.kind == "train"
    compute = hbm = ici = dcn = 0.0
    for rows in program.reads:
        model = plan.models[rows.role]
        s, flops = Share.of(model, rows, mesh, chip), flops_of(model, rows)
        tokens = rows.rows * rows.tokens
        if train:
            each = flops.hardware(model.config.remat, chip.kind, s.kernel, s.logits[0] > 1)
        else:
            each = flops.forward(full=not s.kernel)
        compute += program.parts * tokens * each / target.devices / chip.flops
        hbm += program.parts * _moved(model, s, mesh, train) / chip.hbm_rate
        near, far = _sent(model, s, mesh, links, train, program.parts)
        ici, dcn = ici + near, dcn + far
        if program.kind == "generate":
            compute += _compute_drawn(model, rows, program, mesh, target)
            hbm += _read_drawn(model, s, rows, program, mesh) / chip.hbm_rate
    if train:
        learned = {rows.role: plan.models[rows.role].learned for rows in program.reads}
        shard = sum(weight.share(mesh) for found in learned.values() for weight in found)
        hbm += 32 * shard / chip.hbm_rate  # parameters, gradients and two moments, read and written in float32
    done = counted(plan, program) / target.devices / chip.flops
    return Time(program.name, compute, done, hbm, ici, dcn)


def _compute_drawn(model: Model, rows: Rows, program: Program, mesh: Mesh, target: Target) -> float:
    """Seconds of arithmetic of the drawn tokens; devices along context do the same."""
    each = _drawn(model, rows, program).forward()
    return rows.rows * program.new * each / (mesh.rows * mesh.tensor) / target.chip.flops


def _read_drawn(model: Model, s: Share, rows: Rows, program: Program, mesh: Mesh) -> float:
    """Bytes of HBM that the drawn tokens read: for each all weights, and the cache with all its slots."""
    c = model.config
    matrices = sum(w.gathered(mesh) * max(w.layers, 1) for w in model.weights if w.multiplied) * s.size
    if c.tied:
        matrices += model.vocab // mesh.tensor * c.width * s.size
    cache = 2.0 * c.layers * s.rows * s.groups * (rows.tokens + program.new) * c.head_dim * s.size
    return program.new * (matrices + cache)


def _moved(model: Model, s: Share, mesh: Mesh, train: bool) -> float:
    """Bytes of HBM of one part of a batch: joined weights, and what products take and give."""
    c = model.config
    found = [weight for weight in model.weights if weight.multiplied]
    joined = sum(weight.gathered(mesh) * max(weight.layers, 1) for weight in found) * s.size
    ends = 0.0  # of products, for each token
    for weight in found:
        if weight.layers:
            inner = weight.each / max(weight.shape[-1] if weight.path.endswith("D") else weight.shape[0], 1)
            ends += (c.width + inner / s.tensor) * weight.layers * s.size
    stream = 8 * c.width * c.layers * s.size * s.stream
    scores = 2 * s.scores * c.layers
    passes = 1 + (2 + (c.remat != "none")) * train
    return passes * (2 * joined + ends * s.tokens + stream + scores) + 8 * s.logits[0] * s.logits[1]


@dataclass(frozen=True)
class Links:
    """Bytes a second that a device can exchange along each axis of the mesh, near it and across the slow network."""

    fsdp: float
    context: float
    tensor: float
    data: float
    slices: int
    """Parts of `data` that the slow network joins."""
    dcn: float


def _sent(model: Model, s: Share, mesh: Mesh, links: Links, train: bool, parts: int) -> tuple[float, float]:
    """Seconds on the near and on the slow network, of all parts of a batch."""
    c = model.config
    matrices = [weight for weight in model.weights if len(weight.shape) > 1]
    joined = sum(weight.gathered(mesh) * max(weight.layers, 1) for weight in matrices) * s.size
    again = c.remat != "none"
    ways = 3 if train else 1  # forward, backward, and the gradients' way back; along fsdp first, then along context
    along_fsdp = (mesh.fsdp - 1) / mesh.fsdp / mesh.context / links.fsdp
    near = parts * ways * joined * (along_fsdp + (mesh.context - 1) / mesh.context / links.context)
    if mesh.tensor > 1:
        each = s.tokens * c.width * s.size * (mesh.tensor - 1) / mesh.tensor
        near += parts * 4 * c.layers * (1 + (1 + again) * train) * each / links.tensor
    if mesh.context > 1:
        keys = 2 * s.rows * s.row * s.groups * c.head_dim * s.size * (mesh.context - 1) / mesh.context
        near += parts * c.layers * (1 + (1 + again) * train) * keys / links.context
    far = 0.0
    if train and mesh.data > 1:
        shard = sum(weight.gathered(mesh) * max(weight.layers, 1) for weight in model.learned) * s.size / mesh.width
        inside, across = mesh.data // links.slices, links.slices
        near += parts * 2 * shard * (inside - 1) / inside / links.data
        far = parts * 2 * shard * (across - 1) / across / links.dcn
    return near, far


def _links(mesh: Mesh, target: Target) -> Links:
    chip = target.chip
    if chip.kind != "tpu":
        inner, rates = 1, []
        for ways in (mesh.tensor, mesh.context, mesh.fsdp, mesh.data):  # the last axis is that of neighbours
            here = min(
                ways, max(chip.host // inner, 1)
            )  # in one host: their network cards share what comes from others
            rates.append(chip.link if ways == here else min(chip.link, chip.dcn * here))
            inner *= ways
        return Links(rates[2], rates[1], rates[0], rates[3], 1, chip.dcn)
    rest = [*target.shape, *([chip.devices] if chip.devices > 1 else [])]
    tensor, context, fsdp = (_along(ways, rest, target) for ways in (mesh.tensor, mesh.context, mesh.fsdp))
    data = _along(mesh.data // target.slices, rest, target)
    return Links(fsdp, context, tensor, data, target.slices, chip.dcn)


def _along(ways: int, rest: list[int], target: Target) -> float:
    """Bytes a second of an axis: of each dimension of the torus that it takes, whole ones first; `rest` loses them.

    A ring sends both ways at once; a line, which a dimension that does not close is, half of that.
    """
    chip, rate, left = target.chip, 0.0, ways
    while left > 1:
        whole = [n for n in rest if n > 1 and left % n == 0]
        part = [n for n in rest if n > left and n % left == 0]
        if whole:
            n = max(whole)
            rest.remove(n)
            left //= n
            rate += chip.link * (2 if n % chip.ring == 0 else 1)
        elif part:
            n = min(part)
            rest[rest.index(n)] = n // left
            left = 1
            rate += chip.link
        else:
            common = max((math.gcd(n, left) for n in rest), default=1)
            if common == 1:
                break
            n = next(n for n in rest if n % common == 0)
            rest[rest.index(n)] = n // common
            left //= common
            rate += chip.link
    return rate or chip.link
