"""Floating-point operations of a token, from the products that the model makes: a multiplication and an addition each.

A product of one token with a matrix of n elements is 2 n, and its backward pass 4 n: one product for the gradient of
its input and one for that of the matrix, which frozen matrices lack. Attention is counted in two conventions: causal,
where a query meets the keys up to its own, and full, where it meets every key of the row (PaLM, arXiv 2204.02311,
appendix B); windows are kept in both. Norms, activations, rotations and softmax are left out, as everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxgpt.config.schema import ModelConfig
from jaxgpt.plan.weights import Weight

BACKWARD_SCORES = {"tpu": 3.5, "gpu": 2.5, "cpu": 2.0}
"""Attention's backward pass over its forward pass. That has two products; a kernel that does not keep scores makes them
again and has five (FlashAttention-2, arXiv 2307.08691), or seven where queries and keys have a program each (splash
attention); four where scores are kept."""


@dataclass(frozen=True)
class Flops:
    """Operations of one token of a row, forward, of each part that differs in the backward pass."""

    blocks: float
    """Products with the matrices of the blocks that learn, adapters among them."""
    frozen: float
    """Those with matrices that do not."""
    causal: float
    """Scores and their sums, of the keys that are seen."""
    full: float
    """The same of every key of the row."""
    head: float
    """The last product, of a token that is predicted."""
    ends: float
    """Of `blocks` and `frozen`, products whose results no backward pass asks for: a block's last ones."""

    def forward(self, full: bool = False) -> float:
        """A forward pass; `full` says how attention is counted."""
        return self.blocks + self.frozen + self.head + (self.full if full else self.causal)

    def train(self, full: bool = False) -> float:
        """Forward and backward, as utilisation is counted: nothing that is computed again."""
        return 3 * self.blocks + 2 * self.frozen + 3 * self.head + 3 * (self.full if full else self.causal)

    def hardware(self, remat: str, kind: str, flash: bool, chunked: bool) -> float:
        """What a chip really does in a training step.

        remat: the policy, which makes blocks again: all of them (full, and attention, which keeps the kernel's result
        but not what its backward pass needs), or attention alone (dots, offload). flash: whether a kernel skips what
        the mask hides and keeps no scores. chunked: whether the last product is made again in the backward pass.
        """
        again = {"none": 0.0, "dots": 0.0, "offload": 0.0}.get(remat, 1.0)
        attention = self.causal if flash else self.full
        scores = 1 + (remat != "none") + (BACKWARD_SCORES[kind] if flash else BACKWARD_SCORES["cpu"])
        products = 3 * self.blocks + 2 * self.frozen + again * (self.blocks + self.frozen - self.ends)
        return products + scores * attention + (3 + chunked) * self.head


def per_token(
    c: ModelConfig, found: list[Weight], tokens: int, predicted: float, scalar: bool = False, adapted: bool = False
) -> Flops:
    """Operations of a token in rows of `tokens`, of which `predicted` get the last product.

    found: the model's parameters. adapted: whether adapters alone (and a scalar head) are trained.
    """
    products = [weight for weight in found if weight.multiplied and weight.part != "head"]
    learned = [weight for weight in products if not adapted or weight.part == "adapters"]
    every = 2.0 * sum(weight.size for weight in products)
    blocks = 2.0 * sum(weight.size for weight in learned)
    if scalar:
        head = 2.0 * c.width
    else:
        rows = next(weight.shape[0] for weight in found if weight.path == "backbone/embed_VD")
        head = 2.0 * rows * c.width * predicted / tokens
    each = 4.0 * c.attention.heads * c.head_dim
    windows = [c.attention.windows[layer % len(c.attention.windows)] for layer in range(c.layers)]
    causal = sum(each * seen(tokens, window) for window in windows)
    full = sum(each * min(tokens, window or tokens) for window in windows)
    last = ("mlp/down_FD", "attention/o_HKD") if c.residual == "parallel" else ("mlp/down_FD",)
    ends = 2.0 * sum(weight.size for weight in products if weight.path.endswith(last))
    return Flops(blocks, every - blocks, causal, full, head, ends)


def seen(tokens: int, window: int | None) -> float:
    """Keys that a query of a row sees, itself among them, on average over the row."""
    most = min(tokens, window or tokens)
    return (most * (most + 1) / 2 + (tokens - most) * most) / tokens
