"""Losses of a reward model on the scores of K responses to one prompt, ranked by people.

Arguments of all: `scores_BK`, the reward of each response; `ranks_BK`, integers, smaller is better, equal ranks are
ties; `valid_BK`, bool or 0/1, false where a prompt has fewer than K responses, whose score may be anything. A prompt in
which no response is better than another weighs 0. Only differences of scores count.

Metrics of all: "loss"; "accuracy", the share of all pairs of different rank that are in the right order, equal scores
counting half; "margin", the mean of winner - loser over those pairs.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from jaxgpt.losses.ratio import Metrics, Ratio

Ties = Literal["drop", "half"]
"""Pairs of equal rank: no pair, or half a win for each."""
Weighting = Literal["prompt", "pair"]
"""What weighs 1 in a mean: a prompt (InstructGPT), or a pair, so that longer rankings weigh more."""

ABSENT = -1e30
"""The score of a response that is not in a softmax: finite, so that gradients are."""


def _clean(scores_BK: jax.Array, ranks_BK: jax.Array, valid_BK: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores float32 with 0 for missing responses; ranks; validity as bool."""
    valid_BK = jnp.asarray(valid_BK).astype(bool)
    scores_BK = jnp.where(valid_BK, jnp.asarray(scores_BK).astype(jnp.float32), 0.0)
    return scores_BK, jnp.asarray(ranks_BK), valid_BK


