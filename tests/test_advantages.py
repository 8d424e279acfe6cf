import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from jaxgpt.advantages import adaptive_kl, episode_kl, gae, kl_estimate, missing_eos, token_rewards, whiten

B, T = 8, 9
CLOSE = {"rtol": 1e-6, "atol": 2e-6}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def draw_mask(seed: int) -> np.ndarray:
    """Two prompt positions, then responses of 1 to T - 2 tokens; the last row has none."""
    lengths = np.random.default_rng(seed).integers(1, T - 1, (B, 1))
    place = np.arange(T) - 2
    mask = ((place >= 0) & (place < lengths)).astype(np.float32)
    mask[-1] = 0.0
    return mask


def junk(mask: np.ndarray, x: np.ndarray, value: float) -> np.ndarray:
    return np.where(mask > 0, x, np.float32(value))


# --- KL -------------------------------------------------------------------------------------------------------------
def test_kl_estimators_of_formula_11():
    logp, ref = jnp.array([-1.0, -0.5]), jnp.array([-1.5, -0.1])
    log_r = np.array([-0.5, 0.4])
    np.testing.assert_allclose(kl_estimate(logp, ref, "k1"), -log_r, **CLOSE)
    np.testing.assert_allclose(kl_estimate(logp, ref, "k2"), 0.5 * log_r**2, **CLOSE)
    np.testing.assert_allclose(kl_estimate(logp, ref, "k3"), np.exp(log_r) - 1.0 - log_r, **CLOSE)
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(logp, ref, "k4")


@pytest.mark.parametrize("seed", range(3))
def test_k1_and_k3_are_unbiased_and_k2_is_not(seed):
    rng = np.random.default_rng(seed)
    logits, other = rng.normal(size=50), rng.normal(size=50)
    logp, ref = (x - np.log(np.exp(x).sum()) for x in (logits, other))
    p, kl = np.exp(logp), np.sum(np.exp(logp) * (logp - ref))
    tokens = rng.choice(50, size=200_000, p=p)
    of = {}
    for kind in ("k1", "k2", "k3"):
        every = np.asarray(kl_estimate(jnp.asarray(logp, jnp.float32), jnp.asarray(ref, jnp.float32), kind), np.float64)
        of[kind] = np.sum(p * every), every[tokens].mean(), every[tokens].std() / np.sqrt(len(tokens))
    for kind in ("k1", "k3"):
        expected, mean, error = of[kind]
        np.testing.assert_allclose(expected, kl, rtol=1e-6)
        assert abs(mean - kl) < 4.0 * error
    expected, mean, error = of["k2"]
    assert abs(expected - kl) > 0.05 * kl
    assert abs(mean - expected) < 4.0 * error


def test_kl_of_equal_log_probabilities_is_exactly_zero():
    logp, mask = -np.abs(draw(0, B, T)), draw_mask(1)
    for kind in ("k1", "k2", "k3"):
        assert np.all(np.asarray(kl_estimate(jnp.asarray(logp), jnp.asarray(logp), kind)) == 0.0)
    assert np.all(np.asarray(episode_kl(logp, logp, mask)) == 0.0)


def test_episode_kl_sums_over_tokens_and_ignores_the_rest():
    logp, ref, mask = draw(0, B, T), draw(1, B, T), draw_mask(2)
    want = [sum(float(logp[b, t]) - float(ref[b, t]) for t in range(T) if mask[b, t]) for b in range(B)]
    np.testing.assert_allclose(episode_kl(logp, ref, mask), want, **CLOSE)
    dirty = episode_kl(junk(mask, logp, np.nan), junk(mask, ref, -np.inf), mask)
    np.testing.assert_array_equal(dirty, episode_kl(logp, ref, mask))


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.001), (60.0, 1.002), (0.0, 0.998), (5.4, 0.999)])
def test_adaptive_kl(kl, factor):
    got = jax.jit(adaptive_kl, static_argnums=(2, 3))(jnp.float32(0.15), jnp.float32(kl), 6.0, 10_000.0, 100)
    np.testing.assert_allclose(got, 0.15 * factor, rtol=1e-6)
    assert got.dtype == jnp.float32


def test_adaptive_kl_at_its_target_changes_nothing_and_counts_episodes():
    assert adaptive_kl(jnp.float32(0.1), 6.0, 6.0, 1e4, 512) == jnp.float32(0.1)
    np.testing.assert_allclose(adaptive_kl(0.1, 12.0, 6.0, 1e4, 512), 0.1 * (1.0 + 0.2 * 512 / 1e4), rtol=1e-6)


