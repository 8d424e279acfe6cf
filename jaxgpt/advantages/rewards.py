"""From sampled responses and their scores to a reward for every token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxgpt.advantages.kl import KlKind, kl_estimate, unmasked

Place = Literal["last", "after"]
"""Where a score stands: on the last real token (lm-human-preferences, OpenRLHF, verl) or on the next position (TRL)."""
MissingEos = Literal["replace", "subtract", "scale", "keep"]
"""What is done with the score of a response that never ended."""


class Truncated(NamedTuple):
    """Responses cut at their first stop token."""

    mask_BN: jax.Array
    """1 on the tokens that are kept, the stop token included; float32 [B, N]."""
    lengths_B: jax.Array
    """Tokens kept; int32 [B]."""
    ended_B: jax.Array
    """Whether a stop token was found; bool [B]."""


def truncate_at_stop(
    tokens_BN: jax.Array, lengths_B: jax.Array, stop: Sequence[int] | jax.Array, after: int = 0
) -> Truncated:
    """Cut sampled responses after their first stop token at index `after` or later (lm-human-preferences).

    Nothing behind the cut may be shown to a reward model: a caller pads by `mask_BN`. Earlier stop tokens are ordinary
    ones.

    Args:
        tokens_BN: responses alone, from their first token on.
        lengths_B: tokens of each that were sampled; what follows them is not looked at.
        stop: the stop tokens, [S].
        after: index in the response, 0 for its first token; lm-human-preferences has 16.
    """
    tokens_BN, lengths_B = jnp.asarray(tokens_BN), jnp.asarray(lengths_B).astype(jnp.int32)
    place_N = jnp.arange(tokens_BN.shape[-1], dtype=jnp.int32)
    stops_BN = jnp.any(tokens_BN[..., None] == jnp.asarray(stop, tokens_BN.dtype), axis=-1)
    stops_BN &= (place_N >= after) & (place_N < lengths_B[..., None])
    ended_B = jnp.any(stops_BN, axis=-1)
    first_B = jnp.min(jnp.where(stops_BN, place_N, tokens_BN.shape[-1]), axis=-1)
    kept_B = jnp.minimum(first_B + 1, lengths_B)
    return Truncated((place_N < kept_B[..., None]).astype(jnp.float32), kept_B, ended_B)


def missing_eos(scores_B: jax.Array, ended_B: jax.Array, how: MissingEos = "replace", value: float = -1.0) -> jax.Array:
    """Scores in which episodes that never ended are dealt with; float32 [B]. To be done before the KL penalty is added.

    "replace" puts `value` in the score's place (lm-human-preferences: -1), "subtract" takes `value` off (TRL's
    missing_eos_penalty), "scale" multiplies by `value`, "keep" leaves every score as it is.
    """
    scores_B = jnp.asarray(scores_B).astype(jnp.float32)
    match how:
        case "replace":
            changed_B = jnp.full_like(scores_B, value)
        case "subtract":
            changed_B = scores_B - value
        case "scale":
            changed_B = scores_B * value
        case "keep":
            changed_B = scores_B
        case _:
            raise ValueError(f"missing_eos: how is {how!r}; it must be 'replace', 'subtract', 'scale' or 'keep'")
    return jnp.where(jnp.asarray(ended_B).astype(bool), scores_B, changed_B)


def overlong_penalty(lengths_B: jax.Array, limit: int, buffer: int) -> jax.Array:
    """DAPO's soft punishment of long responses (arXiv 2503.14476, eq. 13), to be added to the score; float32 [B].

    0 up to `limit - buffer` tokens, then linearly down to -1 at `limit` tokens, -1 beyond.

    Args:
        lengths_B: tokens of each response.
        limit: tokens at which the punishment is full.
        buffer: tokens over which it grows, positive.
    """
    room_B = float(limit - buffer) - jnp.asarray(lengths_B).astype(jnp.float32)
    return jnp.clip(room_B / buffer, -1.0, 0.0)


def _last(mask_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of every position, int32 [T], and of each row's last real token, int32 [B], -1 where there is none."""
    real_BT = jnp.asarray(mask_BT).astype(bool)
    place_T = jnp.arange(real_BT.shape[-1], dtype=jnp.int32)
    return place_T, jnp.max(jnp.where(real_BT, place_T, -1), axis=-1)


def _score_place(mask_BT: jax.Array, place: Place) -> jax.Array:
    """Whether a row's score stands here, bool [B, T]; nowhere in a row without a real token."""
    place_T, last_B = _last(mask_BT)
    match place:
        case "last":
            at_B = last_B
        case "after":
            at_B = jnp.where(last_B < 0, -1, jnp.minimum(last_B + 1, len(place_T) - 1))
        case _:
            raise ValueError(f"token_rewards: place is {place!r}; it must be 'last' or 'after'")
    return place_T == at_B[..., None]


def value_mask(mask_BT: jax.Array, place: Place = "last") -> jax.Array:
    """The positions that have a reward and a value; float32 [B, T]: the mask of `gae`, value loss and reward whitening.

    "last": those of `mask_BT`. "after": and the one behind each row's last real token, where there is room for it (TRL,
    whose policy loss and advantage whitening stay with `mask_BT`).
    """
    return (jnp.asarray(mask_BT).astype(bool) | _score_place(mask_BT, place)).astype(jnp.float32)


def token_rewards(
    scores_B: jax.Array,
    logp_BT: jax.Array,
    ref_logp_BT: jax.Array,
    mask_BT: jax.Array,
    kl_coef: float | jax.Array,
    *,
    place: Place = "last",
    estimator: KlKind = "k1",
) -> jax.Array:
    """Rewards of each token: -kl_coef times the estimated KL, and once the score; float32 [B, T].

    The score stands on the last real token or, with place="after", on the position behind it where there is one: then
    `value_mask` says which positions have a reward. Both log-probabilities are taken at the sampling temperature.
    Scores may be of any dtype; the result is float32. The score of an episode without a real token is lost. No gradient
    flows into any input.
    """
    kl_BT = kl_estimate(unmasked(logp_BT, mask_BT), unmasked(ref_logp_BT, mask_BT), estimator)
    scores_B = jnp.asarray(scores_B).astype(jnp.float32)
    score_BT = jnp.where(_score_place(mask_BT, place), scores_B[..., None], 0.0)
    return jax.lax.stop_gradient(score_BT - kl_coef * kl_BT)
