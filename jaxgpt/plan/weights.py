"""Every array of a model's parameters: its shape, the mesh axes that split it, and what it does. The models themselves
are in `models/`; a test holds that both agree leaf by leaf, sharding included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from jaxgpt.config.schema import LearnedPositions, LoraConfig, ModelConfig

Kind = Literal["language", "scalar"]
"""A model of the next token, or one that gives a number."""
Part = Literal["embedding", "attention", "mlp", "norms", "head", "adapters"]
PARTS: tuple[Part, ...] = ("embedding", "attention", "mlp", "norms", "head", "adapters")
LAYOUT: Mapping[str, tuple[str, ...]] = {
    "width": ("fsdp", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}
"""The mesh axes that split a dimension of parameters; those of `jaxgpt.mesh`, which imports jax (a test compares)."""


class Mesh(NamedTuple):
    """Devices along each axis of the mesh, in its order."""

    data: int = 1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def devices(self) -> int:
        """In all."""
        return math.prod(self)

    @property
    def rows(self) -> int:
        """Parts that the batch is split into."""
        return self.data * self.fsdp

    @property
    def width(self) -> int:
        """Parts that the width of parameters is split into at rest."""
        return self.fsdp * self.context

    def ways(self, name: str | None) -> int:
        """Parts that a dimension of LAYOUT is split into."""
        return 1 if name is None else math.prod(getattr(self, axis) for axis in LAYOUT[name])


@dataclass(frozen=True)
class Weight:
    """One array, or one of each layer."""

    path: str
    part: Part
    shape: tuple[int, ...]
    """Of one layer."""
    axes: tuple[str | None, ...]
    """Names of LAYOUT."""
    layers: int = 0
    """How many are stacked; 0 for an array outside the blocks."""
    multiplied: bool = False
    """Whether every token is multiplied with it."""

    @property
    def each(self) -> int:
        """Elements of one layer's."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Elements."""
        return self.each * max(self.layers, 1)

    def share(self, mesh: Mesh) -> int:
        """Elements of all layers on one device."""
        return self.size // math.prod(mesh.ways(axis) for axis in self.axes)

    def gathered(self, mesh: Mesh) -> int:
        """Elements of one layer that a device uses: all but its split over `tensor`."""
        return self.each // math.prod(mesh.ways(axis) for axis in self.axes if axis != "width")


def weights(c: ModelConfig, vocab: int, kind: Kind = "language", lora: LoraConfig | None = None) -> list[Weight]:
    """All parameters of a model with `vocab` rows of embeddings, adapters included."""
    D = c.width
    found = [Weight("backbone/embed_VD", "embedding", (vocab, D), ("vocab", "width"))]
    if isinstance(c.positions, LearnedPositions):
        found.append(Weight("backbone/positions_TD", "embedding", (c.context, D), (None, "width")))
    found += _attention(c, lora) + _mlp(c, lora)
    norms = ["attention_norm"] + ([] if c.residual == "parallel" and c.shared_norm else ["mlp_norm"])
    for name in norms:
        found += _norm(c, f"backbone/blocks/{name}", c.layers)
    found += _norm(c, "backbone/norm", 0)
    if kind == "scalar":
        found.append(Weight("head_D", "head", (D,), (None,), multiplied=True))
        found.append(Weight("bias", "head", (), ()))
    elif not c.tied:
        found.append(Weight("unembed_VD", "head", (vocab, D), ("vocab", "width"), multiplied=True))
    return found


def _norm(c: ModelConfig, path: str, layers: int) -> list[Weight]:
    names = [name for name, there in (("scale_D", c.norm.scale), ("bias_D", c.norm.bias)) if there]
    return [Weight(f"{path}/{name}", "norms", (c.width,), (None,), layers) for name in names]


def _attention(c: ModelConfig, lora: LoraConfig | None) -> list[Weight]:
    D, H, G, K = c.width, c.attention.heads, c.kv_heads, c.head_dim
    shared = None if G == 1 else "kv_heads"
    matrices = {
        "q_DHK": ((D, H, K), ("width", "heads", None)),
        "k_DGK": ((D, G, K), ("width", shared, None)),
        "v_DGK": ((D, G, K), ("width", shared, None)),
        "o_HKD": ((H, K, D), ("heads", None, "width")),
    }
    vectors = {}
    if c.attention.qkv_bias:
        vectors |= {"q_bias_HK": ((H, K), ("heads", None))}
        vectors |= dict.fromkeys(("k_bias_GK", "v_bias_GK"), ((G, K), (shared, None)))
    if c.attention.out_bias:
        vectors["o_bias_D"] = ((D,), (None,))
    if c.attention.qk_norm:
        vectors |= dict.fromkeys(("q_scale_K", "k_scale_K"), ((K,), (None,)))
    return list(_layer(c, "attention", matrices, vectors, lora))


def _mlp(c: ModelConfig, lora: LoraConfig | None) -> list[Weight]:
    D, F = c.width, c.hidden
    matrices = {"up_DF": ((D, F), ("width", "hidden"))}
    vectors = {}
    if c.gated:
        matrices["gate_DF"] = matrices["up_DF"]
    matrices["down_FD"] = ((F, D), ("hidden", "width"))
    if c.mlp.bias:
        vectors = {"up_bias_F": ((F,), ("hidden",)), "down_bias_D": ((D,), (None,))}
        vectors |= {"gate_bias_F": ((F,), ("hidden",))} if c.gated else {}
    return list(_layer(c, "mlp", matrices, vectors, lora))


Shapes = Mapping[str, tuple[Sequence[int], Sequence[str | None]]]


def _layer(
    c: ModelConfig, part: Literal["attention", "mlp"], matrices: Shapes, vectors: Shapes, lora: LoraConfig | None
) -> Iterator[Weight]:
    for name, (shape, axes) in matrices.items():
        yield Weight(f"backbone/blocks/{part}/{name}", part, tuple(shape), tuple(axes), c.layers, True)
        target = name.split("_")[0]
        if lora is None or target not in lora.targets:
            continue
        cut = len(shape) - 1 if target in ("o", "down") else 1
        path = f"backbone/blocks/{part}/lora_{target}"
        inner = (tuple(shape[:cut]), tuple(axes[:cut])), (tuple(shape[cut:]), tuple(axes[cut:]))
        a, b = ((*inner[0][0], lora.rank), (*inner[0][1], None)), ((lora.rank, *inner[1][0]), (None, *inner[1][1]))
        yield Weight(f"{path}/a_IL", "adapters", *a, c.layers, True)
        yield Weight(f"{path}/b_LO", "adapters", *b, c.layers, True)
    for name, (shape, axes) in vectors.items():
        yield Weight(f"backbone/blocks/{part}/{name}", part, tuple(shape), tuple(axes), c.layers)


def count(found: Sequence[Weight]) -> int:
    """Parameters."""
    return sum(weight.size for weight in found)


def by_part(found: Sequence[Weight]) -> dict[Part, int]:
    """Parameters of each part that has any."""
    sizes = {part: count([weight for weight in found if weight.part == part]) for part in PARTS}
    return {part: size for part, size in sizes.items() if size}