# --- rewards --------------------------------------------------------------------------------------------------------
def test_token_rewards():
    scores, logp, ref, mask = draw(0, B), draw(1, B, T), draw(2, B, T), draw_mask(3)
    got = jax.jit(token_rewards)(scores, logp, ref, mask, jnp.float32(0.05))
    want = np.zeros((B, T))
    for b in range(B):
        real = np.flatnonzero(mask[b])
        for t in real:
            want[b, t] = -0.05 * (float(logp[b, t]) - float(ref[b, t])) + (t == real[-1]) * float(scores[b])
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_array_equal(np.asarray(got)[mask == 0], 0.0)


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


def test_a_response_without_an_end_scores_the_given_value():
    scores, ended = jnp.array([0.5, 3.0, -2.0]), jnp.array([True, False, False])
    assert missing_eos(scores, ended).tolist() == [0.5, -1.0, -1.0]
    assert missing_eos(scores, ended, "keep").tolist() == [0.5, 3.0, -2.0]
    assert missing_eos(jnp.array([2, 3, 4]), ended, "replace", -1.5).tolist() == [2.0, -1.5, -1.5]


def test_missing_end_is_replaced_before_the_penalty():
    ones = jnp.ones((1, 2))
    score = missing_eos(jnp.array([9.0]), jnp.array([False]))
    np.testing.assert_allclose(token_rewards(score, ones, 0.0 * ones, ones, 0.5), [[-0.5, -1.5]], rtol=1e-6)


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
    np.testing.assert_allclose(advantages, ahead - values, rtol=1e-6, atol=3e-6)
    np.testing.assert_allclose(returns, ahead, rtol=1e-6, atol=3e-6)
    after = np.concatenate([values[:, 1:], np.zeros((B, 1))], axis=1)
    np.testing.assert_allclose(gae(rewards, values, mask, 0.9, 0.0)[0], rewards + 0.9 * after - values, **CLOSE)


def test_true_values_of_a_deterministic_episode_give_zero_advantage():
    """Rewards 1, 2, 3: the value before each token is the sum of what is still to come."""
    advantages, returns = gae(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[6.0, 5.0, 3.0]]), jnp.ones((1, 3)), 1.0, 0.95)
    np.testing.assert_allclose(advantages, 0.0, atol=1e-6)
    np.testing.assert_allclose(returns, [[6.0, 5.0, 3.0]], rtol=1e-6)


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


# --- whitening ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_uses_the_biased_variance_of_the_masked_tokens(shift_mean):
    x, mask = draw(0, B, T, scale=3.0) + np.float32(2.0), draw_mask(1)
    real = x[mask > 0].astype(np.float64)
    want = (x - real.mean()) / np.sqrt(np.mean((real - real.mean()) ** 2) + 1e-8) + (0.0 if shift_mean else real.mean())
    got = np.asarray(jax.jit(whiten, static_argnums=2)(junk(mask, x, np.nan), mask, shift_mean))
    np.testing.assert_allclose(got, np.where(mask > 0, want, 0.0), **CLOSE)
    np.testing.assert_allclose(got[mask > 0].astype(np.float64).std(), 1.0, rtol=1e-6)
    np.testing.assert_allclose(got[mask > 0].mean(), 0.0 if shift_mean else real.mean(), **CLOSE)


def test_whiten_of_equal_or_missing_numbers_is_finite():
    ones = jnp.ones((2, 3))
    np.testing.assert_allclose(whiten(3.0 * ones, ones), 0.0, atol=1e-6)
    np.testing.assert_allclose(whiten(3.0 * ones, ones, False), 3.0, rtol=1e-6)
    np.testing.assert_array_equal(whiten(3.0 * ones, 0.0 * ones), 0.0)


def test_the_floor_stands_inside_the_root():
    x = jnp.array([[1e-4, -1e-4]])
    np.testing.assert_allclose(whiten(x, jnp.ones((1, 2))), x / np.sqrt(2e-8), rtol=1e-6)


# --- devices --------------------------------------------------------------------------------------------------------
def rollout(scores, ended, logp, ref, values, mask):
    scores = missing_eos(scores, ended)
    rewards = whiten(token_rewards(scores, logp, ref, mask, 0.05), mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, 0.99, 0.95)
    kl = jnp.mean(episode_kl(logp, ref, mask))
    return whiten(advantages, mask), returns, adaptive_kl(0.1, kl, 6.0, 1e4, B)


def test_sharded_equals_one_device(mesh222):
    ended = np.arange(B) % 2 == 0
    arrays = (draw(0, B), ended, draw(1, B, T), draw(2, B, T), draw(3, B, T), draw_mask(4))
    want = jax.jit(rollout)(*arrays)
    rows = ("data", "fsdp")
    with jax.set_mesh(mesh222):
        put = [jax.device_put(a, P(rows, *[None] * (a.ndim - 1))) for a in arrays]
        got = jax.jit(rollout)(*put)
        assert got[0].sharding.spec == got[1].sharding.spec == P(rows, None)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
