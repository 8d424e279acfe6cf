"""Log-probabilities of continuations of token sequences: what multiple choice and perplexity come down to.

Rows of like length run together; logits are only computed where something is predicted, a few positions at a time.

Letters: B batch, T time, C positions that predict, K last tokens to choose between, D model width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.api import Model
from jaxgpt.errors import UserError
from jaxgpt.losses import token_logp
from jaxgpt.mesh import fetch, put_whole
from jaxgpt.models.net import Params
from jaxgpt.sampling import bucket, left_padded, left_positions

LENGTH, FEWEST, CHOICES = 32, 8, 8
"""Units of the shapes that programs are compiled for: of rows; of positions that predict; of last tokens."""
CHUNK = 128
"""Positions whose logits are held at a time."""


class Continuation(NamedTuple):
    """Tokens, and the tokens behind them whose log-probability is asked for."""

    context: Sequence[int]
    tokens: Sequence[int]


class Scored(NamedTuple):
    """log p of a continuation, nats, and whether greedy decoding would give it."""

    logp: float
    greedy: bool


class _Row(NamedTuple):
    """One row for the model, shared by all continuations that differ from each other in their last token alone."""

    tokens: tuple[int, ...]
    ends: list[tuple[int, int, int]]
    """(index of the continuation, its length, its last token)."""

    @property
    def longest(self) -> int:
        return max(length for _, length, _ in self.ends)


class Scorer:
    """Scores continuations under a language model, `batch` rows at a time."""

    def __init__(self, model: Model, batch: int):
        if model.kind != "language":
            raise UserError(f"{model.folder} holds a reward model, which gives text no probability; see stage=")
        self.model, self.batch = model, batch
        self._score = jax.jit(functools.partial(_score, model), static_argnums=2)

    def __call__(self, asked: Sequence[Continuation]) -> list[Scored]:
        """One result for each, in order. An empty continuation has probability 1.

        Raises UserError where a context is empty, or context and continuation exceed the model's context by more than
        the token that is predicted last.
        """
        found = [Scored(0.0, True)] * len(asked)
        rows = sorted(self._rows(asked), key=lambda row: (-len(row.tokens), -row.longest))
        for at in range(0, len(rows), self.batch):
            part = rows[at : at + self.batch]
            logp_BC, likely_BC, last_BK, likeliest_BK = self._run(part)
            for i, row in enumerate(part):
                for k, (index, length, _) in enumerate(row.ends):
                    before = slice(logp_BC.shape[1] - length, logp_BC.shape[1] - 1)
                    logp = float(logp_BC[i, before].sum(dtype=np.float64)) + float(last_BK[i, k])
                    found[index] = Scored(logp, bool(likely_BC[i, before].all() and likeliest_BK[i, k]))
        return found

    def _rows(self, asked: Sequence[Continuation]) -> Iterator[_Row]:
        limit, vocab = self.model.config.context, self.model.vocab
        shared: dict[tuple[int, ...], list[tuple[int, int, int]]] = {}
        for index, (context, tokens) in enumerate(asked):
            whole = (*context, *tokens)
            if not tokens:
                continue
            if not context or len(whole) - 1 > limit:
                found = f"{len(context)} tokens and {len(tokens)} to predict"
                raise UserError(f"continuation {index}: {found}; it needs a context, and {limit} is the model's")
            if min(whole) < 0 or max(whole) >= vocab:
                raise UserError(f"continuation {index}: a token outside the vocabulary of {vocab}")
            shared.setdefault(whole[:-1], []).append((index, len(tokens), whole[-1]))
        for row, ends in shared.items():
            for at in range(0, len(ends), CHOICES):
                yield _Row(row, ends[at : at + CHOICES])

    def _run(self, rows: list[_Row]) -> tuple[np.ndarray, ...]:
        model = self.model
        ways = model.mesh.shape["data"] * model.mesh.shape["fsdp"]
        width = min(bucket(max(len(row.tokens) for row in rows), LENGTH), model.config.context)
        count = bucket(len(rows), ways)
        batch = left_padded([np.asarray(row.tokens) for row in rows], count, width, model.tokenizer.pad)
        choices = 1 if all(len(row.ends) == 1 for row in rows) else CHOICES
        batch["last"] = np.zeros((count, choices), np.int32)
        for i, row in enumerate(rows):
            batch["last"][i, : len(row.ends)] = [token for _, _, token in row.ends]
        predicting = min(_power(max(row.longest for row in rows)), width)
        with jax.set_mesh(model.mesh):
            return fetch(self._score(model.params, put_whole(batch, model.mesh), predicting))


def _power(count: int) -> int:
    """The least of 8, 32, 128, 512 ... that holds `count`: few shapes, so few programs."""
    return FEWEST * 4 ** max(math.ceil(math.log(count / FEWEST, 4)), 0)


def _score(model: Model, params: Params, rows: dict[str, jax.Array], predicting: int) -> tuple[jax.Array, ...]:
    """Of the last `predicting` positions: log p of the row's own next token and whether it is the likeliest, [B, C]
    (meaningless in the last column); then the same of each token that may follow the row, [B, K]."""
    lm = model.net.bind(params)
    tokens_BT, segments_BT = rows["tokens"], rows["segments"]
    hidden_BTD = lm.hidden(tokens_BT, segments_BT, left_positions(segments_BT))
    targets_BC = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))[:, -predicting:]
    last_BV = lm.logits(hidden_BTD[:, -1:])

    def choice(token_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _judge(model, last_BV, token_B[:, None])

    chosen = [choice(rows["last"][:, k]) for k in range(rows["last"].shape[1])]
    last_BK, likeliest_BK = (jnp.concatenate(parts, axis=1) for parts in zip(*chosen, strict=True))

    chunks = -(-predicting // CHUNK)
    short = chunks * CHUNK - predicting if chunks > 1 else 0
    hidden_BCD = jnp.pad(hidden_BTD[:, -predicting:], ((0, 0), (short, 0), (0, 0)))
    padded_BC = jnp.pad(targets_BC, ((0, 0), (short, 0)))
    parts = (
        jnp.stack(jnp.split(hidden_BCD, chunks, axis=1)),
        jnp.stack(jnp.split(padded_BC, chunks, axis=1)),
    )
    judged = jax.lax.map(lambda part: _judge(model, lm.logits(part[0]), part[1]), parts)
    logp_BC, likely_BC = (jnp.concatenate(list(found), axis=1)[:, short:] for found in judged)
    return logp_BC, likely_BC, last_BK, likeliest_BK


def _judge(model: Model, logits_BCV: jax.Array, tokens_BC: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of tokens, and whether greedy decoding takes each, which it never does for rows that pad the embedding."""
    known_V = jnp.arange(logits_BCV.shape[-1]) < model.tokenizer.size
    likeliest_BC = jnp.argmax(jnp.where(known_V, logits_BCV, -jnp.inf), axis=-1)
    return token_logp(logits_BCV, tokens_BC), likeliest_BC == tokens_BC
