import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_twins import AGGREGATIONS, CLOSE, NORM, B, T, aggregate_by_hand, draw, draw_mask, slope_by_hand

from jaxgpt.losses import kl_penalty, ppo_policy, ppo_value, ratio_gap

SLOPE = {"rtol": 1e-5, "atol": 1e-6}


def clipped(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


# --- policy ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("high", [None, 0.4])
def test_ppo_policy_is_a_loop_over_tokens(how, high):
    logp, old, advantages, mask = -np.abs(draw(0, B, T)), -np.abs(draw(1, B, T)), draw(2, B, T), draw_mask(3)
    old = logp + np.float32(0.4) * (old - logp)

    def terms(logp, b, t):
        rho, a = np.exp(float(logp[b, t]) - float(old[b, t])), float(advantages[b, t])
        return -a * rho, -a * clipped(rho, 0.8, 1.2 if high is None else 1.4)

    def by_hand(logp):
        return aggregate_by_hand(lambda b, t: max(terms(logp, b, t)), mask, how)

    def loss(logp):
        return ppo_policy(logp, old, advantages, mask, 0.2, clip_high=high, aggregation=how, norm=NORM)

    np.testing.assert_allclose(jax.jit(loss)(logp)[0].mean, by_hand(logp.astype(np.float64)), **CLOSE)
    slope = jax.grad(lambda x: loss(x)[0].mean)(logp)
    np.testing.assert_allclose(slope, slope_by_hand(by_hand, logp), **SLOPE)
    real = [(int(b), int(t)) for b, t in np.argwhere(mask > 0)]
    change = [float(logp[place]) - float(old[place]) for place in real]
    want = {
        "loss/policy_avg": by_hand(logp.astype(np.float64)),
        "policy/clipfrac_avg": np.mean([bound > plain for plain, bound in (terms(logp, *place) for place in real)]),
        "policy/approxkl_avg": np.mean([0.5 * c**2 for c in change]),
        "val/ratio": np.mean(np.exp(change)),
    }
    metrics = loss(logp)[1]
    assert metrics.keys() == want.keys() and 0.05 < want["policy/clipfrac_avg"] < 0.5
    for name, value in want.items():
        np.testing.assert_allclose(metrics[name].reported, value, **CLOSE, err_msg=name)


@pytest.mark.parametrize(
    ("advantage", "ratio", "flows"), [(1, 1.3, 0), (-1, 1.3, 1), (1, 0.7, 1), (-1, 0.7, 0), (1, 1.1, 1), (-1, 0.9, 1)]
)
def test_clipping_stops_only_gains(advantage, ratio, flows):
    one = jnp.ones((1, 1))
    slope = jax.grad(lambda logp: ppo_policy(logp, 0.0 * one, advantage * one, one, 0.2)[0].mean)(jnp.log(ratio) * one)
    np.testing.assert_allclose(slope, -advantage * ratio * flows, rtol=1e-6)


def test_first_minibatch_has_ratio_one_and_the_policy_gradient():
    logp, advantages, mask = -np.abs(draw(0, B, T)), draw(1, B, T), draw_mask(2)
    slope = jax.grad(lambda x: ppo_policy(x, logp, advantages, mask, 0.2)[0].mean)(jnp.asarray(logp))
    _, metrics = ppo_policy(logp, logp, advantages, mask, 0.2)
    assert ratio_gap(logp, logp, mask) == 0.0
    assert abs(float(metrics["val/ratio"].mean) - 1.0) < 1e-5
    assert metrics["policy/clipfrac_avg"].mean == 0.0
    assert metrics["policy/approxkl_avg"].mean == 0.0
    np.testing.assert_allclose(slope, -advantages * mask / mask.sum(), **CLOSE)


@pytest.mark.parametrize(("ratio", "flows"), [(1.25, 1), (1.45, 0)])
def test_the_upper_range_alone_is_raised(ratio, flows):
    one = jnp.ones((1, 1))
    slope = jax.grad(lambda logp: ppo_policy(logp, 0.0 * one, one, one, 0.2, clip_high=0.4)[0].mean)(
        jnp.log(ratio) * one
    )
    np.testing.assert_allclose(slope, ratio * -flows, rtol=1e-6)
    below = jax.grad(lambda logp: ppo_policy(logp, 0.0 * one, -one, one, 0.2, clip_high=0.4)[0].mean)(
        jnp.log(0.7) * one
    )
    assert below == 0.0


def test_ratio_gap_is_the_largest_distance_of_an_unmasked_ratio_from_one():
    logp, old, mask = draw(0, B, T), draw(1, B, T), draw_mask(2)
    gaps = [abs(np.exp(float(logp[b, t]) - float(old[b, t])) - 1.0) for b, t in np.argwhere(mask > 0)]
    np.testing.assert_allclose(ratio_gap(logp, old, mask), max(gaps), **CLOSE)
    assert ratio_gap(np.where(mask > 0, logp, np.float32(np.nan)), old, mask) == ratio_gap(logp, old, mask)
    assert ratio_gap(logp, old, 0.0 * mask) == 0.0


# --- value ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("clip", [0.2, None])
def test_ppo_value_is_a_loop_over_tokens(how, clip):
    values, old, returns, mask = draw(0, B, T), draw(10, B, T), draw(20, B, T), draw_mask(3)

    def terms(values, b, t):
        v, o, g = float(values[b, t]), float(old[b, t]), float(returns[b, t])
        return (v - g) ** 2, (v - g if clip is None else clipped(v, o - clip, o + clip) - g) ** 2

    def by_hand(values):
        return aggregate_by_hand(lambda b, t: 0.5 * max(terms(values, b, t)), mask, how)

    def loss(values):
        return ppo_value(values, old, returns, mask, clip, aggregation=how, norm=NORM)

    np.testing.assert_allclose(jax.jit(loss)(values)[0].mean, by_hand(values.astype(np.float64)), **CLOSE)
    slope = jax.grad(lambda x: loss(x)[0].mean)(values)
    np.testing.assert_allclose(slope, slope_by_hand(by_hand, values), **SLOPE)
    metrics = loss(values)[1]
    share = np.mean([near > plain for plain, near in (terms(values, b, t) for b, t in np.argwhere(mask > 0))])
    np.testing.assert_allclose(metrics["val/clipfrac_avg"].mean, share, **CLOSE)
    assert metrics["loss/value_avg"].mean == loss(values)[0].mean


def test_value_clip_takes_the_larger_error_and_half_of_it():
    one = jnp.ones((1, 1))
    loss, metrics = ppo_value(1.0 * one, 0.0 * one, 1.0 * one, one, 0.25)
    assert loss.mean == 0.5 * 0.75**2
    assert metrics["val/clipfrac_avg"].mean == 1.0
    loss, metrics = ppo_value(1.0 * one, 0.0 * one, -1.0 * one, one, 0.25)
    assert loss.mean == 0.5 * 2.0**2
    assert metrics["val/clipfrac_avg"].mean == 0.0


@pytest.mark.parametrize("objective", [ppo_policy, ppo_value])
def test_no_gradient_through_what_the_rollout_gave(objective):
    x, old, target, mask = -np.abs(draw(0, B, T)), -np.abs(draw(1, B, T)), draw(2, B, T), draw_mask(3)
    slopes = jax.grad(lambda a, b: objective(x, a, b, mask, 0.2)[0].mean, argnums=(0, 1))(old, target)
    assert all(np.all(np.asarray(s) == 0.0) for s in slopes)


@pytest.mark.parametrize("objective", [ppo_policy, ppo_value])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -1e30, 1e30])
def test_masked_positions_may_hold_anything(objective, junk):
    clean, mask = [-np.abs(draw(i, B, T)) for i in range(3)], draw_mask(3)
    dirty = [np.where(mask > 0, a, np.float32(junk)) for a in clean]
    both = jax.value_and_grad(lambda x, *rest: objective(x, *rest, mask, 0.2)[0].mean)
    (want, slope), (got, other) = both(*clean), both(*dirty)
    assert got == want
    np.testing.assert_array_equal(slope, other)
    assert all(np.isfinite(m.reported) for m in objective(*dirty, mask, 0.2)[1].values())


