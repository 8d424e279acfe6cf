"""Sampling text: prefill and a decode loop under one jit, with a key/value cache; rows stop at their end token.

Letters: B batch, P prompt length, N new tokens, S = P + N cache slots, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import P

from jaxgpt.losses import token_logp
from jaxgpt.mesh import BATCH
from jaxgpt.models.decode import Cache, decoder
from jaxgpt.models.heads import LanguageModel

SUBSET = 128
"""Vocabulary entries per block of the two-level inverse CDF."""


class Filter(NamedTuple):
    """Keeps the likely tokens only; both count after the temperature."""

    top_k: jax.Array
    """Tokens kept; ties with the last are kept too."""
    top_p: jax.Array
    """Probability kept: the most likely tokens up to and including the one that crosses it."""


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


def filter_logits(logits_BV: jax.Array, kept: Filter) -> jax.Array:
    """Logits with all but the kept tokens at minus infinity."""
    sorted_BV = -jnp.sort(-logits_BV, axis=-1)
    at_k_B = jnp.take_along_axis(sorted_BV, jnp.full((logits_BV.shape[0], 1), kept.top_k - 1), axis=-1)
    before_BV = jnp.cumsum(jax.nn.softmax(sorted_BV, axis=-1), axis=-1) - jax.nn.softmax(sorted_BV, axis=-1)
    crossing_B = jnp.sum((before_BV < kept.top_p).astype(jnp.int32), axis=-1, keepdims=True) - 1
    at_p_B = jnp.take_along_axis(sorted_BV, jnp.maximum(crossing_B, 0), axis=-1)
    return jnp.where(logits_BV >= jnp.maximum(at_k_B, at_p_B), logits_BV, -jnp.inf)


def draw(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
    """One token a row from softmax(logits), by inverting the CDF in two levels: blocks, then entries of a block."""
    B, V = logits_BV.shape
    weights_BV = jnp.exp(logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True))
    weights_BV = jnp.pad(weights_BV, ((0, 0), (0, -V % SUBSET)))
    blocks = weights_BV.reshape(B, -1, SUBSET)
    upto = jnp.cumsum(jnp.sum(blocks, axis=-1), axis=-1)
    target_B = uniform_B * upto[:, -1]
    block_B = jnp.minimum(jnp.sum((upto <= target_B[:, None]).astype(jnp.int32), axis=-1), upto.shape[1] - 1)
    chosen = jax.nn.one_hot(block_B, upto.shape[1], dtype=bool)
    before_B = jnp.sum(jnp.where(jnp.arange(upto.shape[1]) == block_B[:, None] - 1, upto, 0.0), axis=-1)
    inside = jnp.sum(jnp.where(chosen[:, :, None], blocks, 0.0), axis=1)
    passed = (jnp.cumsum(inside, axis=-1) + before_B[:, None] <= target_B[:, None]).astype(jnp.int32)
    entry_B = jnp.minimum(jnp.sum(passed, axis=-1), jnp.max(jnp.where(inside > 0, jnp.arange(SUBSET), 0), axis=-1))
    return (block_B * SUBSET + entry_B).astype(jnp.int32)


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
    end: int,
    pad: int,
    limit: jax.Array | int,
) -> Decoding:
    """Decodes until every row has ended or `limit` tokens are there. Temperature 0 takes the likeliest token."""
    ready = decoder(lm)
    B, new = state.tokens_BN.shape
    prompt = state.segments_BS.shape[1] - new

    def going(s: Decoding) -> jax.Array:
        return (s.count < limit) & ~jnp.all(s.done_B)

    def body(s: Decoding) -> Decoding:
        uniform_B = jax.random.uniform(jax.random.fold_in(key, s.count), (B,), out_sharding=P(BATCH))
        token_B, logp_B = _choose(s.logits_BV, uniform_B, temperature, kept)
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
            done_B=s.done_B | (token_B == end),
            count=s.count + 1,
        )

    return jax.lax.while_loop(going, body, state)


def _choose(
    logits_BV: jax.Array, uniform_B: jax.Array, temperature: jax.Array, kept: Filter | None
) -> tuple[jax.Array, jax.Array]:
    warm = jnp.where(temperature > 0, temperature, 1.0)
    tempered_BV = logits_BV / warm
    candidates_BV = tempered_BV if kept is None else filter_logits(tempered_BV, kept)
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    token_B = jnp.where(temperature > 0, draw(candidates_BV, uniform_B), greedy_B)
    return token_B, token_logp(logits_BV[:, None], token_B[:, None], warm)[:, 0]


def generate(
    lm: LanguageModel,
    prompts_BP: jax.Array,
    segments_BP: jax.Array,
    key: jax.Array,
    *,
    new: int,
    temperature: jax.Array | float,
    end: int,
    pad: int,
    kept: Filter | None = None,
) -> Decoding:
    """Responses of at most `new` tokens to left-padded prompts, from softmax(logits / temperature)."""
    state = start(lm, prompts_BP, segments_BP, new, pad)
    return advance(lm, state, key, jnp.asarray(temperature, jnp.float32), kept, end, pad, new)
