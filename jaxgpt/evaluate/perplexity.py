"""Perplexity and bits per byte of any text under a finished model.

The convention: a document is BOS and its tokens; every token but BOS is predicted exactly once, given the document
before it, at least half a context of it where there is that much (windows of a whole context, half a context apart).
No end token is predicted: the nats are those of the text, and so divide by its UTF-8 bytes, whatever the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from jaxgpt.api import Model
from jaxgpt.errors import UserError

POOL = 32
"""Batches whose windows are sorted by length together."""


@dataclass(frozen=True)
class TextScore:
    """Sums over documents; adding two gives those of both."""

    documents: int = 0
    tokens: int = 0
    """Predicted tokens."""
    bytes: int = 0
    """UTF-8 bytes of the text."""
    nats: float = 0.0
    """-log p of the text."""
    unknown: int = 0
    """Tokens that stand for characters the tokenizer cannot spell: they cost too little."""

    def __add__(self, other: TextScore) -> TextScore:
        return TextScore(
            self.documents + other.documents,
            self.tokens + other.tokens,
            self.bytes + other.bytes,
            self.nats + other.nats,
            self.unknown + other.unknown,
        )

    @property
    def perplexity(self) -> float:
        """exp of the nats per token: depends on the tokenizer."""
        return _exp(self.nats / self.tokens) if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Comes from all tokens alike, so that models with other tokenizers can be compared."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    def values(self) -> dict[str, Any]:
        """Everything, for JSON."""
        means = {"perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte}
        sums = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "nats": self.nats}
        return means | sums | {"unknown_tokens": self.unknown}


class Window(NamedTuple):
    """Tokens [first, end) of a document, of which those from `scored` on are predicted."""

    first: int
    scored: int
    end: int


def windows(length: int, context: int) -> Iterator[Window]:
    """Windows over a document of `length` tokens, BOS included, of at most `context` tokens each.

    Each token but the first is scored once, with min(all, context - context // 2) tokens before it in its window or
    more; every window but the only one of a short document is a whole context.
    """
    end = min(length, context)
    if end > 1:
        yield Window(0, 1, end)
    while end < length:
        scored, end = end, min(end + context // 2, length)
        yield Window(end - context, scored, end)


def score_texts(model: Model, texts: Iterable[str], batch: int) -> TextScore:
    """Scores documents, `batch` windows at a time, those of like length together; empty ones do not count.

    Raises UserError where the model's context has no room for a token and its prediction.
    """
    if model.config.context < 2:
        raise UserError(f"{model.folder}: a context of {model.config.context} leaves nothing to predict from")
    total = TextScore()
    rows = _rows(model, texts)
    while pool := list(islice(rows, POOL * batch)):
        pool.sort(key=lambda row: -len(row[0]))
        for at in range(0, len(pool), batch):
            part = pool[at : at + batch]
            logp_BT = model.logprobs([tokens for tokens, _, _ in part])
            sums = [
                float(logp_BT[i, skip : len(tokens)].sum(dtype="float64")) for i, (tokens, skip, _) in enumerate(part)
            ]
            total += TextScore(nats=-math.fsum(sums))
        for _, _, facts in pool:
            total += facts
    return total


def _rows(model: Model, texts: Iterable[str]) -> Iterator[tuple[Sequence[int], int, TextScore]]:
    """(tokens of a window, how many of them are context, what it adds beside its nats) for every window."""
    for text in texts:
        tokens = model.encode(text)
        for number, (first, scored, end) in enumerate(windows(len(tokens), model.config.context)):
            unknown = tokens[scored:end].count(model.tokenizer.unk)
            facts = TextScore(tokens=end - scored, unknown=unknown)
            if number == 0:
                facts += TextScore(documents=1, bytes=len(text.encode("utf-8", "surrogatepass")))
            yield tokens[first:end], scored - first, facts


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