def _both(x_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The array along the rows and along the columns of a [B, K, K] one."""
    return x_BK[..., :, None], x_BK[..., None, :]


def _better(ranks_BK: jax.Array, valid_BK: jax.Array) -> jax.Array:
    """Whether response i is better than j and both are there, bool [B, K, K]."""
    (rank_i, rank_j), (valid_i, valid_j) = _both(ranks_BK), _both(valid_BK)
    return (rank_i < rank_j) & valid_i & valid_j


def _some(better_BKK: jax.Array) -> jax.Array:
    """1 for a prompt with a pair of different rank, float32 [B]."""
    return jnp.any(better_BKK, axis=(-2, -1)).astype(jnp.float32)


def _metrics(loss: Ratio, scores_BK: jax.Array, better_BKK: jax.Array) -> Metrics:
    score_i, score_j = _both(scores_BK)
    margin_BKK, pair_BKK = score_i - score_j, better_BKK.astype(jnp.float32)
    right_BKK = 0.5 * (1.0 + jnp.sign(margin_BKK))
    return {"loss": loss, "accuracy": Ratio.of(right_BKK, pair_BKK), "margin": Ratio.of(margin_BKK, pair_BKK)}


def ranking(
    scores_BK: jax.Array,
    ranks_BK: jax.Array,
    valid_BK: jax.Array,
    *,
    margin_B: jax.Array | None = None,
    label_smoothing: float = 0.0,
    ties: Ties = "drop",
    weighting: Weighting = "prompt",
) -> tuple[Ratio, Metrics]:
    """Bradley-Terry over all pairs of each ranking (InstructGPT, arXiv 2203.02155, eq. 1), nats.

    The loss of a pair is -log sigmoid(winner - loser - margin). With smoothing e it is 1 - e of that and e of the loss
    of the opposite label, -log sigmoid(loser - winner - margin). A tie, where ties="half", is half a win for each,
    without margin: a pair that weighs as much as any other.

    Args:
        scores_BK: reward of each response.
        ranks_BK: integers, smaller is better, equal ranks are ties.
        valid_BK: bool or 0/1, false where there is no response.
        margin_B: by how much the winners of each prompt's pairs have to win (Llama 2, arXiv 2307.09288, eq. 2).
        label_smoothing: e, the chance that a label is wrong, 0 to 0.5.
        ties: "drop" or "half".
        weighting: "prompt", the mean over prompts of each one's mean over its pairs; "pair", the mean over all pairs.

    Returns:
        The loss; metrics "loss", "accuracy" and "margin", as at the head of this file. A prompt without a pair weighs
        0. Raises ValueError for other `ties` or `weighting`.
    """
    if ties not in ("drop", "half"):
        raise ValueError(f"ranking: ties is {ties!r}; it must be 'drop' or 'half'")
    if weighting not in ("prompt", "pair"):
        raise ValueError(f"ranking: weighting is {weighting!r}; it must be 'prompt' or 'pair'")
    scores_BK, ranks_BK, valid_BK = _clean(scores_BK, ranks_BK, valid_BK)
    better_BKK = _better(ranks_BK, valid_BK)
    worse_BKK = jnp.swapaxes(better_BKK, -2, -1)
    # The weight of "i wins over j"; those of both orders of a pair sum to 1.
    wins_BKK = jnp.where(better_BKK, 1.0 - label_smoothing, jnp.where(worse_BKK, label_smoothing, 0.0))
    score_i, score_j = _both(scores_BK)
    margin_BKK = score_i - score_j
    if margin_B is not None:
        needed_B11 = jnp.asarray(margin_B).astype(jnp.float32)[..., None, None]
        margin_BKK -= jnp.where(better_BKK | worse_BKK, needed_B11, 0.0)
    if ties == "half":
        valid_i, valid_j = _both(valid_BK)
        other_KK = ~jnp.eye(scores_BK.shape[-1], dtype=bool)
        wins_BKK += 0.5 * (valid_i & valid_j & other_KK & ~better_BKK & ~worse_BKK).astype(jnp.float32)
    nll_BKK = -jax.nn.log_sigmoid(margin_BKK)
    if weighting == "pair":
        loss = Ratio.of(nll_BKK, wins_BKK)
    else:
        pairs_B = jnp.sum(wins_BKK, axis=(-2, -1))
        sum_B = jnp.sum(nll_BKK * wins_BKK, axis=(-2, -1))
        loss = Ratio.of(sum_B / jnp.where(pairs_B > 0.0, pairs_B, 1.0), (pairs_B > 0.0).astype(jnp.float32))
    return loss, _metrics(loss, scores_BK, better_BKK)


def best_of_k(scores_BK: jax.Array, ranks_BK: jax.Array, valid_BK: jax.Array) -> tuple[Ratio, Metrics]:
    """Cross-entropy of the best response under softmax(scores) (lm-human-preferences; arXiv 1909.08593, eq. 1).

    The mean over prompts, nats; arguments and metrics as of `ranking`. Responses that share the best rank share the
    target equally; the order of the others does not count. For K = 2 it is `ranking`.
    """
    scores_BK, ranks_BK, valid_BK = _clean(scores_BK, ranks_BK, valid_BK)
    better_BKK = _better(ranks_BK, valid_BK)
    best_BK = (valid_BK & ~jnp.any(better_BKK, axis=-2)).astype(jnp.float32)
    target_BK = best_BK / jnp.maximum(jnp.sum(best_BK, axis=-1, keepdims=True), 1.0)
    norm_B = jax.nn.logsumexp(jnp.where(valid_BK, scores_BK, ABSENT), axis=-1)
    loss = Ratio.of(norm_B - jnp.sum(target_BK * scores_BK, axis=-1), _some(better_BKK))
    return loss, _metrics(loss, scores_BK, better_BKK)


def plackett_luce(scores_BK: jax.Array, ranks_BK: jax.Array, valid_BK: jax.Array) -> tuple[Ratio, Metrics]:
    """Negative log-likelihood of the whole order, drawn best first from softmax(scores) (Plackett-Luce); nats a prompt.

    The mean over prompts, each a sum over its ranks; arguments and metrics as of `ranking`. Each response that beats
    another adds log sum_j exp(score_j) - score over all j no better than it. Tied ones each do so over the same set,
    themselves included (Breslow's rule for ties); those that share the last place add nothing, as they beat nobody.
    For K = 2 it is `ranking`, and where one response beats all others, which are tied, `best_of_k`.
    """
    scores_BK, ranks_BK, valid_BK = _clean(scores_BK, ranks_BK, valid_BK)
    better_BKK = _better(ranks_BK, valid_BK)
    rank_i, rank_j = _both(ranks_BK)
    left_BKK = (rank_j >= rank_i) & valid_BK[..., None, :]
    norm_BK = jax.nn.logsumexp(jnp.where(left_BKK, scores_BK[..., None, :], ABSENT), axis=-1)
    beats_BK = jnp.any(better_BKK, axis=-1)
    sum_B = jnp.sum(jnp.where(beats_BK, norm_BK - scores_BK, 0.0), axis=-1)
    loss = Ratio.of(sum_B, _some(better_BKK))
    return loss, _metrics(loss, scores_BK, better_BKK)


def centring(scores_BK: jax.Array, valid_BK: jax.Array) -> Ratio:
    """The mean over prompts of each one's mean of (r_i + r_j)^2 over its pairs, ties too (arXiv 2312.09244).

    Added to a ranking loss with a small coefficient it draws the scores to a mean of 0, which the ranking leaves free.
    For pairs it is the paper's term and TRL's center_rewards. A prompt with fewer than two responses weighs 0.
    """
    valid_BK = jnp.asarray(valid_BK).astype(bool)
    scores_BK = jnp.where(valid_BK, jnp.asarray(scores_BK).astype(jnp.float32), 0.0)
    (score_i, score_j), (valid_i, valid_j) = _both(scores_BK), _both(valid_BK)
    pair_BKK = (valid_i & valid_j & ~jnp.eye(scores_BK.shape[-1], dtype=bool)).astype(jnp.float32)
    pairs_B = jnp.sum(pair_BKK, axis=(-2, -1))
    sum_B = jnp.sum(jnp.square(score_i + score_j) * pair_BKK, axis=(-2, -1))
    return Ratio.of(sum_B / jnp.maximum(pairs_B, 1.0), (pairs_B > 0.0).astype(jnp.float32))
