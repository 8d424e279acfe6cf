import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_twins import CLOSE, B, T, draw, draw_mask, junk

from jaxgpt.advantages import (
    gae,
    missing_eos,
    overlong_penalty,
    token_rewards,
    truncate_at_stop,
    value_mask,
    whiten,
)


def rewards_by_hand(scores, logp, ref, mask, coef, place, estimator):
    """Rewards, and which positions have one, token by token."""
    rewards, has = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        real = [t for t in range(T) if mask[b, t]]
        for t in real:
            log_r = float(ref[b, t]) - float(logp[b, t])
            kl = {"k1": -log_r, "k2": 0.5 * log_r**2, "k3": np.exp(log_r) - 1.0 - log_r}[estimator]
            rewards[b, t], has[b, t] = -coef * kl, 1.0
        if real:
            at = real[-1] + (place == "after" and real[-1] + 1 < T)
            rewards[b, at], has[b, at] = rewards[b, at] + float(scores[b]), 1.0
    return rewards, has


def long_mask() -> np.ndarray:
    """Responses of every length; the first three leave no room behind them."""
    mask = draw_mask(3)
    mask[:3, 2:] = 1.0
    return mask


@pytest.mark.parametrize("place", ["last", "after"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_token_rewards_are_a_loop_over_tokens(place, estimator):
    scores, logp, ref, mask = draw(0, B), draw(1, B, T), draw(2, B, T), long_mask()
    want, has = rewards_by_hand(scores, logp, ref, mask, 0.05, place, estimator)
    run = jax.jit(lambda *a: token_rewards(*a, place=place, estimator=estimator))
    np.testing.assert_allclose(run(scores, logp, ref, mask, jnp.float32(0.05)), want, **CLOSE)
    np.testing.assert_array_equal(value_mask(mask, place), has)


def test_by_default_the_score_stands_on_the_last_token_and_the_kl_is_k1():
    ones, mask = jnp.ones((1, 4)), jnp.array([[0.0, 1.0, 1.0, 0.0]])
    got = token_rewards(jnp.array([7.0]), ones, 0.5 * ones, mask, 0.5)
    assert got.tolist() == [[0.0, -0.25, 6.75, 0.0]]
    assert value_mask(mask).tolist() == mask.tolist()


def test_a_score_behind_the_last_token_has_a_place_of_its_own_where_there_is_room():
    mask = jnp.array([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    got = token_rewards(jnp.array([7.0, 8.0, 9.0]), mask, mask, mask, 0.5, place="after")
    assert got.tolist() == [[0.0, 0.0, 7.0, 0.0], [0.0, 0.0, 0.0, 8.0], [0.0] * 4]
    assert value_mask(mask, "after").tolist() == [[1.0, 1.0, 1.0, 0.0], [1.0] * 4, [0.0] * 4]
    with pytest.raises(ValueError, match=r"'first'.*'last' or 'after'"):
        value_mask(mask, "first")


def test_the_score_stands_on_the_last_real_token_alone():
    mask = draw_mask(3)
    zero = np.zeros((B, T), np.float32)
    got = np.asarray(token_rewards(np.full(B, 0.73, np.float32), zero, zero, mask, 0.05))
    for b in range(B - 1):
        assert np.flatnonzero(got[b]).tolist() == [np.flatnonzero(mask[b])[-1]]
        assert got[b].sum() == np.float32(0.73)
    assert not got[-1].any()


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bfloat16, jnp.float32])
def test_rewards_are_float_whatever_the_scores_are(dtype):
    ones = jnp.ones((2, 3))
    got = token_rewards(jnp.array([2, -1]).astype(dtype), -0.5 * ones, -0.25 * ones, ones, 0.1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [[0.025, 0.025, 2.025], [0.025, 0.025, -0.975]], rtol=1e-6)


def test_garbage_after_the_end_changes_no_reward():
    scores, logp, ref, mask = draw(0, B), draw(1, B, T), draw(2, B, T), draw_mask(3)
    want = token_rewards(scores, logp, ref, mask, 0.05)
    for value in (np.nan, np.inf, 1e30):
        got = token_rewards(scores, junk(mask, logp, value), junk(mask, ref, -value), mask, 0.05)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("how", "value", "want"),
    [
        ("replace", -1.0, [0.5, -1.0, -1.0]),
        ("replace", -1.5, [0.5, -1.5, -1.5]),
        ("subtract", 1.0, [0.5, 2.0, -3.0]),
        ("scale", 0.5, [0.5, 1.5, -1.0]),
        ("keep", -1.0, [0.5, 3.0, -2.0]),
    ],
)
def test_the_score_of_a_response_without_an_end(how, value, want):
    scores, ended = jnp.array([0.5, 3.0, -2.0]), jnp.array([True, False, False])
    assert missing_eos(scores, ended, how, value).tolist() == want


def test_by_default_a_missing_end_scores_minus_one_and_scores_stay_float():
    ended = jnp.array([True, False])
    assert missing_eos(jnp.array([2, 3]), ended).tolist() == [2.0, -1.0]
    assert missing_eos(jnp.array([2, 3]), ended, "subtract", 0.25).tolist() == [2.0, 2.75]
    with pytest.raises(ValueError, match=r"'drop'.*'keep'"):
        missing_eos(jnp.array([2, 3]), ended, "drop")


def test_missing_end_is_replaced_before_the_penalty():
    ones = jnp.ones((1, 2))
    score = missing_eos(jnp.array([9.0]), jnp.array([False]))
    np.testing.assert_allclose(token_rewards(score, ones, 0.0 * ones, ones, 0.5), [[-0.5, -1.5]], rtol=1e-6)


# --- the other arrangement of a rollout -------------------------------------------------------------------------------
def trl_by_hand(scores, logp, ref, values, lengths, coef, gamma, lam, white):
    """A rollout as TRL's PPO arranges it: a value and the score one place behind the response, where there is room."""
    N = logp.shape[1]
    advantages, returns, rewards = np.zeros(logp.shape), np.zeros(logp.shape), np.zeros(logp.shape)
    steps = [min(n + 1, N) for n in lengths]
    for b, n in enumerate(lengths):
        rewards[b, :n] = -coef * (logp[b, :n].astype(np.float64) - ref[b, :n])
        rewards[b, steps[b] - 1] += scores[b]
    if white:
        every = np.concatenate([rewards[b, :n] for b, n in enumerate(steps)])
        for b, n in enumerate(steps):
            rewards[b, :n] = (rewards[b, :n] - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8) + every.mean()
    for b, n in enumerate(steps):
        later, value_after = 0.0, 0.0
        for t in reversed(range(n)):
            later = rewards[b, t] + gamma * value_after - values[b, t] + gamma * lam * later
            value_after = float(values[b, t])
            advantages[b, t], returns[b, t] = later, later + value_after
    every = np.concatenate([advantages[b, :n] for b, n in enumerate(lengths)])
    for b, n in enumerate(lengths):
        advantages[b, :n] = (advantages[b, :n] - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
        advantages[b, n:] = 0.0
    return advantages, returns


@pytest.mark.parametrize("white", [False, True])
def test_the_forks_together_are_the_rollout_of_trl(white):
    scores, logp, ref, values = draw(0, B), draw(1, B, T), draw(2, B, T), draw(3, B, T)
    lengths = [1, 3, 5, T - 1, T, T, 4, 2]
    mask = (np.arange(T) < np.array(lengths)[:, None]).astype(np.float32)
    rewards = token_rewards(scores, logp, ref, mask, 0.05, place="after")
    wide = value_mask(mask, "after")
    if white:
        rewards = whiten(rewards, wide, shift_mean=False, variance="unbiased")
    advantages, returns = gae(rewards, values, wide, 0.99, 0.95)
    want = trl_by_hand(scores.astype(np.float64), logp, ref, values, lengths, 0.05, 0.99, 0.95, white)
    np.testing.assert_allclose(whiten(advantages, mask, variance="unbiased"), want[0], **CLOSE)
    np.testing.assert_allclose(returns, want[1], **CLOSE)


# --- lengths --------------------------------------------------------------------------------------------------------
def test_overlong_responses_lose_up_to_one_point():
    lengths = np.arange(0, 30)
    got = overlong_penalty(lengths, 20, 8)
    want = [0.0 if n <= 12 else (12 - n) / 8 if n <= 20 else -1.0 for n in lengths]
    np.testing.assert_allclose(got, want, **CLOSE)


def truncated_by_hand(tokens, lengths, stop, after):
    kept, ended = [], []
    for row, n in zip(tokens, lengths, strict=True):
        found = [t for t in range(after, n) if row[t] in stop]
        kept.append(found[0] + 1 if found else n)
        ended.append(bool(found))
    return kept, ended


@pytest.mark.parametrize("stop", [(3,), (3, 5), ()])
@pytest.mark.parametrize("after", [0, 4, T])
def test_truncation_keeps_the_first_stop_token_at_or_after_a_place_and_nothing_behind(stop, after):
    rng = np.random.default_rng(0)
    tokens, lengths = rng.integers(0, 8, (64, T), dtype=np.int32), rng.integers(0, T + 1, 64, dtype=np.int32)
    got = jax.jit(truncate_at_stop, static_argnums=(2, 3))(tokens, lengths, stop, after)
    kept, ended = truncated_by_hand(tokens, lengths, stop, after)
    assert (got.lengths_B.tolist(), got.ended_B.tolist()) == (kept, ended)
    np.testing.assert_array_equal(got.mask_BN, np.arange(T) < np.array(kept)[:, None])


def test_what_follows_the_stop_changes_no_truncation():
    tokens = np.array([[1, 9, 2, 9, 1, 1], [1, 1, 1, 9, 2, 9]], np.int32)
    want = truncate_at_stop(tokens, np.array([6, 6]), (9,), 2)
    assert (want.lengths_B.tolist(), want.ended_B.tolist()) == ([4, 4], [True, True])
    tokens[:, 4:] = 9
    for a, b in zip(truncate_at_stop(tokens, np.array([6, 6]), (9,), 2), want, strict=True):
        np.testing.assert_array_equal(a, b)
