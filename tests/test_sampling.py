"""Sampling: cached decoding is the full forward pass, draws are unbiased, and rows stop at their end."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import random_params

from jaxgpt.config.schema import AttentionConfig, LearnedPositions, ModelConfig, NormConfig, RopePositions
from jaxgpt.errors import UserError
from jaxgpt.losses import token_logp
from jaxgpt.mesh import AXES, put_batch
from jaxgpt.models.heads import language_model
from jaxgpt.sampling import (
    Filter,
    advance,
    bucket,
    draw,
    filter_logits,
    generate,
    left_padded,
    ragged,
    right_padded,
    start,
)

VOCAB, NEW, PAD = 384, 7, 3
PROMPTS = [np.arange(5, 5 + n) * 7 % VOCAB for n in (1, 4, 9, 6)]
ONE = jax.make_mesh((1, 1, 1, 1), AXES, devices=jax.devices()[:1])
SHAPE = {"width": 32, "layers": 1, "context": 16}
MODELS = {
    "rope, grouped keys, windows": ModelConfig(
        **(SHAPE | {"layers": 2}),
        positions=RopePositions(),
        attention=AttentionConfig(heads=4, kv_heads=2, windows=(None, 3)),
    ),
    "learned positions, as long as the context": ModelConfig(
        **SHAPE, positions=LearnedPositions(), norm=NormConfig(type="layernorm", bias=True), tied=False
    ),
    "partial rope, one key head, parallel": ModelConfig(
        **SHAPE,
        positions=RopePositions(fraction=0.5, pairing="interleaved"),
        attention=AttentionConfig(heads=4, kv_heads=1, windows=(4,), softcap=20.0),
        residual="parallel",
        scan_layers=False,
    ),
}


class Sampler:
    """A random model on a mesh, its programs compiled once."""

    def __init__(self, config: ModelConfig, mesh: jax.sharding.Mesh):
        self.mesh = mesh
        with jax.set_mesh(mesh):
            self.net = language_model(config, VOCAB)
            self.params = random_params(self.net, 1)
        self._respond = jax.jit(self._generate)
        self._score = jax.jit(self._logp)

    def respond(self, prompts, temperature, end=-1, kept=None, after=0):
        batch = left_padded(prompts, len(prompts), 12, PAD)
        with jax.set_mesh(self.mesh):
            found = self._respond(self.params, put_batch(batch, self.mesh), jnp.float32(temperature), end, kept, after)
            return jax.device_get({name: getattr(found, name) for name in FIELDS})

    def _generate(self, params, rows, temperature, end, kept, after):
        lm, key, ends = self.net.bind(params), jax.random.key(5), (end,)
        given = (lm, rows["tokens"], rows["segments"])
        with jax.numpy_dtype_promotion("strict"):
            if kept is None:
                return generate(*given, key, new=NEW, temperature=temperature, ends=ends, pad=PAD, after=after)
            return advance(lm, start(*given, NEW, PAD), key, temperature, kept, ends, PAD, NEW, after=after)

    def score(self, sequences, temperature=1.0):
        batch = right_padded(sequences, len(sequences), 16)
        with jax.set_mesh(self.mesh):
            return jax.device_get(self._score(self.params, put_batch(batch, self.mesh), jnp.float32(temperature)))

    def _logp(self, params, rows, temperature):
        lm = self.net.bind(params)
        logits = lm.logits(lm.hidden(rows["tokens"], rows["segments"], rows["positions"]))
        return logits, token_logp(logits[:, :-1], rows["tokens"][:, 1:], temperature)


FIELDS = ("tokens_BN", "logp_BN", "lengths_B", "done_B", "count")


@functools.cache
def sampler(name: str, shape: tuple[int, ...] = (1, 1, 1, 1)) -> Sampler:
    mesh = ONE if shape == (1, 1, 1, 1) else jax.make_mesh(shape, AXES)
    return Sampler(MODELS[name], mesh)


@pytest.fixture
def model() -> Sampler:
    return sampler("rope, grouped keys, windows")


@pytest.mark.parametrize("name", MODELS)
def test_ragged_cached_decoding_is_the_full_forward_pass_at_any_temperature(name):
    model = sampler(name)
    for temperature in (1.0, 0.7):
        found = model.respond(PROMPTS, temperature)
        whole = [np.concatenate([p, r]) for p, r in zip(PROMPTS, found["tokens_BN"], strict=True)]
        logp = model.score(whole, temperature)[1]
        for i, prompt in enumerate(PROMPTS):
            at = len(prompt) - 1
            np.testing.assert_allclose(found["logp_BN"][i], logp[i, at : at + NEW], atol=1e-4)
        assert found["count"] == NEW and (found["lengths_B"] == NEW).all() and not found["done_B"].any()


def test_temperature_0_takes_the_argmax_at_every_step(model):
    found = model.respond(PROMPTS, 0.0)
    whole = [np.concatenate([p, r]) for p, r in zip(PROMPTS, found["tokens_BN"], strict=True)]
    logits, logp = model.score(whole)
    for i, prompt in enumerate(PROMPTS):
        at = len(prompt) - 1
        assert found["tokens_BN"][i].tolist() == logits[i, at : at + NEW].argmax(-1).tolist()
        np.testing.assert_allclose(found["logp_BN"][i], logp[i, at : at + NEW], atol=1e-4)
    assert (model.respond(PROMPTS, 1e-9)["tokens_BN"] == found["tokens_BN"]).all()


def test_the_same_tokens_come_out_on_any_mesh(model):
    split = sampler("rope, grouped keys, windows", (2, 2, 1, 2))
    ours, theirs = model.respond(PROMPTS, 0.9), split.respond(PROMPTS, 0.9)
    assert (ours["tokens_BN"] == theirs["tokens_BN"]).all()
    np.testing.assert_allclose(ours["logp_BN"], theirs["logp_BN"], atol=1e-4)


@pytest.mark.parametrize("kept", [Filter(jnp.int32(VOCAB), jnp.float32(1e-6)), Filter(jnp.int32(1), jnp.float32(1.0))])
def test_the_narrowest_filters_give_the_argmax_from_the_first_token_on(model, kept):
    likeliest = model.respond(PROMPTS, 0.0)["tokens_BN"]
    found = model.respond(PROMPTS, 2.0, kept=kept)
    assert (found["tokens_BN"] == likeliest).all()
    whole = [np.concatenate([p, r]) for p, r in zip(PROMPTS, likeliest, strict=True)]
    logp = model.score(whole, 2.0)[1]  # log-probabilities are those before the filter
    np.testing.assert_allclose(found["logp_BN"][2], logp[2, 8 : 8 + NEW], atol=1e-4)


def test_behind_the_end_token_there_is_only_padding(model):
    free = model.respond(PROMPTS, 1.0)["tokens_BN"]
    end = int(free[0, 2])
    found = model.respond(PROMPTS, 1.0, end)
    for row, logp, length, done, wanted in zip(*(found[name] for name in FIELDS[:4]), free, strict=True):
        n = wanted.tolist().index(end) + 1 if end in wanted else NEW
        assert row.tolist() == [*wanted[:n], *[PAD] * (NEW - n)] and length == n and done == (end in wanted)
        assert (logp[:n] < 0).all() and (logp[n:] == 0).all()
    assert found["lengths_B"][0] <= 3


def test_an_end_counts_from_a_place_on(model):
    free = model.respond(PROMPTS, 1.0)["tokens_BN"]
    end = int(free[0, 2])
    for after in range(NEW + 1):
        found = model.respond(PROMPTS, 1.0, end, after=after)
        for row, length, done, wanted in zip(
            *(found[name] for name in ("tokens_BN", "lengths_B", "done_B")), free, strict=True
        ):
            places = [place for place in range(after, NEW) if wanted[place] == end]
            n = places[0] + 1 if places else NEW
            assert row.tolist() == [*wanted[:n], *[PAD] * (NEW - n)] and length == n and done == bool(places)


def test_decoding_stops_once_every_row_has_ended(model):
    same = [PROMPTS[2]] * 4
    free = model.respond(same, 0.0)["tokens_BN"]
    n = free[0].tolist().index(free[0, 3]) + 1
    found = model.respond(same, 0.0, int(free[0, 3]))
    assert found["count"] == n < NEW and (found["lengths_B"] == n).all() and found["done_B"].all()


def test_decoding_in_parts_and_with_vocabulary_rows_left_out(model):
    pieces = 40

    @functools.partial(jax.jit, static_argnums=2)
    def begin(params, rows, new):
        return start(model.net.bind(params), rows["tokens"], rows["segments"], new, PAD)

    @jax.jit
    def go(params, state, limit, temperature):
        key = jax.random.key(5)
        return advance(model.net.bind(params), state, key, temperature, None, (), PAD, limit, pieces)

    with jax.set_mesh(ONE):
        first = begin(model.params, put_batch(left_padded(PROMPTS, 4, 12, PAD), ONE), NEW)
        whole = go(model.params, first, NEW, jnp.float32(1.5))
        parts = first
        for limit in (1, 2, 5, NEW):
            parts = go(model.params, parts, limit, jnp.float32(1.5))
            assert parts.count == limit
        likeliest = go(model.params, first, NEW, jnp.float32(0.0)).tokens_BN
    assert (parts.tokens_BN == whole.tokens_BN).all() and (parts.logp_BN == whole.logp_BN).all()
    assert (whole.tokens_BN < pieces).all() and (likeliest < pieces).all()
    assert (model.respond(PROMPTS, 1.5)["tokens_BN"] >= pieces).any()


@pytest.mark.parametrize("vocab", [5, 128, 300])
def test_draws_follow_the_softmax(vocab):
    logits_V = jax.random.normal(jax.random.key(vocab), (vocab,)) * 1.5

    @jax.jit
    def counts(key):
        def part(key):
            tokens = draw(jnp.broadcast_to(logits_V, (1000, vocab)), jax.random.uniform(key, (1000,)))
            return jnp.bincount(tokens, length=vocab)

        return jnp.sum(jax.lax.map(part, jax.random.split(key, 100)), axis=0)

    check_counts(counts(jax.random.key(0)), jax.nn.softmax(logits_V), 100_000)


def check_counts(observed, chances, draws):
    """Chi-square of counts; entries of fewer than 10 expected draws count as one."""
    observed, expected = np.asarray(observed, np.float64), np.asarray(chances, np.float64) * draws
    assert observed.sum() == draws and not observed[expected == 0].any()
    rare = expected < 10
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (observed, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    statistic = np.sum((observed - expected) ** 2 / expected)
    assert abs(statistic - freedom) < 4 * np.sqrt(2 * freedom), (statistic, freedom)


def test_tokens_follow_the_softmax_at_the_temperature_and_filters_come_behind_it(model):
    many, prompt = 8192, PROMPTS[0]

    @jax.jit
    def one(params, rows, temperature, kept):
        lm, key = model.net.bind(params), jax.random.key(6)
        first = start(lm, rows["tokens"], rows["segments"], 1, PAD)
        return advance(lm, first, key, temperature, kept, (), PAD, 1).tokens_BN[:, 0]

    rows = left_padded([prompt] * many, many, len(prompt), PAD)
    logits_V = model.score([prompt] * 4)[0][0, len(prompt) - 1].astype(np.float64)
    for temperature, top_k, top_p in ((0.6, VOCAB, 1.0), (1.7, VOCAB, 1.0), (1.7, 50, 0.4)):
        chances_V = np.exp(logits_V / temperature)
        likeliest = np.argsort(-chances_V)
        chances_V[likeliest[top_k:]] = 0.0
        chances_V /= chances_V.sum()
        before = np.cumsum(chances_V[likeliest]) - chances_V[likeliest]
        chances_V[likeliest[before >= top_p]] = 0.0
        kept = Filter(jnp.int32(top_k), jnp.float32(top_p))
        with jax.set_mesh(ONE):
            tokens = jax.device_get(one(model.params, put_batch(rows, ONE), jnp.float32(temperature), kept))
        check_counts(np.bincount(tokens, minlength=VOCAB), chances_V / chances_V.sum(), many)


@pytest.mark.parametrize("vocab", [5, 128, 300])
def test_draws_on_a_mesh_are_those_of_one_device(vocab, mesh222):
    """Vocabularies of one block too, as of characters."""
    rng = np.random.default_rng(vocab)
    rows = {"logits": rng.normal(size=(16, vocab)).astype(np.float32), "uniform": rng.random(16, np.float32)}
    drawn = []
    for mesh in (ONE, mesh222):
        with jax.set_mesh(mesh):
            drawn.append(np.asarray(jax.jit(lambda r: draw(r["logits"], r["uniform"]))(put_batch(rows, mesh))))
    assert (drawn[0] == drawn[1]).all()


def test_what_is_impossible_is_never_drawn():
    logits = np.full((2048, 1000), -np.inf, np.float32)
    kept = np.random.default_rng(0).permutation(1000)[:30]
    logits[:, kept] = np.random.default_rng(1).normal(size=30) * 4
    uniform = np.linspace(0.0, 1.0, 2048, dtype=np.float32)
    uniform[-1] = np.nextafter(np.float32(1), np.float32(0))
    tokens = np.asarray(jax.jit(draw)(logits, uniform))
    assert set(tokens.tolist()) <= set(kept.tolist())
    assert tokens[0] == kept.min() and tokens[-1] == kept.max() and (np.diff(tokens) >= 0).all()


FILTERED = jax.jit(filter_logits)


def kept_tokens(probabilities, top_k, top_p):
    logits = np.log(np.array([probabilities], np.float32))
    found = np.asarray(FILTERED(logits, Filter(np.int32(top_k), np.float32(top_p))))
    assert ((found == logits) | (found == -jnp.inf)).all()
    return np.flatnonzero(np.isfinite(found[0])).tolist()


def test_top_k_keeps_ties_and_top_p_the_token_that_crosses_it():
    p = [0.1, 0.4, 0.1, 0.25, 0.15]
    assert kept_tokens(p, 1, 1.0) == [1]
    assert kept_tokens(p, 4, 1.0) == [0, 1, 2, 3, 4]  # the fourth is a tie
    assert kept_tokens(p, 3, 1.0) == [1, 3, 4]
    assert kept_tokens(p, 5, 0.39) == [1]
    assert kept_tokens(p, 5, 0.41) == [1, 3]
    assert kept_tokens(p, 5, 0.66) == [1, 3, 4]
    assert kept_tokens(p, 5, 1e-30) == [1]
    assert kept_tokens([1e-12, 1.0, 1e-12, 1e-12, 1e-12], 5, 1.0) == [
        0,
        1,
        2,
        3,
        4,
    ]  # 1 keeps all, whatever the rounding
    assert kept_tokens(p, 2, 0.6) == [1]  # of the two kept, 0.4 / 0.65 is already beyond 0.6


def test_sizes_come_in_few_steps_of_at_most_a_half():
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5, 7, 9, 13, 17)] == [1, 2, 3, 4, 6, 8, 12, 16, 24]
    assert [bucket(n, 32) for n in (0, 1, 32, 33, 65, 97, 129)] == [32, 32, 32, 64, 96, 128, 192]
    assert all(n <= bucket(n, 1) <= 1.5 * n for n in range(1, 999))
    assert len({bucket(n, 4) for n in range(1, 4097)}) == 20


def test_ragged_rows_are_checked():
    rows = ragged(np.arange(6).reshape(2, 3), [3, 1], 6, "row")
    assert [row.tolist() for row in rows] == [[0, 1, 2], [3]]
    for tokens, lengths, said in [
        ([[1], []], None, "row 1: length 0 of 0 tokens; it needs at least one"),
        ([[1, 2]], [3], "row 0: length 3 of 2 tokens"),
        ([[1, 2]], [1, 1], "there are 2 lengths for 1 rows"),
        ([1, 2], None, "row 0: found 1, expected a list of token ids"),
        ([["a"]], None, r"row 0: found \['a'\], expected a list of token ids"),
        ([[1.0]], None, "expected a list of token ids"),
        ([[0], [5, 6]], None, "row 1: token 6 is outside the vocabulary of 6"),
        ([[-1]], None, "row 0: token -1 is outside the vocabulary of 6"),
    ]:
        with pytest.raises(UserError, match=said):
            ragged(tokens, lengths, 6, "row")
