import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_twins import CLOSE, B, T, draw, draw_mask, slope_by_hand

from jaxgpt.losses import dpo, sequence_logp

KINDS = [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0)]


def logps(seed: int) -> list[np.ndarray]:
    """Chosen, rejected, and both under the reference: nats a response."""
    return [-np.abs(draw(seed + i, B, scale=4.0)) for i in range(4)]


def dpo_by_hand(chosen, rejected, ref_chosen, ref_rejected, beta, kind, smoothing) -> float:
    terms = []
    for b in range(B):
        h = (float(chosen[b]) - float(ref_chosen[b])) - (float(rejected[b]) - float(ref_rejected[b]))
        if kind == "ipo":
            terms.append((h - 1.0 / (2.0 * beta)) ** 2)
        else:
            wins = 1.0 / (1.0 + math.exp(-beta * h))
            terms.append(-(1.0 - smoothing) * math.log(wins) - smoothing * math.log(1.0 - wins))
    return sum(terms) / B


@pytest.mark.parametrize(("kind", "smoothing"), KINDS)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_a_loop_over_pairs(kind, smoothing, beta):
    chosen, rejected, *reference = logps(0)

    def loss(pair):
        return dpo(*pair, *reference, beta, kind=kind, label_smoothing=smoothing)[0].mean

    def by_hand(pair):
        return dpo_by_hand(*pair, *reference, beta, kind, smoothing)

    pair = np.stack([chosen, rejected])
    np.testing.assert_allclose(jax.jit(loss)(pair), by_hand(pair.astype(np.float64)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(jax.grad(loss)(pair), slope_by_hand(by_hand, pair), rtol=1e-5, atol=1e-6)


def test_dpo_of_the_reference_itself_is_log_two_and_ipo_its_squared_margin():
    chosen, rejected, *_ = logps(0)
    assert dpo(chosen, rejected, chosen, rejected, 0.1)[0].mean == np.float32(math.log(2.0))
    np.testing.assert_allclose(dpo(chosen, rejected, chosen, rejected, 0.1, kind="ipo")[0].mean, 25.0, rtol=1e-6)


def test_dpo_figures():
    chosen, rejected, ref_chosen, ref_rejected = logps(3)
    ref_chosen[0], ref_rejected[0] = chosen[0] - 1.0, rejected[0] - 1.0  # equal rewards
    found = dpo(chosen, rejected, ref_chosen, ref_rejected, 0.3)[1]
    own, other = (0.3 * (a.astype(np.float64) - r) for a, r in ((chosen, ref_chosen), (rejected, ref_rejected)))
    want = {
        "rewards/chosen": own.mean(),
        "rewards/rejected": other.mean(),
        "rewards/margins": (own - other).mean(),
        "rewards/accuracies": (np.sum(own[1:] > other[1:]) + 0.5) / B,
        "logps/chosen": chosen.astype(np.float64).mean(),
        "logps/rejected": rejected.astype(np.float64).mean(),
    }
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name].mean, value, **CLOSE, err_msg=name)


@pytest.mark.parametrize(("kind", "smoothing"), KINDS)
def test_no_gradient_flows_into_the_reference(kind, smoothing):
    chosen, rejected, *reference = logps(0)
    slopes = jax.grad(
        lambda a, b: dpo(chosen, rejected, a, b, 0.1, kind=kind, label_smoothing=smoothing)[0].mean, argnums=(0, 1)
    )(*reference)
    assert all(np.all(np.asarray(s) == 0.0) for s in slopes)


def test_smoothed_labels_stop_the_loss_at_their_log_odds():
    zero = jnp.zeros(1)

    def slope(gain: float) -> float:
        return float(
            jax.grad(lambda c: dpo(c, zero, zero, zero, 0.5, label_smoothing=0.1)[0].mean)(jnp.array([gain]))[0]
        )

    assert slope(math.log(9.0) / 0.5) == pytest.approx(0.0, abs=1e-6)
    assert slope(2.0) < 0.0 < slope(6.0)


def test_ipo_of_means_per_token_and_of_sums_differ():
    """One pair, four tokens against two: gains 4 and -2 nats in sum, 1 and -1 a token."""
    mask = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    logp, reference = jnp.where(mask > 0, jnp.array([[-1.0], [-2.0]]), jnp.nan), jnp.array([[-2.0], [-1.0]]) * mask
    loss = {}
    for mean in (True, False):
        own, other = (sequence_logp(x, mask, mean) for x in (logp, reference))
        loss[mean] = float(dpo(own[:1], own[1:], other[:1], other[1:], 0.25, kind="ipo")[0].mean)
    assert loss == {True: 0.0, False: 16.0}


def test_unknown_kinds_and_smoothed_ipo_are_refused():
    arrays = [jnp.zeros(1)] * 4
    with pytest.raises(ValueError, match=r"'hinge'.*'sigmoid' or 'ipo'"):
        dpo(*arrays, 0.1, kind="hinge")
    with pytest.raises(ValueError, match="'ipo' has none"):
        dpo(*arrays, 0.1, kind="ipo", label_smoothing=0.1)


def test_garbage_outside_the_response_changes_nothing():
    mask = draw_mask(0)
    logp = [-np.abs(draw(i, B, T)) for i in range(4)]
    dirty = [np.where(mask > 0, x, np.float32(np.nan)) for x in logp]
    clean, other = ([sequence_logp(x, mask) for x in xs] for xs in (logp, dirty))
    assert dpo(*clean, 0.1)[0].mean == dpo(*other, 0.1)[0].mean
