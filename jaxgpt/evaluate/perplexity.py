"""Perplexity and bits per byte of any text under a finished model.

The convention: a document is BOS (the end token, for tokenizers without one) and its tokens; every token but BOS is
predicted exactly once, given the document before it, at least half a context of it where there is that much (windows of
a whole context, half a context apart).
No end token is predicted: the nats are those of the text, and so divide by its UTF-8 bytes, whatever the tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from jaxgpt.api import Model
from jaxgpt.evaluate.continuations import Continuation, Scorer

POOL = 32
"""Batches whose windows are scored together, those of like length in one batch."""


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
    """Windows over a document of `length` tokens, BOS included, for a model that predicts from up to `context` tokens.

    Each token but the first is scored once, from all tokens before it or at least context / 2 of them.
    """
    reach = context + 1  # the last token of a window is predicted, and predicts nothing
    end = min(length, reach)
    if end > 1:
        yield Window(0, 1, end)
    while end < length:
        scored, end = end, min(end + reach // 2, length)
        yield Window(end - reach, scored, end)


def score_texts(model: Model, texts: Iterable[str], batch: int) -> TextScore:
    """Scores documents, `batch` windows at a time; empty ones do not count. Raises UserError for a reward model."""
    scorer, total = Scorer(model, batch), TextScore()
    rows = _rows(model, texts)
    while pool := list(islice(rows, POOL * batch)):
        nats = -math.fsum(scored.logp for scored in scorer([asked for asked, _ in pool]))
        total = sum((facts for _, facts in pool), total + TextScore(nats=nats))
    return total


def _rows(model: Model, texts: Iterable[str]) -> Iterator[tuple[Continuation, TextScore]]:
    """Every window, and what it adds beside its nats."""
    for text in texts:
        tokens = [model.tokenizer.start, *model.tokenizer.encode(text)]
        for number, (first, scored, end) in enumerate(windows(len(tokens), model.config.context)):
            predicted = tokens[scored:end]
            facts = TextScore(tokens=len(predicted), unknown=predicted.count(model.tokenizer.unk))
            if number == 0:
                facts += TextScore(documents=1, bytes=len(text.encode("utf-8", "surrogatepass")))
            yield Continuation(tokens[first:scored], predicted), facts


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
