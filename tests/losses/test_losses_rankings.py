import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_twins import CLOSE, B, K, draw, rankings, slope_by_hand

from jaxgpt.losses import best_of_k, centring, plackett_luce, ranking

OBJECTIVES = (ranking, best_of_k, plackett_luce)


def there(valid: np.ndarray, b: int) -> list[int]:
    return [i for i in range(valid.shape[1]) if valid[b, i]]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def ranking_by_hand(scores, ranks, valid, margins, smoothing, ties, weighting) -> float:
    """Pair by pair, each with its loss and its weight."""
    prompts = []
    for b in range(len(scores)):
        losses = []
        for i, j in itertools.combinations(there(valid, b), 2):
            winner, loser = (i, j) if ranks[b, i] < ranks[b, j] else (j, i)
            gain = scores[b, winner] - scores[b, loser]
            if ranks[b, i] != ranks[b, j]:
                right, wrong = softplus(-(gain - margins[b])), softplus(-(-gain - margins[b]))
                losses.append((1.0 - smoothing) * right + smoothing * wrong)
            elif ties == "half":
                losses.append((softplus(gain) + softplus(-gain)) / 2.0)
        if losses:
            prompts.append(losses)
    if weighting == "pair":
        return sum(map(sum, prompts)) / sum(map(len, prompts))
    return sum(sum(losses) / len(losses) for losses in prompts) / len(prompts)


def best_of_k_by_hand(scores, ranks, valid) -> float:
    terms = []
    for b in range(len(scores)):
        own = there(valid, b)
        best = [i for i in own if all(ranks[b, i] <= ranks[b, j] for j in own)]
        if len(best) < len(own):
            norm = math.log(sum(math.exp(scores[b, i]) for i in own))
            terms.append(sum(norm - scores[b, i] for i in best) / len(best))
    return sum(terms) / len(terms)


def plackett_luce_by_hand(scores, ranks, valid) -> float:
    terms = []
    for b in range(len(scores)):
        own, total, choices = there(valid, b), 0.0, 0
        for i in own:
            if any(ranks[b, j] > ranks[b, i] for j in own):
                left = [j for j in own if ranks[b, j] >= ranks[b, i]]
                total += math.log(sum(math.exp(scores[b, j]) for j in left)) - scores[b, i]
                choices += 1
        if choices:
            terms.append(total)
    return sum(terms) / len(terms)


def centring_by_hand(scores, valid) -> float:
    terms = []
    for b in range(len(scores)):
        pairs = [(scores[b, i] + scores[b, j]) ** 2 for i, j in itertools.combinations(there(valid, b), 2)]
        if pairs:
            terms.append(sum(pairs) / len(pairs))
    return sum(terms) / len(terms)


def agree(loss, by_hand, scores):
    """The value to 1e-6, and the gradient with respect to the scores."""
    value, slope = jax.value_and_grad(loss)(jnp.asarray(scores))
    np.testing.assert_allclose(value, by_hand(scores.astype(np.float64)), **CLOSE)
    np.testing.assert_allclose(slope, slope_by_hand(by_hand, scores), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["prompt", "pair"])
