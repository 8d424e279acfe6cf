import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P

from jaxgpt.config.schema import OptimizerConfig
from jaxgpt.optim import adamw, averaged, by_part, decayed, schedule


def rates(steps: int, per: int = 1, **settings) -> np.ndarray:
    rate = schedule(OptimizerConfig(lr=2.0, **settings), steps, per)
    with jax.numpy_dtype_promotion("strict"):
        return np.asarray(jax.vmap(rate)(jnp.arange(steps, dtype=jnp.int32)))


# --- schedules ------------------------------------------------------------------------------------------------------
def test_linear_schedule():
    got = rates(9, schedule="linear", warmup=0.45, final=0.2)
    np.testing.assert_allclose(got, [0.5, 1.0, 1.5, 2.0, 1.68, 1.36, 1.04, 0.72, 0.4], rtol=1e-6)


def test_cosine_schedule():
    got = rates(101, schedule="cosine", warmup=0.0, final=0.1)
    want = 2.0 * (0.1 + 0.9 * 0.5 * (1.0 + np.cos(np.pi * np.arange(101) / 100)))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got[0] == 2.0
    np.testing.assert_allclose(got[-1], 0.2, rtol=1e-6)


def test_constant_schedule_and_what_comes_after_the_end():
    np.testing.assert_allclose(rates(4, schedule="constant", warmup=0.5), [1.0, 2.0, 2.0, 2.0], rtol=1e-6)
    rate = schedule(OptimizerConfig(lr=1.0, final=0.25), 10)
    np.testing.assert_allclose([rate(9), rate(10), rate(10_000)], 0.25, rtol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 300])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 1.0])
def test_every_schedule_rises_to_its_peak_once_then_falls_and_starts_above_zero(kind, steps, warmup):
    got = rates(steps, schedule=kind, warmup=warmup, final=0.1)
    top = max(round(warmup * steps) - 1, 0)
    assert got[0] > 0.0
    np.testing.assert_allclose(got[top], 2.0, rtol=1e-6)
    assert np.all(np.diff(got[: top + 1]) > 0.0)
    assert np.all(np.diff(got[top:]) <= 0.0)
    if top < steps - 1 and kind != "constant":
        np.testing.assert_allclose(got[-1], 0.2, rtol=1e-5)


def test_the_rate_falls_per_rollout_and_not_per_minibatch():
    got = rates(12, per=3, schedule="linear", warmup=0.0, final=0.0)
    np.testing.assert_allclose(got, np.repeat(2.0 * np.array([1.0, 2 / 3, 1 / 3, 0.0]), 3), rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(got[::3], rates(4, schedule="linear", warmup=0.0, final=0.0))


# --- AdamW ----------------------------------------------------------------------------------------------------------
PARAMS = {"blocks": {"up_DF": np.full((2, 3), 0.5), "attention_scale_D": np.ones(2)}, "bias": np.ones(())}


def test_decay_is_told_by_the_leaf_name():
    matrices = {"up_DF", "embed_VD", "head_D", "scale_of_keys_D"}
    vectors = {"scale_D", "bias_HK", "norm_scale_ND", "qkv_bias_NHK", "bias", "scale", "head_bias"}
    leaves = decayed({"a": {"b": dict.fromkeys(matrices | vectors, 0.0)}})["a"]["b"]
    assert {name for name, yes in leaves.items() if yes} == matrices


def adamw_by_hand(c: OptimizerConfig, params, gradients, decay):
    """The formula of arXiv 1711.05101 with global-norm clipping, on lists of float64 arrays."""
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    rate = schedule(c, len(gradients))
    for n, grads in enumerate(gradients):
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        grads = [g * min(1.0, c.clip / norm) if c.clip else g for g in grads]
        m = [c.b1 * a + (1 - c.b1) * g for a, g in zip(m, grads, strict=True)]
        v = [c.b2 * a + (1 - c.b2) * g**2 for a, g in zip(v, grads, strict=True)]
        direction = [
            (a / (1 - c.b1 ** (n + 1))) / (np.sqrt(b / (1 - c.b2 ** (n + 1))) + c.eps) + c.weight_decay * d * p
            for a, b, p, d in zip(m, v, params, decay, strict=True)
        ]
        params = [p - float(rate(n)) * u for p, u in zip(params, direction, strict=True)]
    return params


@pytest.mark.parametrize("clip", [1.0, None])
def test_adamw(clip):
    config = OptimizerConfig(lr=0.05, clip=clip, weight_decay=0.3, eps=1e-3, warmup=0.2)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    leaves, tree = jax.tree.flatten(PARAMS)
    rng = np.random.default_rng(0)
    gradients = [[rng.normal(size=x.shape).astype(np.float32) for x in leaves] for _ in range(10)]
    decay = jax.tree.leaves(decayed(PARAMS))
    tx = adamw(config, 10)
    update, opt = jax.jit(tx.update), jax.jit(tx.init)(params)
    for grads in gradients:
        updates, opt = update(jax.tree.unflatten(tree, grads), opt, params)
        params = optax.apply_updates(params, updates)
    want = adamw_by_hand(config, leaves, [[g.astype(np.float64) for g in gs] for gs in gradients], decay)
    for a, b in zip(jax.tree.leaves(params), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def test_scales_and_biases_are_not_decayed():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)
    tx = adamw(OptimizerConfig(lr=0.5, weight_decay=0.1, schedule="constant", warmup=0.0), 1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["blocks"]["up_DF"], -0.5 * 0.1 * 0.5, rtol=1e-6)
    assert not updates["blocks"]["attention_scale_D"].any()
    assert updates["bias"] == 0.0


def test_each_part_has_its_own_rate_clip_and_moments():
    policy, value = OptimizerConfig(lr=1e-2), OptimizerConfig(lr=3e-2, clip=0.1, schedule="linear")
    params = {"policy": {"up_DF": jnp.ones((2, 2))}, "value": {"head": {"bias": jnp.ones(2)}}}
    grads = {"policy": {"up_DF": jnp.full((2, 2), 0.1)}, "value": {"head": {"bias": jnp.full(2, 5.0)}}}
    whole = by_part({"policy": adamw(policy, 4), "value": adamw(value, 4)})
    opt, parts = whole.init(params), {"policy": adamw(policy, 4), "value": adamw(value, 4)}
    alone = {name: tx.init(params[name]) for name, tx in parts.items()}
    for _ in range(3):
        updates, opt = jax.jit(whole.update)(grads, opt, params)
        for name, tx in parts.items():
            want, alone[name] = tx.update(grads[name], alone[name], params[name])
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates[name], want)
    with pytest.raises(ValueError, match="critic"):
        whole.init({"policy": params["policy"], "critic": params["value"]})


