import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_twins import AGGREGATIONS, CLOSE, NORM, B, T, aggregate_by_hand, draw, draw_mask

from jaxgpt.losses import Ratio, aggregate


def test_parts_add_up_to_the_mean_of_the_whole():
    x, mask = draw(0, B, T), draw_mask(1)
    whole = Ratio.of(x, mask)
    parts = Ratio.of(x[:1], mask[:1]) + Ratio.of(x[1:3], mask[1:3]) + Ratio.of(x[3:], mask[3:])
    np.testing.assert_allclose(parts.mean, whole.mean, **CLOSE)
    np.testing.assert_allclose(whole.mean, x[mask > 0].astype(np.float64).mean(), **CLOSE)
    np.testing.assert_allclose(whole.scaled(3.0).mean, 3.0 * whole.mean, **CLOSE)


def test_empty_mean_is_zero_and_its_gradient_too():
    gradient = jax.grad(lambda x: Ratio.of(x, jnp.zeros(3)).mean)(jnp.ones(3))
    assert Ratio.of(jnp.full(3, jnp.nan), jnp.zeros(3)).mean == 0.0
    assert np.all(np.asarray(gradient) == 0.0)


def test_fractional_weights_below_one_are_not_clamped():
    np.testing.assert_allclose(Ratio.of(jnp.array([2.0, 4.0]), jnp.array([0.125, 0.125])).mean, 3.0, **CLOSE)


def test_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 7\).*\(8,\)"):
        Ratio.of(jnp.ones((8, 7)), jnp.ones(8))


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("seed", range(3))
def test_each_aggregation_is_a_loop_over_its_tokens(how, seed):
    x, mask = draw(seed, B, T), draw_mask(seed)
    got = jax.jit(aggregate, static_argnums=2)(x, mask, how, NORM)
    np.testing.assert_allclose(got.mean, aggregate_by_hand(lambda b, t: float(x[b, t]), mask, how), **CLOSE)


def test_aggregations_of_one_long_and_one_short_response():
    """Losses 1 and 2 on a response of two tokens, 6 on one of one token."""
    x, mask = jnp.array([[1.0, 2.0], [6.0, 100.0]]), jnp.array([[1.0, 1.0], [1.0, 0.0]])
    got = {how: float(aggregate(x, mask, how, 2.0).mean) for how in AGGREGATIONS}
    assert got == {
        "token-mean": 3.0,
        "seq-mean-token-sum": 4.5,
        "seq-mean-token-mean": 3.75,
        "fixed-norm": 2.25,
    }


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_an_aggregation_does_not_depend_on_how_the_batch_is_cut(how):
    x, mask = draw(0, B, T), draw_mask(1)
    parts = [aggregate(x[rows], mask[rows], how, NORM) for rows in (slice(0, 1), slice(1, 3), slice(3, None))]
    np.testing.assert_allclose((parts[0] + parts[1] + parts[2]).mean, aggregate(x, mask, how, NORM).mean, **CLOSE)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_rows_without_a_token_and_masked_tokens_change_no_aggregation(how):
    x, mask = draw(0, B, T), draw_mask(1)
    dirty = np.where(mask > 0, x, np.float32(np.nan))
    want, slope = jax.value_and_grad(lambda x: aggregate(x, mask, how, NORM).mean)(x)
    got, other = jax.value_and_grad(lambda x: aggregate(x, mask, how, NORM).mean)(dirty)
    assert got == want
    np.testing.assert_array_equal(slope, other)
    some = mask.any(axis=1)
    np.testing.assert_allclose(aggregate(x[some], mask[some], how, NORM).mean, want, **CLOSE)
    assert aggregate(x, np.zeros_like(mask), how, NORM).mean == 0.0


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_rows_may_lie_in_any_leading_dimensions(how):
    x, mask = draw(0, B, T), draw_mask(1)
    folded = aggregate(x.reshape(2, B // 2, T), mask.reshape(2, B // 2, T), how, NORM)
    np.testing.assert_allclose(folded.mean, aggregate(x, mask, how, NORM).mean, **CLOSE)


def test_an_unknown_aggregation_and_a_missing_norm_are_refused():
    with pytest.raises(ValueError, match=r"'mean'.*'token-mean'.*'fixed-norm'"):
        aggregate(jnp.ones((1, 2)), jnp.ones((1, 2)), "mean")
    with pytest.raises(ValueError, match="needs norm"):
        aggregate(jnp.ones((1, 2)), jnp.ones((1, 2)), "fixed-norm")
