"""One step for all losses: how the batch and the devices are cut changes nothing, and a bad batch changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy import ROWS, TX, init, loss, mesh_of, rows, state_on

from jaxgpt.config.schema import AttentionConfig, MlpConfig, ModelConfig, OptimizerConfig, PpoConfig, RewardConfig
from jaxgpt.losses import Ratio
from jaxgpt.mesh import put_batch
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.optim import adamw, by_part, schedule
from jaxgpt.stages.episodes import Actors, Critic
from jaxgpt.stages.ppo import ppo_loss
from jaxgpt.stages.pretrain import language_loss
from jaxgpt.stages.reward import ranking_loss
from jaxgpt.train.checkpoint import abstract
from jaxgpt.train.state import initial_state
from jaxgpt.train.step import make_step

MODEL = ModelConfig(width=16, layers=1, context=8, attention=AttentionConfig(heads=2), mlp=MlpConfig(width=16))
VOCAB, B, T, K = 32, 16, 8, 2
PPO = PpoConfig(prompt_length=3, response_length=5, batch=B, episodes=B)
# Adam divides by the size of the gradient; a large eps keeps rounding noise in vanishing ones from growing.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3)


def batch_of(name: str, seed: int) -> dict[str, np.ndarray]:
    """Unequal masks: every fourth row has none, so that a part of four counts nothing at all."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    mask = (rng.random((B, T)) < 0.5).astype(np.float32)
    mask[::4] = 0
    ones = np.ones((B, T), np.int32)
    if name == "next_token":
        positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
        return {"tokens": tokens, "targets": tokens[:, ::-1], "segments": ones, "positions": positions, "mask": mask}
    if name == "ranking":
        lengths = rng.integers(1, T + 1, (B, K)).astype(np.int32)
        lengths[::4, 1] = 0
        return {
            "tokens": rng.integers(0, VOCAB, (B, K, T)).astype(np.int32),
            "lengths": lengths,
            "ranks": np.tile(np.array([2, 1], np.int32), (B, 1)),
            "margin": np.zeros(B, np.float32),
        }
    n = PPO.response_length
    drawn = {key: rng.standard_normal((B, n)).astype(np.float32) for key in ("advantages", "values", "returns")}
    old_logp = -3.4 + 0.1 * rng.standard_normal((B, n)).astype(np.float32)
    return {
        "tokens": tokens,
        "segments": ones,
        "mask": mask[:, :n],
        "logp": old_logp,
        "value_mask": mask[:, :n],
        **drawn,
    }


def drawn(shapes):
    """Parameters that are the same on every mesh, without compiling an initializer on each."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        value = 0.2 * rng.standard_normal(leaf.shape) + ("scale" in jax.tree_util.keystr(path))
        return jax.device_put(value.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract(shapes))


def trained(name: str, shape: tuple[int, ...], accumulate: int):
    """Metrics of three updates, and the parameters behind them."""
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        lm, scalar = language_model(MODEL, VOCAB), scalar_model(MODEL, VOCAB)
        one = adamw(OPTIMIZER, 3)
        actors = Actors(lm, lm, Critic(scalar), PPO.prompt_length, PPO.temperature)
        nets, function, tx = {
            "next_token": (lm, language_loss(lm), one),
            "ranking": (scalar, ranking_loss(RewardConfig(), scalar), one),
            "ppo": ({"policy": lm, "value": scalar}, ppo_loss(PPO, actors), by_part({"policy": one, "value": one})),
        }[name]
        shapes = {part: net.abstract for part, net in nets.items()} if isinstance(nets, dict) else nets.abstract
        state = jax.jit(lambda params: initial_state(params, tx, {}))(drawn(shapes))
        step = make_step(function, tx, schedule(OPTIMIZER, 3), accumulate)
        reports = []
        for n in range(3):
            batch = put_batch(batch_of(name, n), mesh)
            with jax.transfer_guard("disallow"):
                state, report = step(state, batch, {})
            reports.append(jax.device_get(report))
        assert step._cache_size() == 1
        return reports, jax.device_get(state.params)


@pytest.fixture(scope="module", params=["next_token", "ranking", "ppo"])
def alone(request):
    """A loss's name, and what one device makes of it."""
    return request.param, *trained(request.param, (1, 1, 1), 1)


def assert_agree(alone, shape: tuple[int, ...], accumulate: int) -> None:
    name, reports, params = alone
    others, found = trained(name, shape, accumulate)
    for one, other in zip(reports, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_allclose(other[key], one[key], rtol=1e-5, atol=1e-5, err_msg=f"{key} {shape}")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, params)


def test_cuts_and_meshes_agree(alone):
    _, reports, _ = alone
    assert all(np.isfinite(value) for report in reports for value in report.values())
    assert reports[0]["loss"] != reports[2]["loss"]
    for shape, accumulate in (((2, 2, 2), 2), ((1, 2, 2, 2), 4)):
        assert_agree(alone, shape, accumulate)


