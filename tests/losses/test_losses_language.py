import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_twins import CLOSE, B, T, V, draw, draw_mask

from jaxgpt.losses import next_token, sequence_logp, token_entropy, token_logp


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
def test_token_logp_is_log_softmax_of_logits_over_temperature(temperature):
    logits, tokens = draw(0, B, T, V, scale=3.0), np.random.default_rng(1).integers(0, V, (B, T), dtype=np.int32)
    got = jax.jit(token_logp)(logits, tokens, temperature)
    want = np.take_along_axis(log_softmax(logits.astype(np.float64) / temperature), tokens[..., None], -1)[..., 0]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, **CLOSE)


def test_numpys_own_number_types_do_as_well():
    logits, tokens, mask = draw(0, B, T, V), np.random.default_rng(1).integers(0, V, (B, T)), draw_mask(2)
    assert (logits.astype(np.float64).dtype, tokens.dtype) == (np.float64, np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logp = token_logp(logits.astype(np.float64), tokens, np.float64(0.7))
        loss, _ = next_token(np.asarray(logp, np.float64), mask.astype(bool))
    want = token_logp(jnp.asarray(logits), jnp.asarray(tokens.astype(np.int32)), 0.7)
    np.testing.assert_allclose(logp, want, **CLOSE)
    np.testing.assert_allclose(loss.mean, -np.asarray(want)[mask > 0].mean(), **CLOSE)


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
    np.testing.assert_allclose(token_entropy(jnp.asarray(logits), temperature), want, **CLOSE)
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


@pytest.mark.parametrize("mean", [False, True])
def test_sequence_logp_sums_or_averages_the_unmasked_tokens(mean):
    logp, mask = -np.abs(draw(0, B, T)), draw_mask(1)
    rows = [[float(logp[b, t]) for t in range(T) if mask[b, t]] for b in range(B)]
    want = [sum(row) / (len(row) if mean and row else 1) for row in rows]
    np.testing.assert_allclose(sequence_logp(logp, mask, mean), want, **CLOSE)
    dirty = np.where(mask > 0, logp, np.float32(np.nan))
    np.testing.assert_array_equal(sequence_logp(dirty, mask, mean), sequence_logp(logp, mask, mean))
    slope = jax.grad(lambda x: jnp.sum(sequence_logp(x, mask, mean)))(dirty)
    share = mask / np.maximum(mask.sum(1, keepdims=True), 1.0) if mean else mask
    np.testing.assert_allclose(slope, share, **CLOSE)
