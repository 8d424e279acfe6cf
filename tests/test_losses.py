import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P

from jaxgpt.losses import Ratio, next_token, ppo_policy, ppo_value, ranking, token_entropy, token_logp

B, T, V, K = 8, 7, 16, 5
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def draw_mask(seed: int) -> np.ndarray:
    mask = (np.random.default_rng(seed).random((B, T)) < 0.6).astype(np.float32)
    mask[0], mask[1, 0] = 0.0, 1.0
    return mask


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


# --- Ratio ----------------------------------------------------------------------------------------------------------
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


# --- log-probabilities ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logp_is_log_softmax_of_logits_over_temperature(temperature):
    logits, tokens = draw(0, B, T, V, scale=3.0), np.random.default_rng(1).integers(0, V, (B, T), dtype=np.int32)
    got = jax.jit(token_logp)(logits, tokens, temperature)
    want = np.take_along_axis(log_softmax(logits.astype(np.float64) / temperature), tokens[..., None], -1)[..., 0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=3e-6)


def test_token_logp_survives_large_and_forbidden_logits_and_low_precision():
    logits = jnp.array([[[1e4, 1e4, -jnp.inf, 0.0]]])
    np.testing.assert_allclose(token_logp(logits, jnp.array([[1]])), -np.log(2.0), rtol=1e-6)
    assert token_logp(logits, jnp.array([[2]])) == -jnp.inf
    half = token_logp(jnp.zeros((1, 1, 4), jnp.bfloat16), jnp.array([[1]]))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, -np.log(4.0), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_token_entropy(temperature):
    logits = draw(2, B, T, V, scale=2.0)
    logits[..., 3] = -np.inf
    logp = log_softmax(logits.astype(np.float64) / temperature)
    want = -np.sum(np.exp(logp) * np.where(np.isfinite(logp), logp, 0.0), axis=-1)
    np.testing.assert_allclose(token_entropy(jnp.asarray(logits), temperature), want, rtol=1e-5, atol=2e-6)
    assert np.all(np.isfinite(jax.grad(lambda x: jnp.sum(token_entropy(x)))(jnp.asarray(logits))))


def test_next_token_of_a_bigram_table_is_its_cross_entropy():
    table = draw(3, V, V, scale=2.0)
    tokens = np.random.default_rng(4).integers(0, V, (B, T + 1), dtype=np.int32)
    mask = draw_mask(5)
    loss, metrics = next_token(token_logp(jnp.asarray(table)[tokens[:, :-1]], tokens[:, 1:]), mask)
    logp = log_softmax(table)
    terms = [-logp[tokens[b, t], tokens[b, t + 1]] for b in range(B) for t in range(T) if mask[b, t]]
    np.testing.assert_allclose(loss.mean, np.mean(terms), **CLOSE)
    assert (metrics["nll"].mean, loss.weight) == (loss.mean, len(terms))


