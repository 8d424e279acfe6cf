"""Sampling text: prefill and a decode loop under one jit, with a key/value cache; rows stop at their end token.

Letters: B batch, P prompt length, N new tokens, S = P + N cache slots, V vocabulary.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import P

from jaxgpt.errors import UserError
from jaxgpt.losses import token_logp
from jaxgpt.mesh import BATCH
from jaxgpt.models.decode import Cache, decoder
from jaxgpt.models.heads import LanguageModel

SUBSET = 128
"""Vocabulary entries per block of the two-level inverse CDF."""


COLDEST = 1e-6
"""Below this temperature the likeliest token is taken."""


class Filter(NamedTuple):
    """Keeps the likely tokens only, from the first new token on: top_k of softmax(logits / temperature), then top_p."""

    top_k: jax.Array
    """Tokens kept; ties with the last are kept too."""
    top_p: jax.Array
    """Probability kept, of that of the top_k: the likeliest tokens up to and including the one that crosses it."""


@struct.dataclass
class Decoding:
    """A generation under way."""

    logits_BV: jax.Array
    cache: Cache
    segments_BS: jax.Array
    position_B: jax.Array
    """Position of the token to come."""
    tokens_BN: jax.Array
    """New tokens; padding behind the end."""
    logp_BN: jax.Array
    """Log-probability of each new token at the temperature, unfiltered, nats; 0 behind the end."""
    lengths_B: jax.Array
    """New tokens, the end token included."""
    done_B: jax.Array
    """Rows that have ended."""
    count: jax.Array
    """Tokens decoded so far."""


def left_positions(segments_BT: jax.Array) -> jax.Array:
    """Positions of left-padded rows: 0 at the first real token."""
    return jnp.maximum(jnp.cumsum((segments_BT > 0).astype(jnp.int32), axis=1) - 1, 0)


def bucket(size: int, unit: int) -> int:
    """The least of unit times 1, 2, 3, 4, 6, 8, 12, 16 ... that holds `size`: few shapes, so few programs."""
    units = max(-(-size // unit), 1)
    power = 1 << (units - 1).bit_length()
    return unit * (power * 3 // 4 if power >= 4 and units <= power * 3 // 4 else power)


def ragged(
    tokens: Sequence[Sequence[int]] | np.ndarray, lengths: Sequence[int] | None, vocab: int, name: str
) -> list[np.ndarray]:
    """The rows, without what lies beyond their lengths. Raises UserError, calling a row `name`, for no token ids."""
    if lengths is not None and len(lengths) != len(tokens):
        raise UserError(f"there are {len(lengths)} lengths for {len(tokens)} {name}s")
    rows = []
    for i, row in enumerate(tokens):
        ids = np.asarray(row)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UserError(f"{name} {i}: found {row!r:.60}, expected a list of token ids")
        length = len(ids) if lengths is None else int(lengths[i])
        if not 1 <= length <= len(ids):
            raise UserError(f"{name} {i}: length {length} of {len(ids)} tokens; it needs at least one")
        rows.append(ids[:length])
        if rows[i].min() < 0 or rows[i].max() >= vocab:
            wrong = rows[i][(rows[i] < 0) | (rows[i] >= vocab)][0]
            raise UserError(f"{name} {i}: token {wrong} is outside the vocabulary of {vocab}")
    return rows


def left_padded(rows: Sequence[np.ndarray], count: int, width: int, pad: int) -> dict[str, np.ndarray]:
    """Prompts as `start` takes them: tokens, segments [count, width] int32; rows beyond the given are padding."""
    tokens, segments = np.full((count, width), pad, np.int32), np.zeros((count, width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], segments[i, width - len(row) :] = row, 1
    return {"tokens": tokens, "segments": segments}


def right_padded(rows: Sequence[np.ndarray], count: int, width: int) -> dict[str, np.ndarray]:
    """Sequences for one forward pass: tokens, segments, positions [count, width] and lengths [count], all int32."""
    tokens, lengths = np.zeros((count, width), np.int32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], lengths[i] = row, len(row)
    time_T = np.arange(width, dtype=np.int32)
    segments = (time_T < lengths[:, None]).astype(np.int32)
    positions = np.tile(time_T, (count, 1))
    return {"tokens": tokens, "segments": segments, "positions": positions, "lengths": lengths}


def filter_logits(logits_BV: jax.Array, kept: Filter) -> jax.Array:
    """Logits with all but the kept tokens at minus infinity."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    rank_V = jnp.arange(logits_BV.shape[1])
    in_k_BV = sorted_BV >= _lowest(sorted_BV, rank_V < kept.top_k)
    p_BV = jax.nn.softmax(jnp.where(in_k_BV, sorted_BV, -jnp.inf), axis=-1)
    in_p_BV = (jnp.cumsum(p_BV, axis=-1) - p_BV < kept.top_p) | (kept.top_p >= 1.0)
    return jnp.where(logits_BV >= _lowest(sorted_BV, in_k_BV & in_p_BV), logits_BV, -jnp.inf)