# --- devices --------------------------------------------------------------------------------------------------------
def test_moments_and_updates_keep_the_shardings_of_the_parameters(mesh222):
    specs = {"policy": {"up_DF": P("fsdp", "tensor"), "scale_D": P(None)}, "value": {"head_D": P("fsdp")}}
    rng = np.random.default_rng(0)
    params, grads = (
        {"policy": {"up_DF": rng.normal(size=(8, 4)), "scale_D": np.ones(8)}, "value": {"head_D": rng.normal(size=8)}}
        for _ in range(2)
    )
    params, grads = jax.tree.map(np.float32, (params, grads))
    config = OptimizerConfig(clip=0.5)
    tx = by_part({"policy": adamw(config, 10), "value": adamw(config, 10, per=2)})
    want, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params)
    with jax.set_mesh(mesh222):
        params, grads = jax.tree.map(jax.device_put, (params, grads), (specs, specs))
        opt = jax.jit(tx.init)(params)
        got, after = jax.jit(tx.update)(grads, opt, params)
        got_specs, opt_specs, after_specs = jax.tree.map(lambda x: x.sharding.spec, (got, opt, after))
    assert got_specs == specs
    assert after_specs == opt_specs
    for name in specs:
        assert optax.tree.get(opt_specs.inner_states[name], "mu")[name] == specs[name]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


# --- forms of Adam, averages -----------------------------------------------------------------------------------------
def adam_by_hand(gradients: np.ndarray, eps: float, form: str) -> list[float]:
    """Steps of a rate of 1: torch's form, or TensorFlow's, in float64."""
    m = v = 0.0
    steps = []
    for t, g in enumerate(gradients.astype(np.float64), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        if form == "tf":
            steps.append(-np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + eps))
        else:
            steps.append(-(m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + eps))
    return steps


@pytest.mark.parametrize("form", ["optax", "tf"])
def test_adams_eps_stands_where_its_form_says(form):
    plain = {"lr": 1.0, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0, "clip": None}
    c = OptimizerConfig(**plain, b1=0.9, b2=0.999, eps=1e-5, eps_form=form)
    tx, params = adamw(c, 5), {"w_D": jnp.zeros(1)}
    state, gradients = tx.init(params), np.array([1e-4, -2e-4, 3e-5, 1e-4, 5e-4], np.float32)
    found = []
    for g in gradients:
        updates, state = tx.update({"w_D": jnp.array([g])}, state, params)
        found.append(float(updates["w_D"][0]))
    np.testing.assert_allclose(found, adam_by_hand(gradients, 1e-5, form), rtol=3e-5)


@pytest.mark.parametrize(("form", "moved"), [("optax", 9.09e-6), ("tf", 2.40e-6)])
def test_the_first_step_of_tensorflows_form_is_3_8_times_smaller_at_small_gradients(form, moved):
    """eps 1e-5 and a gradient of 1e-4 at a rate of 1e-5."""
    c = OptimizerConfig(lr=1e-5, eps=1e-5, eps_form=form, b2=0.999, warmup=0.0, weight_decay=0.0, clip=None)
    tx, params = adamw(c, 10), {"w_D": jnp.zeros(1)}
    updates, _ = tx.update({"w_D": jnp.full(1, 1e-4)}, tx.init(params), params)
    np.testing.assert_allclose(updates["w_D"], -moved, rtol=2e-3)


def test_the_rate_may_be_zero_at_first():
    c = OptimizerConfig(lr=1.0, schedule="constant", warmup=0.0, weight_decay=0.5)
    tx, params = adamw(c, 4, idle=2), {"w_D": jnp.ones(1)}
    state, sizes = tx.init(params), []
    for _ in range(4):
        updates, state = tx.update({"w_D": jnp.ones(1)}, state, params)
        sizes.append(float(jnp.abs(updates["w_D"][0])))
    assert sizes[:2] == [0.0, 0.0] and min(sizes[2:]) > 0.5


def test_an_average_follows_the_parameters():
    tx, params = averaged(optax.sgd(1.0), 0.75), {"w_D": jnp.zeros(1)}
    state, expected = tx.init(params), 0.0
    for g in (1.0, -3.0, 0.5):
        updates, state = tx.update({"w_D": jnp.array([g])}, state, params)
        params = optax.apply_updates(params, updates)
        expected = 0.75 * expected + 0.25 * float(params["w_D"][0])
        assert float(state.average["w_D"][0]) == pytest.approx(expected, rel=1e-6)