@pytest.mark.parametrize("ties", ["drop", "half"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("margin", [False, True])
def test_ranking_is_a_loop_over_pairs(weighting, ties, smoothing, margin):
    scores, ranks, valid = rankings(0)
    margins = np.abs(draw(7, B)) if margin else None
    agree(
        lambda s: (
            ranking(s, ranks, valid, margin_B=margins, label_smoothing=smoothing, ties=ties, weighting=weighting)[
                0
            ].mean
        ),
        lambda s: ranking_by_hand(
            s, ranks, valid, np.zeros(B) if margins is None else margins.astype(np.float64), smoothing, ties, weighting
        ),
        scores,
    )


@pytest.mark.parametrize("seed", range(5))
def test_losses_of_rankings_are_loops(seed):
    scores, ranks, valid = rankings(seed)
    plain = (np.zeros(B), 0.0, "drop", "prompt")
    agree(lambda s: ranking(s, ranks, valid)[0].mean, lambda s: ranking_by_hand(s, ranks, valid, *plain), scores)
    agree(lambda s: best_of_k(s, ranks, valid)[0].mean, lambda s: best_of_k_by_hand(s, ranks, valid), scores)
    agree(lambda s: plackett_luce(s, ranks, valid)[0].mean, lambda s: plackett_luce_by_hand(s, ranks, valid), scores)
    agree(lambda s: centring(s, valid).mean, lambda s: centring_by_hand(s, valid), scores)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_accuracy_and_margin_are_means_over_all_pairs_of_different_rank(objective):
    scores, ranks, valid = rankings(2)
    scores[2, :2] = scores[2, 0]
    loss, metrics = jax.jit(objective)(scores, ranks, valid)
    gains = [
        float(scores[b, i]) - float(scores[b, j])
        for b in range(B)
        for i, j in itertools.permutations(there(valid, b), 2)
        if ranks[b, i] < ranks[b, j]
    ]
    np.testing.assert_allclose(metrics["accuracy"].mean, np.mean([(g > 0) + 0.5 * (g == 0) for g in gains]), **CLOSE)
    np.testing.assert_allclose(metrics["margin"].mean, np.mean(gains), **CLOSE)
    assert metrics["loss"].mean == loss.mean
    assert loss.weight == sum(len({ranks[b, i] for i in there(valid, b)}) > 1 for b in range(B))


def test_ranking_of_two_is_pairwise_and_swapped_columns_flip_the_accuracy():
    scores, valid = draw(0, B, 2), np.ones((B, 2), bool)
    first = np.tile(np.array([1, 2], np.int32), (B, 1))
    loss, metrics = ranking(scores, first, valid)
    difference = scores[:, 0].astype(np.float64) - scores[:, 1]
    np.testing.assert_allclose(loss.mean, np.mean(np.log1p(np.exp(-difference))), **CLOSE)
    swapped = ranking(scores, first[:, ::-1], valid)[1]
    np.testing.assert_allclose(swapped["accuracy"].mean, 1.0 - metrics["accuracy"].mean, **CLOSE)
    np.testing.assert_allclose(swapped["margin"].mean, -metrics["margin"].mean, **CLOSE)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_order_and_offset_change_no_loss_and_its_gradient_sums_to_zero(objective):
    scores, ranks, valid = rankings(1)
    loss = objective(scores, ranks, valid)[0].mean
    turn = np.random.default_rng(2).permutation(K)
    np.testing.assert_allclose(objective(scores[:, turn], ranks[:, turn], valid[:, turn])[0].mean, loss, **CLOSE)
    np.testing.assert_allclose(objective(scores + np.float32(5.0), ranks, valid)[0].mean, loss, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.sum(jax.grad(lambda s: objective(s, ranks, valid)[0].total)(jnp.asarray(scores)), axis=1), 0.0, atol=1e-6
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


def centred(scores, ranks, valid):
    loss = centring(scores, valid)
    return loss, {"loss": loss}


@pytest.mark.parametrize("objective", [*OBJECTIVES, centred])
def test_missing_responses_may_hold_anything(objective):
    scores, ranks, valid = rankings(3)
    dirty = np.where(valid, scores, np.float32(np.nan))
    value, gradient = jax.value_and_grad(lambda s: objective(s, ranks, valid)[0].mean)(jnp.asarray(dirty))
    assert value == objective(scores, ranks, valid)[0].mean
    assert all(np.isfinite(m.mean) for m in objective(dirty, ranks, valid)[1].values())
    assert np.all(np.asarray(gradient)[~valid] == 0.0)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_for_two_responses_all_objectives_are_the_same(objective):
    scores, valid = draw(0, B, 2), np.ones((B, 2), bool)
    ranks = np.random.default_rng(1).permuted(np.tile([1, 2], (B, 1)), axis=1)
    np.testing.assert_allclose(objective(scores, ranks, valid)[0].mean, ranking(scores, ranks, valid)[0].mean, **CLOSE)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_prompt_without_a_pair_weighs_nothing(objective):
    scores = jnp.array([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    valid = jnp.array([[True, True, True], [False, True, False]])
    loss, _ = objective(scores, jnp.array([[4, 4, 4], [1, 2, 3]]), valid)
    assert (loss.weight, loss.mean) == (0.0, 0.0)


def test_plackett_luce_of_a_winner_and_ties_behind_it_is_best_of_k():
    scores, valid = draw(0, B, K), np.ones((B, K), bool)
    ranks = np.random.default_rng(1).permuted(np.tile([1] + [2] * (K - 1), (B, 1)), axis=1)
    np.testing.assert_allclose(
        plackett_luce(scores, ranks, valid)[0].mean, best_of_k(scores, ranks, valid)[0].mean, **CLOSE
    )


def test_plackett_luce_is_a_distribution_over_orders():
    scores, valid = draw(0, 1, 4), np.ones((1, 4), bool)
    orders = [np.array([order]) for order in itertools.permutations(range(4))]
    chances = [math.exp(-plackett_luce(scores, order, valid)[0].mean) for order in orders]
    np.testing.assert_allclose(sum(chances), 1.0, **CLOSE)


def test_smoothing_pulls_the_best_margin_from_infinity_to_its_log_odds():
    def slope(gain: float) -> float:
        scores = jnp.array([[gain, 0.0]])
        return float(
            jax.grad(lambda s: ranking(s, jnp.array([[1, 2]]), jnp.ones((1, 2)), label_smoothing=0.1)[0].mean)(scores)[
                0, 0
            ]
        )

    assert slope(math.log(9.0)) == pytest.approx(0.0, abs=1e-6)
    assert slope(1.0) < 0.0 < slope(3.0)


def test_centring_of_pairs_is_the_mean_square_of_their_sum():
    scores = draw(0, B, 2)
    want = np.mean((scores[:, 0].astype(np.float64) + scores[:, 1]) ** 2)
    np.testing.assert_allclose(centring(scores, np.ones((B, 2), bool)).mean, want, **CLOSE)


def test_unknown_choices_are_refused():
    arrays = jnp.ones((1, 2)), jnp.array([[1, 2]]), jnp.ones((1, 2))
    with pytest.raises(ValueError, match=r"'keep'.*'drop' or 'half'"):
        ranking(*arrays, ties="keep")
    with pytest.raises(ValueError, match=r"'token'.*'prompt' or 'pair'"):
        ranking(*arrays, weighting="token")