def _lowest(x_BV: jax.Array, among: jax.Array) -> jax.Array:
    return jnp.min(jnp.where(among, x_BV, jnp.inf), axis=-1, keepdims=True)


def draw(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """One token a row from softmax(logits), by inverting the CDF in two levels: blocks, then entries of a block.

    Logits of minus infinity are never drawn, whatever the rounding of the sums. uniform_B: in [0, 1).
    """
    B, V = logits_BV.shape
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    whole = max(-(-V // SUBSET), 2) * SUBSET  # a single block would be a column, of which argmax forgets the sharding
    weights_BV = jnp.pad(weights_BV, ((0, 0), (0, whole - V)))
    blocks = weights_BV.reshape(B, -1, SUBSET)
    sums = jnp.sum(blocks, axis=-1)
    upto = jnp.cumsum(sums, axis=-1)
    target_B1 = uniform_B[:, None] * upto[:, -1:]
    block_B = _first(sums > 0, upto > target_B1)
    before_B = jnp.sum(jnp.where(jnp.arange(upto.shape[1]) == block_B[:, None] - 1, upto, 0.0), axis=-1)
    chosen = jax.nn.one_hot(block_B, upto.shape[1], dtype=bool)
    inside = jnp.sum(jnp.where(chosen[:, :, None], blocks, 0.0), axis=1)
    entry_B = _first(inside > 0, jnp.cumsum(inside, axis=-1) + before_B[:, None] > target_B1)
    return (block_B * SUBSET + entry_B).astype(jnp.int32)


def _first(possible: jax.Array, beyond: jax.Array) -> jax.Array:
    """Index of each row's first entry that is both; the last possible one where sums fell short by rounding."""
    both, places = possible & beyond, jnp.arange(possible.shape[1])
    last_B = jnp.max(jnp.where(possible, places, 0), axis=-1)
    return jnp.where(jnp.any(both, axis=-1), jnp.argmax(both, axis=-1), last_B)


def start(lm: LanguageModel, prompts_BP: jax.Array, segments_BP: jax.Array, new: int, pad: int) -> Decoding:
    """Prefills the cache with left-padded prompts (segments 0 on padding, 1 on text), ready for `new` tokens a row."""
    B, length = prompts_BP.shape
    rows, grid = P(BATCH), P(BATCH, None)
    segments_BS = jnp.concatenate([segments_BP, jnp.ones((B, new), jnp.int32, out_sharding=grid)], axis=1)
    positions_BP = left_positions(segments_BP)
    ready = decoder(lm)
    cache = ready.empty(B, length + new)
    first = jnp.int32(0)
    logits_BV, cache = ready.extend(prompts_BP, segments_BP, positions_BP, cache, segments_BS, first)
    return Decoding(
        logits_BV=logits_BV,
        cache=cache,
        segments_BS=segments_BS,
        position_B=positions_BP[:, -1] + 1,
        tokens_BN=jnp.full((B, new), pad, jnp.int32, out_sharding=grid),
        logp_BN=jnp.zeros((B, new), jnp.float32, out_sharding=grid),
        lengths_B=jnp.zeros((B,), jnp.int32, out_sharding=rows),
        done_B=jnp.zeros((B,), bool, out_sharding=rows),
        count=jnp.int32(0),
    )


def advance(
    lm: LanguageModel,
    state: Decoding,
    key: jax.Array,
    temperature: jax.Array,
    kept: Filter | None,
    ends: Sequence[int],
    pad: int,
    limit: jax.Array | int,
    pieces: int | None = None,
    after: int = 0,
) -> Decoding:
    """Decodes until every row has one of `ends` or `limit` tokens are there. Temperature 0 takes the likeliest token.

    One of `ends` among a row's first `after` new tokens is an ordinary token (lm-human-preferences' truncate_after).

    With `pieces`, ids from there on (rows that pad the embedding) are never drawn; unset draws from the exact softmax.
    Log-probabilities are of the whole softmax either way, as everywhere.
    """
    ready = decoder(lm)
    B, new = state.tokens_BN.shape
    prompt = state.segments_BS.shape[1] - new

    def going(s: Decoding) -> jax.Array:
        return (s.count < limit) & ~jnp.all(s.done_B)

    def body(s: Decoding) -> Decoding:
        uniform_B = jax.random.uniform(jax.random.fold_in(key, s.count), (B,), out_sharding=P(BATCH))
        token_B, logp_B = _choose(s.logits_BV, uniform_B, temperature, kept, pieces)
        token_B = jnp.where(s.done_B, jnp.int32(pad), token_B)
        logp_B = jnp.where(s.done_B, 0.0, logp_B)
        at = (jnp.int32(0), s.count)
        segments_BT = jnp.ones((B, 1), jnp.int32, out_sharding=P(BATCH, None))
        logits_BV, cache = ready.extend(
            token_B[:, None], segments_BT, s.position_B[:, None], s.cache, s.segments_BS, prompt + s.count
        )
        return s.replace(
            logits_BV=logits_BV,
            cache=cache,
            position_B=s.position_B + 1,
            tokens_BN=jax.lax.dynamic_update_slice(s.tokens_BN, token_B[:, None], at),
            logp_BN=jax.lax.dynamic_update_slice(s.logp_BN, logp_B[:, None], at),
            lengths_B=s.lengths_B + (~s.done_B).astype(jnp.int32),
            done_B=functools.reduce(operator.or_, ((token_B == end) & (s.count >= after) for end in ends), s.done_B),
            count=s.count + 1,
        )

    return jax.lax.while_loop(going, body, state)


def _choose(
    logits_BV: jax.Array, uniform_B: jax.Array, temperature: jax.Array, kept: Filter | None, pieces: int | None
) -> tuple[jax.Array, jax.Array]:
    warm = temperature >= COLDEST
    divisor = jnp.where(warm, temperature, 1.0)
    possible_BV = logits_BV
    if pieces is not None and pieces < logits_BV.shape[1]:
        possible_BV = jnp.where(jnp.arange(logits_BV.shape[1]) < pieces, logits_BV, -jnp.inf)
    tempered_BV = possible_BV / divisor
    candidates_BV = tempered_BV if kept is None else filter_logits(tempered_BV, kept)
    greedy_B = jnp.argmax(possible_BV, axis=-1).astype(jnp.int32)
    token_B = jnp.where(warm, draw(candidates_BV, uniform_B), greedy_B)
    return token_B, token_logp(logits_BV[:, None], token_B[:, None], divisor)[:, 0]


def generate(
    lm: LanguageModel,
    prompts_BP: jax.Array,
    segments_BP: jax.Array,
    key: jax.Array,
    *,
    new: int,
    temperature: jax.Array | float,
    ends: Sequence[int],
    pad: int,
    after: int = 0,
) -> Decoding:
    """Responses of at most `new` tokens to left-padded prompts, from exactly softmax(logits / temperature)."""
    state = start(lm, prompts_BP, segments_BP, new, pad)
    return advance(lm, state, key, jnp.asarray(temperature, jnp.float32), None, ends, pad, new, after=after)
