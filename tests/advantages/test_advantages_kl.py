import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rollout_twins import CLOSE, B, T, draw, draw_mask, junk

from jaxgpt.advantages import adaptive_kl, episode_kl, kl_estimate


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


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("how", ["sum", "token-mean"])
def test_episode_kl_sums_or_averages_over_tokens_and_ignores_the_rest(kind, how):
    logp, ref, mask = draw(0, B, T), draw(1, B, T), draw_mask(2)
    formula = {"k1": lambda c: -c, "k2": lambda c: 0.5 * c**2, "k3": lambda c: np.exp(c) - 1.0 - c}[kind]
    want = []
    for b in range(B):
        terms = [formula(float(ref[b, t]) - float(logp[b, t])) for t in range(T) if mask[b, t]]
        want.append(sum(terms) / (max(len(terms), 1) if how == "token-mean" else 1))
    np.testing.assert_allclose(episode_kl(logp, ref, mask, kind, how), want, **CLOSE)
    dirty = episode_kl(junk(mask, logp, np.nan), junk(mask, ref, -np.inf), mask, kind, how)
    np.testing.assert_array_equal(dirty, episode_kl(logp, ref, mask, kind, how))


def test_episode_kl_is_the_sum_of_k1_by_default():
    ones = jnp.ones((1, 4))
    assert episode_kl(0.5 * ones, 0.25 * ones, ones).tolist() == [1.0]
    with pytest.raises(ValueError, match=r"'mean'.*'sum' or 'token-mean'"):
        episode_kl(ones, ones, ones, how="mean")


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.001), (60.0, 1.002), (0.0, 0.998), (5.4, 0.999)])
def test_adaptive_kl(kl, factor):
    got = jax.jit(adaptive_kl, static_argnums=(2, 3))(jnp.float32(0.15), jnp.float32(kl), 6.0, 10_000.0, 100)
    np.testing.assert_allclose(got, 0.15 * factor, rtol=1e-6)
    assert got.dtype == jnp.float32


def test_adaptive_kl_at_its_target_changes_nothing_and_counts_episodes():
    assert adaptive_kl(jnp.float32(0.1), 6.0, 6.0, 1e4, 512) == jnp.float32(0.1)
    np.testing.assert_allclose(adaptive_kl(0.1, 12.0, 6.0, 1e4, 512), 0.1 * (1.0 + 0.2 * 512 / 1e4), rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_adaptive_kl_over_rollouts_is_the_loop_of_ziegler_et_al(seed):
    coef, want = jnp.float32(0.15), 0.15
    for kl in np.random.default_rng(seed).uniform(0.0, 15.0, 20):
        coef = adaptive_kl(coef, jnp.float32(kl), 6.0, 10_000.0, 256)
        want *= 1.0 + min(max(kl / 6.0 - 1.0, -0.2), 0.2) * 256 / 10_000.0
    np.testing.assert_allclose(coef, want, rtol=1e-6)