# --- KL as a loss ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_penalty_is_a_loop_over_tokens(how, kind):
    logp, ref, mask = -np.abs(draw(0, B, T)), -np.abs(draw(1, B, T)), draw_mask(3)

    def term(logp, b, t):
        log_r = float(ref[b, t]) - float(logp[b, t])
        return {"k1": -log_r, "k2": 0.5 * log_r**2, "k3": np.exp(log_r) - 1.0 - log_r}[kind]

    def by_hand(logp):
        return aggregate_by_hand(lambda b, t: term(logp, b, t), mask, how)

    def loss(logp, ref):
        return kl_penalty(logp, ref, mask, kind, how, NORM).mean

    np.testing.assert_allclose(loss(logp, ref), by_hand(logp.astype(np.float64)), **CLOSE)
    slope, none = jax.grad(loss, argnums=(0, 1))(logp, ref)
    np.testing.assert_allclose(slope, slope_by_hand(by_hand, logp), **SLOPE)
    assert np.all(np.asarray(none) == 0.0)
    dirty = [np.where(mask > 0, x, np.float32(np.inf)) for x in (logp, ref)]
    np.testing.assert_array_equal(jax.grad(loss)(*dirty), slope)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_expected_gradient_of_each_estimator_is_what_its_docstring_says(kind):
    logits, other = draw(0, 6), draw(1, 6)
    logp, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(other)

    def expected(logits):
        """Over every token, weighted by the sampling policy, which stands still."""
        own = jax.nn.log_softmax(logits)
        estimates = [kl_penalty(own[v, None], ref[v, None], jnp.ones(1), kind).mean for v in range(6)]
        return jnp.sum(jnp.exp(logp) * jnp.stack(estimates))

    forward = jax.grad(lambda x: jnp.sum(jnp.exp(jax.nn.log_softmax(x)) * (jax.nn.log_softmax(x) - ref)))(logits)
    reverse = jax.grad(lambda x: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(x))))(logits)
    want = {"k1": jnp.zeros(6), "k2": forward, "k3": reverse}[kind]
    np.testing.assert_allclose(jax.grad(expected)(logits), want, rtol=1e-5, atol=1e-6)
