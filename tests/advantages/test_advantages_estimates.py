import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_twins import CLOSE, B, T, draw, draw_mask, junk

from jaxgpt.advantages import episode_kl, gae, group_relative, leave_one_out, token_rewards, whiten


# --- GAE ------------------------------------------------------------------------------------------------------------
def gae_by_hand(rewards, values, mask, gamma, lam):
    """Each episode alone, its masked positions cut out, A as the explicit double sum of discounted deltas."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        real = np.flatnonzero(mask[b])
        r, v = rewards[b, real].astype(np.float64), np.append(values[b, real].astype(np.float64), 0.0)
        delta = r + gamma * v[1:] - v[:-1]
        for i, t in enumerate(real):
            advantages[b, t] = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(real)))
    return advantages, np.where(mask > 0, advantages + values, 0.0)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)])
def test_gae(gamma, lam):
    rewards, values, mask = draw(0, B, T), draw(1, B, T), draw_mask(2)
    got = jax.jit(gae)(rewards, values, mask, gamma, lam)
    for array, want in zip(got, gae_by_hand(rewards, values, mask, gamma, lam), strict=True):
        np.testing.assert_allclose(array, want, **CLOSE)


def test_gae_with_lambda_one_is_future_reward_less_value_and_with_zero_is_delta():
    rewards, values, mask = draw(0, B, T), draw(1, B, T), np.ones((B, T), np.float32)
    ahead = np.cumsum(rewards[:, ::-1].astype(np.float64), axis=1)[:, ::-1]
    advantages, returns = gae(rewards, values, mask, 1.0, 1.0)
    np.testing.assert_allclose(advantages, ahead - values, **CLOSE)
    np.testing.assert_allclose(returns, ahead, **CLOSE)
    after = np.concatenate([values[:, 1:], np.zeros((B, 1))], axis=1)
    np.testing.assert_allclose(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * after - values, **CLOSE)


def test_true_values_of_a_deterministic_episode_give_zero_advantage():
    """Rewards 1, 2, 3: the value before each token is the sum of what is still to come."""
    advantages, returns = gae(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[6.0, 5.0, 3.0]]), jnp.ones((1, 3)), 1.0, 0.95)
    np.testing.assert_allclose(advantages, 0.0, atol=1e-6)
    np.testing.assert_allclose(returns, [[6.0, 5.0, 3.0]], rtol=1e-6)


@pytest.mark.parametrize("room", [0, 1])
def test_nothing_follows_the_last_token_of_a_truncated_episode(room):
    """Two tokens of reward 1, valued 5 and 3: V after them is 0, where the row ends, and where it goes on with a 9."""
    one, mask, values = jnp.ones((1, 3)), jnp.array([[1.0, 1.0, 0.0]]), jnp.array([[5.0, 3.0, 9.0]])
    advantages, returns = gae(*(x[:, : 2 + room] for x in (one, values, mask)), 1.0, 0.5)
    assert advantages.tolist() == [[-1.0 + 0.5 * -2.0, -2.0, 0.0][: 2 + room]]
    assert returns.tolist() == [[3.0, 1.0, 0.0][: 2 + room]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -1e30, 7.0])
def test_masked_positions_do_not_enter_gae(value):
    rewards, values = draw(0, B, T), draw(1, B, T)
    for mask in (draw_mask(2), (draw(3, B, T) > 0).astype(np.float32)):
        want = gae(rewards, values, mask, 0.99, 0.95)
        got = gae(junk(mask, rewards, value), junk(mask, values, value), mask, 0.99, 0.95)
        for a, b, hand in zip(got, want, gae_by_hand(rewards, values, mask, 0.99, 0.95), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(a, hand, **CLOSE)


def test_no_gradient_flows_through_rewards_advantages_and_returns():
    logp, values, mask = draw(0, B, T), draw(1, B, T), draw_mask(2)

    def total(logp, values):
        rewards = token_rewards(draw(3, B), logp, draw(4, B, T), mask, 0.1)
        advantages, returns = gae(rewards, values, mask, 1.0, 0.95)
        return jnp.sum(whiten(advantages, mask)) + jnp.sum(returns) + jnp.sum(episode_kl(logp, values, mask))

    assert all(np.all(np.asarray(g) == 0.0) for g in jax.grad(total, argnums=(0, 1))(jnp.asarray(logp), values))


def test_episodes_may_lie_in_any_leading_dimensions():
    rewards, values, mask = draw(0, B, T), draw(1, B, T), draw_mask(2)
    folded = gae(*(x.reshape(2, B // 2, T) for x in (rewards, values, mask)), 0.99, 0.95)
    for a, b in zip(folded, gae(rewards, values, mask, 0.99, 0.95), strict=True):
        np.testing.assert_array_equal(a.reshape(B, T), b)


# --- whitening ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize(("variance", "less"), [("biased", 0), ("unbiased", 1)])
def test_whiten_is_a_loop_over_the_masked_tokens(shift_mean, variance, less):
    x, mask = draw(0, B, T, scale=3.0) + np.float32(2.0), draw_mask(1)
    real = [float(x[b, t]) for b, t in np.argwhere(mask > 0)]
    mean = sum(real) / len(real)
    spread = sum((r - mean) ** 2 for r in real) / (len(real) - less)
    want = (x - mean) / np.sqrt(spread + 1e-8) + (0.0 if shift_mean else mean)
    got = np.asarray(jax.jit(whiten, static_argnums=(2, 3))(junk(mask, x, np.nan), mask, shift_mean, variance))
    np.testing.assert_allclose(got, np.where(mask > 0, want, 0.0), **CLOSE)
    np.testing.assert_allclose(got[mask > 0].mean(), 0.0 if shift_mean else mean, **CLOSE)


def test_the_variance_is_the_biased_one_by_default():
    x, mask = draw(0, B, T, scale=3.0) + np.float32(2.0), draw_mask(1)
    np.testing.assert_allclose(np.asarray(whiten(x, mask))[mask > 0].astype(np.float64).std(), 1.0, rtol=1e-6)
    with pytest.raises(ValueError, match=r"'population'.*'biased' or 'unbiased'"):
        whiten(x, mask, variance="population")


def test_whitened_rewards_keep_their_mean():
    rewards, mask = draw(0, B, T) - np.float32(0.4), draw_mask(1)
    before, after = (np.asarray(x)[mask > 0].mean() for x in (rewards, whiten(rewards, mask, shift_mean=False)))
    np.testing.assert_allclose(after, before, rtol=1e-6)
    assert abs(before) > 0.1


def test_whiten_of_equal_or_missing_numbers_is_finite():
    ones = jnp.ones((2, 3))
    np.testing.assert_allclose(whiten(3.0 * ones, ones), 0.0, atol=1e-6)
    np.testing.assert_allclose(whiten(3.0 * ones, ones, False), 3.0, rtol=1e-6)
    for variance in ("biased", "unbiased"):
        np.testing.assert_array_equal(whiten(3.0 * ones, 0.0 * ones, variance=variance), 0.0)
        np.testing.assert_array_equal(whiten(jnp.array([[3.0]]), jnp.ones((1, 1)), variance=variance), 0.0)


def test_the_floor_stands_inside_the_root():
    x = jnp.array([[1e-4, -1e-4]])
    np.testing.assert_allclose(whiten(x, jnp.ones((1, 2))), x / np.sqrt(2e-8), rtol=1e-6)


# --- groups ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("std", "less"), [("unbiased", 1), ("biased", 0), ("none", None)])
@pytest.mark.parametrize("eps", [1e-4, 1e-6])
def test_group_relative_is_a_loop_over_groups(std, less, eps):
    scores, want = draw(0, B, 6, scale=2.0), np.zeros((B, 6))
    for p in range(B):
        group = [float(score) for score in scores[p]]
        mean = sum(group) / 6
        spread = 1.0 if less is None else (sum((r - mean) ** 2 for r in group) / (6 - less)) ** 0.5 + eps
        want[p] = [(r - mean) / spread for r in group]
    np.testing.assert_allclose(jax.jit(group_relative, static_argnums=1)(scores, std, eps), want, **CLOSE)


def test_group_relative_divides_by_the_unbiased_deviation_and_a_little_by_default():
    np.testing.assert_allclose(group_relative(jnp.array([[0.0, 0.02]]))[0, 1], 0.01 / (0.02 / 2**0.5 + 1e-4), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'batch'.*'unbiased', 'biased' or 'none'"):
        group_relative(jnp.ones((1, 2)), "batch")


@pytest.mark.parametrize("score", [0.0, 0.1, -1 / 3, 1e8])
def test_a_group_without_spread_has_no_advantage(score):
    scores = jnp.full((2, 7), score).at[1, 0].add(1.0 + abs(score))
    for got in (*(group_relative(scores, std, 0.0) for std in ("unbiased", "biased", "none")), leave_one_out(scores)):
        np.testing.assert_array_equal(got[0], 0.0)
        assert np.all(np.isfinite(got)) and np.all(np.asarray(got[1]) != 0.0)
    np.testing.assert_array_equal(group_relative(jnp.ones((3, 1))), 0.0)


def test_leave_one_out_is_a_loop_over_the_others_and_sums_to_zero():
    scores, want = draw(0, B, 6, scale=2.0), np.zeros((B, 6))
    for p, i in np.ndindex(B, 6):
        want[p, i] = float(scores[p, i]) - sum(float(scores[p, j]) for j in range(6) if j != i) / 5
    got = jax.jit(leave_one_out)(scores)
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_allclose(jnp.sum(got, axis=-1), 0.0, atol=3e-6)
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(jnp.ones((3, 1)))


@pytest.mark.parametrize("estimate", [group_relative, leave_one_out])
def test_no_gradient_flows_through_a_group(estimate):
    scores = draw(0, B, 6)
    slope = jax.grad(lambda s: jnp.sum(estimate(s) * draw(1, B, 6)))(scores)
    assert np.all(np.asarray(slope) == 0.0)
