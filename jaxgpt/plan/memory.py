"""Bytes that a stage's programs take on each device.

What stays between programs are parameters, the optimizer's two moments (and an average), and frozen models. A training
step adds gradients and what its forward pass keeps; its peak is in one of three places:

- the head: all that the blocks kept, the output matrix joined over fsdp, its gradient, and a chunk of logits;
- the first blocks of the backward pass: all that the blocks kept, all gradients, and one block at work;
- the embedding's gradient, before it is scattered: all gradients and the whole table.

What a block keeps for the backward pass depends on `model.remat`: its input (full), also the results of products and
attention (dots; offload has them in the host's memory), of attention alone (attention), or all that autodiff asks for
(none). Scores are kept where attention has no kernel. Of parameters the shape is padded to TPU tiles of 8 x 128.

Letters: B rows, T time, D width, F feed-forward width, H query heads, G key/value heads, K head width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxgpt.config.schema import Config, ModelConfig
from jaxgpt.plan.chips import Chip
from jaxgpt.plan.weights import Mesh, Weight
from jaxgpt.plan.work import Model, Program, Rows, Work, work

LOGITS = 2**28
"""Bytes of logits that a device holds at a time: MOST of models/vocabulary.py."""
LANES = 128
"""Of a TPU: pieces of a sequence have to be multiples of it for splash attention, and last dimensions are filled up."""


@dataclass(frozen=True)
class Use:
    """What one program has on a device, bytes by what it is."""

    name: str
    arguments: Mapping[str, float]
    """Given to it."""
    temporaries: Mapping[str, float]
    """While it runs, at its peak."""
    peak: str = ""
    """Where that is."""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.arguments.values()) + sum(self.temporaries.values())


@dataclass(frozen=True)
class Memory:
    """What a stage has on each device, bytes."""

    resident: Mapping[str, float]
    """What stays between programs."""
    programs: Mapping[str, Use]
    host: float = 0.0
    """Bytes that remat=offload puts into the host's memory, of each device."""
    notes: tuple[str, ...] = field(default=())

    @property
    def fullest(self) -> Use:
        """The program with the most temporaries."""
        return max(self.programs.values(), key=lambda use: sum(use.temporaries.values()))

    @property
    def peak(self) -> float:
        """Bytes at the fullest moment: all that stays and the temporaries of that program."""
        return sum(self.resident.values()) + sum(self.fullest.temporaries.values())


def memory(config: Config, stage: str, mesh: Mesh, chip: Chip, plan: Work | None = None) -> Memory:
    """Bytes of a stage on each device of a mesh.

    plan: the stage's work, unset for `work(config, stage)`. The mesh must divide the model and the batch (see
    `meshes.problems`).
    """
    plan = plan or work(config, stage)
    resident: dict[str, float] = {}
    for model in plan.models.values():
        for part, size in kept(model, mesh, chip).items():
            resident[part if len(plan.models) == 1 else f"{model.role} {part}"] = size
    uses = {program.name: _use(plan, program, mesh, chip) for program in plan.programs}
    policy = next(iter(plan.models.values()))
    host = 0.0
    if policy.config.remat == "offload":
        host = sum(
            block_keeps(Share.of(plan.models[rows.role], rows, mesh, chip), "dots") * policy.config.layers
            for program in plan.programs
            if program.kind == "train"
            for rows in program.reads
        )
    return Memory(resident, uses, host)


def kept(model: Model, mesh: Mesh, chip: Chip) -> dict[str, float]:
    """What a model keeps between programs."""
    learned = sum(stored(weight, mesh, chip) for weight in model.learned)
    if not model.trained:
        return {"frozen": sum(stored(w, mesh, chip, model.kept if len(w.shape) > 1 else 4) for w in model.weights)}
    frozen = 0.0 if model.lora is None else sum(stored(w, mesh, chip) for w in model.weights) - learned
    parts = {"parameters": learned + frozen, "optimizer": 2 * learned}
    return parts | ({"average": learned} if model.averaged else {})