EIGHT = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2), (1, 2, 1, 4), (2, 1, 1, 4), (1, 1, 2, 4), (2, 1, 2, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("shape", EIGHT, ids=str)
def test_every_way_to_lay_out_eight_devices_agrees(alone, shape, accumulate):
    if B // accumulate % (shape[0] * shape[1]):
        pytest.skip("a part has fewer rows than devices")
    assert_agree(alone, shape, accumulate)


def test_a_batch_counts_by_its_weights_however_it_is_cut():
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        batch = rows(0) | {"weight": np.array([1, 0, 0, 0, 0, 0, 0, 3], np.float32)}
        params = init()
        guess = np.tanh(batch["x"] @ np.asarray(params["up_DF"])) @ np.asarray(params["down_F"])
        errors = (guess - batch["y"]) ** 2
        for accumulate in (1, 2, 4, 8):
            step = make_step(loss, TX, lambda count: 0.0, accumulate)
            _, report = step(state_on(mesh), put_batch(batch, mesh), {})
            np.testing.assert_allclose(report["loss"], (errors[0] + 3 * errors[7]) / 4, rtol=1e-5)


@pytest.fixture(scope="module")
def toy_step():
    return make_step(loss, TX, lambda count: 0.1 / (1 + count))


def test_a_bad_batch_changes_nothing_and_is_counted(toy_step):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        good, bad = put_batch(rows(0), mesh), put_batch(rows(1) | {"y": np.full(ROWS, np.nan, np.float32)}, mesh)
        state, report = toy_step(state_on(mesh), good, {})
        assert report["lr"] == np.float32(0.1) and report["skipped"] == 0
        before = jax.device_get((state.params, state.opt))
        for n in range(1, 6):  # optax.apply_if_finite(3) would let the fourth through
            state, report = toy_step(state, bad, {})
            assert (int(state.step), int(state.skipped), int(report["skipped"])) == (1 + n, n, n)
            assert not np.isfinite(report["loss"])
            after = jax.device_get((state.params, state.opt))
            assert all(a.tobytes() == b.tobytes() for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
        state, report = toy_step(state, good, {})
        assert report["lr"] == np.float32(0.05) and report["skipped"] == 5  # the second real update
        assert int(state.step) == 7 and int(state.opt[0].count) == 2


def test_an_infinite_gradient_of_a_finite_loss_is_skipped_too():
    def steep(params, batch):
        return Ratio(jnp.sum(jnp.sqrt(params["x"])), jnp.float32(1.0)), {}

    with jax.set_mesh(mesh_of(1, 1, 1)):
        tx = optax.sgd(1.0)
        state = initial_state({"x": jnp.zeros(2)}, tx, {})
        state, report = make_step(steep, tx, lambda count: 1.0)(state, {}, {})
        assert float(report["loss"]) == 0.0 and int(report["skipped"]) == 1
        assert np.all(np.asarray(state.params["x"]) == 0.0)


def test_the_state_given_is_used_up(toy_step):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        old = state_on(mesh)
        new, _ = toy_step(old, put_batch(rows(0), mesh), {})
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves((old.params, old.opt)))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_integers_do_not_slip_into_a_loss():
    def truncating(params, batch):
        reward = jnp.zeros(3, jnp.int32) + jnp.int32(1)
        return Ratio(jnp.sum(params["x"] * reward), jnp.float32(1.0)), {}

    with jax.set_mesh(mesh_of(1, 1, 1)):
        state = initial_state({"x": jnp.ones(3)}, TX, {})
        with pytest.raises(Exception, match="no available implicit dtype promotion path"):
            make_step(truncating, TX, lambda count: 0.0)(state, {}, {})


@pytest.mark.parametrize("accumulate", [1, 4])
def test_clipping_is_of_the_mean_gradient(accumulate):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        tx = optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(1.0))
        old = state_on(mesh, tx=tx)
        before = jax.device_get(old.params)
        batch = rows(0) | {"y": np.full(ROWS, 50, np.float32)}
        new, report = make_step(loss, tx, lambda count: 1.0, accumulate)(old, put_batch(batch, mesh), {})
        moved = jax.tree.map(lambda a, b: a - b, jax.device_get(new.params), before)
        assert float(report["grad_norm"]) > 50
        np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-4)


def test_policy_and_value_have_optimizers_of_their_own():
    def apart(params, batch):
        return Ratio(jnp.sum(params["policy"]["w"]) + 1e6 * jnp.sum(params["value"]["w"]), jnp.float32(1.0)), {}

    config = OptimizerConfig(lr=1e-3, warmup=0.0, weight_decay=0.0)
    critic = config.model_copy(update={"lr": 1e-2})
    with jax.set_mesh(mesh_of(1, 1, 1)):
        tx = by_part({"policy": adamw(config, 4), "value": adamw(critic, 4)})
        params = {"policy": {"w": jnp.zeros(4)}, "value": {"w": jnp.zeros(4)}}
        state, _ = make_step(apart, tx, lambda count: 0.0)(initial_state(params, tx, {}), {}, {})
        np.testing.assert_allclose(state.params["policy"]["w"], -1e-3, rtol=1e-4)
        np.testing.assert_allclose(state.params["value"]["w"], -1e-2, rtol=1e-4)
        clipped = by_part({name: optax.chain(optax.clip_by_global_norm(4.0), optax.sgd(1.0)) for name in params})
        params = {"policy": {"w": jnp.zeros(4)}, "value": {"w": jnp.zeros(4)}}
        state, _ = make_step(apart, clipped, lambda count: 0.0)(initial_state(params, clipped, {}), {}, {})
        np.testing.assert_allclose(state.params["policy"]["w"], -1.0)  # norm 2: the critic's is not counted
        np.testing.assert_allclose(state.params["value"]["w"], -2.0, rtol=1e-6)


def test_extras_pass_through(toy_step):
    mesh = mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        state = dataclasses.replace(state_on(mesh), extras={"kl_coef": jnp.float32(0.3)})
        state, _ = toy_step(state, put_batch(rows(0), mesh), {})
        assert float(state.extras["kl_coef"]) == np.float32(0.3)