# --- rankings -------------------------------------------------------------------------------------------------------
def rankings(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores, ranks = draw(seed, B, K, scale=2.0), rng.integers(1, 4, (B, K), dtype=np.int32)
    valid = np.arange(K) < rng.integers(0, K + 1, (B, 1))
    ranks[0], valid[0] = 2, True
    return scores, ranks, valid


def ranking_by_hand(scores, ranks, valid):
    losses, margins = [], []
    for b in range(len(scores)):
        pairs = [
            float(scores[b, i]) - float(scores[b, j])
            for i in range(scores.shape[1])
            for j in range(scores.shape[1])
            if valid[b, i] and valid[b, j] and ranks[b, i] < ranks[b, j]
        ]
        margins += pairs
        if pairs:
            losses.append(np.mean([np.log1p(np.exp(-d)) for d in pairs]))
    return np.mean(losses), np.mean([(d > 0) + 0.5 * (d == 0) for d in margins]), np.mean(margins), len(losses)


@pytest.mark.parametrize("seed", range(5))
def test_ranking_is_the_mean_over_prompts_of_the_mean_over_pairs(seed):
    scores, ranks, valid = rankings(seed)
    loss, metrics = jax.jit(ranking)(scores, ranks, valid)
    want, accuracy, margin, prompts = ranking_by_hand(scores, ranks, valid)
    np.testing.assert_allclose(loss.mean, want, **CLOSE)
    np.testing.assert_allclose(metrics["accuracy"].mean, accuracy, **CLOSE)
    np.testing.assert_allclose(metrics["margin"].mean, margin, **CLOSE)
    assert (metrics["loss"].mean, loss.weight) == (loss.mean, prompts)


def test_ranking_of_two_is_pairwise_and_swapped_columns_flip_the_accuracy():
    scores, valid = draw(0, B, 2), np.ones((B, 2), bool)
    first = np.tile(np.array([1, 2], np.int32), (B, 1))
    loss, metrics = ranking(scores, first, valid)
    difference = scores[:, 0].astype(np.float64) - scores[:, 1]
    np.testing.assert_allclose(loss.mean, np.mean(np.log1p(np.exp(-difference))), **CLOSE)
    swapped = ranking(scores, first[:, ::-1], valid)[1]
    np.testing.assert_allclose(swapped["accuracy"].mean, 1.0 - metrics["accuracy"].mean, **CLOSE)
    np.testing.assert_allclose(swapped["margin"].mean, -metrics["margin"].mean, **CLOSE)


def test_ranking_ignores_order_and_offset_and_its_gradient_sums_to_zero():
    scores, ranks, valid = rankings(1)
    loss = ranking(scores, ranks, valid)[0].mean
    turn = np.random.default_rng(2).permutation(K)
    np.testing.assert_allclose(ranking(scores[:, turn], ranks[:, turn], valid[:, turn])[0].mean, loss, **CLOSE)
    np.testing.assert_allclose(ranking(scores + np.float32(5.0), ranks, valid)[0].mean, loss, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.sum(jax.grad(lambda s: ranking(s, ranks, valid)[0].total)(jnp.asarray(scores)), axis=1), 0.0, atol=1e-6
    )


def test_a_prompt_weighs_the_same_with_nine_responses_as_with_four():
    ranks = np.tile(np.arange(1, 10, dtype=np.int32), (2, 1))
    valid = np.stack([np.arange(9) < 9, np.arange(9) < 4])
    scores = -0.7 * ranks.astype(np.float32)
    both = ranking(scores, ranks, valid)[0]
    single = [ranking(scores[i : i + 1], ranks[i : i + 1], valid[i : i + 1])[0] for i in range(2)]
    assert both.weight == 2.0
    np.testing.assert_allclose(both.mean, (single[0].mean + single[1].mean) / 2.0, **CLOSE)


def test_tied_ranks_make_no_pair_and_tied_scores_count_half():
    scores, valid = jnp.array([[1.0, 1.0, 4.0]]), jnp.ones((1, 3), bool)
    loss, metrics = ranking(scores, jnp.array([[1, 2, 2]]), valid)
    assert metrics["accuracy"].weight == 2.0
    assert metrics["accuracy"].mean == 0.25
    np.testing.assert_allclose(loss.mean, (np.log(2.0) + np.log1p(np.exp(3.0))) / 2.0, rtol=1e-6)
    none, _ = ranking(scores, jnp.array([[2, 2, 2]]), valid)
    assert (none.weight, none.mean) == (0.0, 0.0)


def test_missing_responses_may_hold_anything():
    scores, ranks, valid = rankings(3)
    dirty = np.where(valid, scores, np.float32(np.nan))
    value, gradient = jax.value_and_grad(lambda s: ranking(s, ranks, valid)[0].mean)(jnp.asarray(dirty))
    assert value == ranking(scores, ranks, valid)[0].mean
    assert np.all(np.asarray(gradient)[~valid] == 0.0)
    assert np.all(np.isfinite(gradient))


# --- PPO ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_ppo_policy(seed):
    logp, old, advantages = -np.abs(draw(seed, B, T)), -np.abs(draw(seed + 10, B, T)), draw(seed + 20, B, T)
    mask = draw_mask(seed)
    loss, metrics = jax.jit(ppo_policy)(logp, old, advantages, mask, 0.2)
    terms, clipped, kl, ratios = [], [], [], []
    for b, t in np.argwhere(mask > 0):
        change, a = float(logp[b, t]) - float(old[b, t]), float(advantages[b, t])
        rho = np.exp(change)
        plain, bound = -a * rho, -a * min(max(rho, 0.8), 1.2)
        terms.append(max(plain, bound))
        clipped.append(bound > plain)
        kl.append(0.5 * change**2)
        ratios.append(rho)
    np.testing.assert_allclose(loss.mean, np.mean(terms), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"].mean, np.mean(clipped), **CLOSE)
    np.testing.assert_allclose(metrics["policy/approxkl_avg"].mean, np.mean(kl), **CLOSE)
    np.testing.assert_allclose(metrics["val/ratio"].mean, np.mean(ratios), **CLOSE)
    assert metrics["loss/policy_avg"].mean == loss.mean


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
    assert abs(float(metrics["val/ratio"].mean) - 1.0) < 1e-5
    assert metrics["policy/clipfrac_avg"].mean == 0.0
    assert metrics["policy/approxkl_avg"].mean == 0.0
    np.testing.assert_allclose(slope, -advantages * mask / mask.sum(), **CLOSE)


@pytest.mark.parametrize("seed", range(3))
def test_ppo_value(seed):
    values, old, returns, mask = draw(seed, B, T), draw(seed + 10, B, T), draw(seed + 20, B, T), draw_mask(seed)
    loss, metrics = jax.jit(ppo_value)(values, old, returns, mask, 0.2)
    terms = []
    for b, t in np.argwhere(mask > 0):
        v, o, g = float(values[b, t]), float(old[b, t]), float(returns[b, t])
        terms.append(0.5 * max((v - g) ** 2, (min(max(v, o - 0.2), o + 0.2) - g) ** 2))
    np.testing.assert_allclose(loss.mean, np.mean(terms), **CLOSE)
    assert metrics["loss/value_avg"].mean == loss.mean


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
    assert all(np.isfinite(m.mean) for m in objective(*dirty, mask, 0.2)[1].values())


# --- devices --------------------------------------------------------------------------------------------------------
def everything(logits, tokens, mask, scores, ranks):
    logp = token_logp(logits, tokens, 0.7)
    old, advantage = logp + 0.3 * jnp.sin(logp), token_entropy(logits)
    losses = [
        next_token(logp, mask),
        ranking(scores, ranks, scores > -1.0),
        ppo_policy(logp, old, advantage, mask, 0.2),
        ppo_value(logp, old, advantage, mask, 0.2),
    ]
    return sum((loss.mean for loss, _ in losses), jnp.float32(0.0)), [
        {k: m.mean for k, m in d.items()} for _, d in losses
    ]


def test_sharded_equals_one_device(mesh222):
    rows = ("data", "fsdp")
    tokens = np.random.default_rng(1).integers(0, V, (B, T), dtype=np.int32)
    scores, ranks, _ = rankings(4)
    arrays = (draw(0, B, T, V, scale=2.0), tokens, draw_mask(2), scores, ranks)
    run = jax.value_and_grad(everything, argnums=(0, 3), has_aux=True)
    (want, metrics), slopes = jax.jit(run)(*arrays)
    for logits_spec in (P(rows, None, "tensor"), P(rows, None, None)):
        with jax.set_mesh(mesh222):
            specs = (logits_spec, *[P(rows, None)] * 4)
            put = [jax.device_put(a, s) for a, s in zip(arrays, specs, strict=True)]
            (got, sharded_metrics), sharded = jax.jit(run)(*put)
            assert sharded[0].sharding.spec == logits_spec
        np.testing.assert_allclose(got, want, rtol=1e-6)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), (sharded_metrics, sharded), (metrics, slopes)
        )