def stored(weight: Weight, mesh: Mesh, chip: Chip, size: int = 4) -> float:
    """Bytes of a parameter on one device, padded to the tiles of a TPU: its compiler lays the two dimensions last that
    lose the least."""
    local = [n // mesh.ways(axis) for n, axis in zip(weight.shape, weight.axes, strict=True)]
    shape = [weight.layers, *local] if weight.layers else local
    return weight.share(mesh) * size * (_padding(shape) if chip.kind == "tpu" else 1.0)


def _padding(shape: Sequence[int]) -> float:
    if len(shape) < 2:
        return 1.0
    pairs = itertools.permutations(shape, 2)
    return min(-(-a // 8) * 8 / a * -(-b // 128) * 128 / b for a, b in pairs)


@dataclass(frozen=True)
class Share:
    """What one device has of the rows that a model reads."""

    c: ModelConfig
    vocab: int
    scalar: bool
    size: int
    """Bytes of an element of the blocks' arithmetic."""
    rows: int
    row: int
    """Tokens of a whole row."""
    tokens: int
    """In attention and products: rows times this device's part of the time."""
    stream: float
    """In the residual stream, which `tensor` splits as well."""
    predicted: float
    tensor: int
    groups: int
    """Key/value heads here."""
    kernel: bool
    """Whether attention keeps no scores."""
    lanes: int
    """Width of a head as it lies in memory."""

    @classmethod
    def of(cls, model: Model, rows: Rows, mesh: Mesh, chip: Chip) -> Share:
        """Of a mesh that divides the rows."""
        c = model.config
        here = rows.rows // mesh.rows or 1
        splits = rows.tokens % (2 * mesh.context) == 0
        time = rows.tokens // mesh.context if splits else rows.tokens
        stream = here * time / (mesh.tensor if time % mesh.tensor == 0 else 1)
        groups = 1 if c.kv_heads == 1 else c.kv_heads // mesh.tensor
        scalar = model.kind == "scalar"
        return cls(
            c, model.vocab, scalar, compute_bytes(c, chip), here, rows.tokens, here * time, stream,
            here * time * rows.predicted / rows.tokens, mesh.tensor, groups, has_kernel(c, rows.tokens, mesh, chip),
            -(-c.head_dim // LANES) * LANES if chip.kind == "tpu" else c.head_dim,
        )  # fmt: skip

    @property
    def heads(self) -> int:
        """Query heads here."""
        return self.c.attention.heads // self.tensor

    @property
    def hidden(self) -> int:
        """Feed-forward width here."""
        return self.c.hidden // self.tensor

    @property
    def attended(self) -> float:
        """Bytes of the heads' results; a TPU fills the width of a head up to its lanes."""
        return float(self.tokens * self.heads * self.lanes * self.size)

    @property
    def qkv(self) -> float:
        """Bytes of queries, keys and values."""
        return float(self.tokens * (self.heads + 2 * self.groups) * self.lanes * self.size)

    @property
    def widened(self) -> float:
        """Bytes of the results of the feed-forward's first products."""
        return float(self.tokens * self.hidden * (2 if self.c.gated else 1) * self.size)

    @property
    def scores(self) -> float:
        """Bytes of all scores of a layer in float32, where attention keeps them."""
        return 0.0 if self.kernel else 4.0 * self.heads * self.tokens * self.row

    @property
    def logits(self) -> tuple[int, float]:
        """Chunks that logits are made in, and the bytes of one in float32."""
        if self.scalar or not self.predicted:
            return 1, 0.0
        each, count = 4 * self.vocab // self.tensor, max(int(self.predicted), 1)
        chunks = next(n for n in range(1, count + 1) if count % n == 0 and (count // n * each <= LOGITS or n == count))
        return chunks, float(count // chunks * each)


def compute_bytes(c: ModelConfig, chip: Chip) -> int:
    """Bytes of an element of the blocks' arithmetic."""
    return 4 if c.dtype == "float32" or (c.dtype == "auto" and chip.kind == "cpu") else 2


def has_kernel(c: ModelConfig, tokens: int, mesh: Mesh, chip: Chip) -> bool:
    """Whether rows of so many tokens have an attention kernel that keeps no scores: the choice of
    models/attention_kernels.py."""
    if chip.kind == "cpu" or c.attention.kernel == "reference":
        return False
    if chip.kind == "tpu":
        return tokens % (2 * mesh.context if mesh.context > 1 else 1) == 0 and tokens // mesh.context % LANES == 0
    half = compute_bytes(c, chip) == 2
    return half and c.attention.softcap is None and c.head_dim <= 128 and mesh.context == 1


def block_keeps(s: Share, remat: str) -> float:
    """Bytes that one block keeps for its backward pass."""
    carried = s.stream * s.c.width * s.size
    if remat in ("full", "offload"):
        return carried
    if remat == "attention":
        return carried + s.attended
    if remat == "dots":  # and the two results that go into the stream
        return carried + s.qkv + s.attended + s.widened + 2 * carried
    return _all_kept(s)


def _all_kept(s: Share) -> float:
    """Bytes that autodiff asks for in one block: of each norm three arrays in float32, what attention and feed-forward
    are given, queries, keys, values, what was attended to and its copy, and the parts of the activation."""
    c = s.c
    norms = 1 if c.residual == "parallel" and c.shared_norm else 2
    normed = (norms * 3 * 4 * s.stream + 2 * s.tokens * s.size) * c.width
    inner = (3 if c.gated else 6) * s.widened
    return normed + s.qkv + 2 * s.attended + inner + s.scores * (1 if s.size == 4 else 1.5)


def _block_works(s: Share, found: Sequence[Weight], mesh: Mesh, remat: str | None) -> float:
    """Bytes of one block at work beside what all blocks keep; `remat` is None for a forward pass alone.

    In the backward pass it has what a policy did not keep, and as many gradients; the numbers of copies are those of
    compiled programs for TPUs (see the README).
    """
    joined = sum(weight.gathered(mesh) for weight in found if weight.layers and len(weight.shape) > 1) * s.size
    wide, single = s.tokens * s.c.width * s.size, s.attended / s.size * 4
    if remat is None:
        inner = max(s.widened, s.qkv + s.attended + 2 * single)
        return joined + wide + inner + 2 * s.stream * s.c.width * s.size + 2 * s.scores
    again = 0.0 if remat == "none" else _all_kept(s) - (block_keeps(s, remat) if remat == "dots" else 0.0)
    works = 3 * joined + 8 * wide + (2 if s.c.gated else 4) * s.widened + 8 * s.attended + 4 * single
    return again + works + 2 * s.scores


def _use(plan: Work, program: Program, mesh: Mesh, chip: Chip) -> Use:
    roles = dict.fromkeys(rows.role for rows in program.reads)
    models = [plan.models[role] for role in roles]
    arguments: dict[str, float] = {}
    for model in models:
        parts = kept(model, mesh, chip)
        if program.kind != "train":
            parts = {name: size for name, size in parts.items() if name not in ("optimizer", "average")}
        for name, size in parts.items():
            arguments[name] = arguments.get(name, 0.0) + size
    tokens = sum(rows.rows * rows.tokens * program.parts for rows in program.reads) / mesh.rows
    arguments["batch"] = 20.0 * tokens
    match program.kind:
        case "train":
            temporaries, peak = _training(plan, program, mesh, chip)
        case "score":
            temporaries, peak = _scoring(plan, program, mesh, chip), ""
        case "generate":
            temporaries, peak = _generating(plan, program, mesh, chip), ""
    return Use(program.name, arguments, temporaries, peak)


def _training(plan: Work, program: Program, mesh: Mesh, chip: Chip) -> tuple[dict[str, float], str]:
    """Temporaries of an update at its fullest moment, and which that is."""
    roles = dict.fromkeys(rows.role for rows in program.reads)
    if any(plan.models[role].head_only for role in plan.models):
        roles |= {role: None for role in plan.models if plan.models[role].head_only}
    gradients = sum(stored(weight, mesh, chip) for role in roles for weight in plan.models[role].learned)
    shares = [(plan.models[rows.role], Share.of(plan.models[rows.role], rows, mesh, chip)) for rows in program.reads]
    keeps = joined = head = block = table = 0.0
    for model, s in shares:
        c, found = model.config, model.weights
        keeps += block_keeps(s, c.remat) * c.layers
        if c.remat == "none" and mesh.width > 1:  # the joined weights are what the backward pass of a product keeps
            joined += sum(w.gathered(mesh) * w.layers for w in found if len(w.shape) > 1) * s.size
        rows = s.vocab // mesh.tensor * c.width
        learns = model.lora is None
        head = max(head, (s.size + 8 * learns) * rows + 3 * s.logits[1] if s.logits[1] else 0.0)
        block = max(block, _block_works(s, found, mesh, c.remat))
        table = max(table, 2 * 4.0 * rows if learns else 4.0 * rows)
    held = gradients if program.parts > 1 else 0.0  # the sum of the parts before this one
    moments = {
        "head": {"activations": keeps, "joined weights": joined, "head": head, "gradients": held},
        "blocks": {"activations": keeps, "joined weights": joined, "one block": block, "gradients": gradients + held},
        "embedding": {"embedding": table, "gradients": gradients + held},
    }
    peak = max(moments, key=lambda name: sum(moments[name].values()))
    return {name: size for name, size in moments[peak].items() if size}, peak


def _scoring(plan: Work, program: Program, mesh: Mesh, chip: Chip) -> dict[str, float]:
    """Temporaries of forward passes one after the other: of the largest of a block and of a head, which has all hidden
    states whole and a chunk of logits with what becomes of it."""
    block = head = 0.0
    for rows in program.reads:
        model = plan.models[rows.role]
        s, width = Share.of(model, rows, mesh, chip), model.config.width
        block = max(block, _block_works(s, model.weights, mesh, None))
        hidden = 2 * s.tokens * width * s.size
        if s.logits[1]:
            head = max(head, hidden + s.vocab // mesh.tensor * width * s.size + 4 * s.logits[1])
    return {"one block": block} if block >= head else {"head": head}


def _generating(plan: Work, program: Program, mesh: Mesh, chip: Chip) -> dict[str, float]:
    """Temporaries of sampling: the cache, all weights joined over fsdp and cast, the prompts' forward pass, logits."""
    (rows,) = program.reads
    model = plan.models[rows.role]
    c = model.config
    s = Share.of(model, rows, mesh._replace(context=1), chip)
    slots = rows.tokens + program.new
    cache = 2.0 * c.layers * s.rows * s.groups * slots * c.head_dim * s.size
    matrices = sum(w.gathered(mesh) * max(w.layers, 1) for w in model.weights if len(w.shape) > 1) * s.size
    wide = s.tokens * c.width * s.size
    scores = 4.0 * s.heads * s.rows * rows.tokens * slots  # kernels read no cache
    prompts = 4 * scores + 6 * wide + 2 * s.widened
    parts = {"KV cache": cache, "joined weights": matrices, "prompts": prompts, "logits": 4 * 4.0 * s.rows * s.vocab}
    return parts | {"fragments": FRAGMENTS * sum(parts.values())}


FRAGMENTS = 0.3
"""What lies idle between buffers where layers are unrolled, as a share of them; compared with compiled programs."""
