"""The configs that come with jaxgpt load, and run on 1, 2, 4 and 8 devices as they are."""

import math
from pathlib import Path

import jax
import pytest

from jaxgpt.config.load import load
from jaxgpt.mesh import AXES, check_batch, check_model, mesh_shape
from jaxgpt.optim import schedule
from jaxgpt.ready import check_ready
from jaxgpt.runs import STAGES

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"meadow", "gsm8k", "shakespeare"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_config_runs_on_any_machine(path, devices):
    loaded = load(path)
    check_ready("config", loaded)
    config, shape = loaded.config, mesh_shape(loaded.config.mesh, devices)
    mesh = jax.make_mesh(shape, AXES, devices=jax.devices()[: math.prod(shape)])
    check_model(mesh, config.model, 128)
    stages = [(name, section) for name in STAGES if (section := getattr(config, name)) is not None]
    assert stages
    for name, section in stages:
        check_batch(mesh, section.batch // section.accumulate, f"{name}.batch / {name}.accumulate")


def preset(group: str, name: str):
    """A published recipe in the place of a section of the meadow's."""
    path = next(path for path in CONFIGS if path.stem == "meadow")
    words = [f"{group}={name}", f"{group}.data.path=prompts.jsonl", "model.context=32768"]
    return getattr(load(path, words).config, group)


def test_published_recipes_have_their_published_numbers():
    z, s, i, t = (preset("ppo", name) for name in ("ziegler2019", "stiennon2020", "instructgpt", "trl"))
    assert (z.episodes, z.batch, z.epochs, z.temperature) == (512, 512, 4, 0.7)
    assert (z.kl.coef, z.kl.controller, z.kl.target, z.kl.horizon) == (0.15, "adaptive", 6.0, 10_000)
    assert (z.optimizer.eps, z.optimizer.eps_form, z.optimizer.final, z.critic) == (1e-5, "tf", 0.0, "shared")
    assert (z.stop, z.stop_after, z.missing_eos.how, z.missing_eos.value) == (".", 16, "replace", -1.0)
    assert z.whiten_rewards and (z.clip, z.value_clip, z.value_coef, z.lam) == (0.2, 0.2, 0.1, 0.95)
    assert (s.kl.coef, s.kl.controller, s.epochs, s.optimizer.eps, s.whiten_rewards) == (0.05, "fixed", 4, 1e-5, False)
    assert (i.kl.coef, i.episodes, i.batch, i.epochs, i.ema) == (0.02, 512, 64, 1, 0.992)
    assert i.ptx.coef == 27.8 and i.ptx.batch == 8 * i.batch and i.iterations * i.episodes == 256_000
    assert (i.optimizer.b1, i.optimizer.b2, i.value_lr) == (0.9, 0.95, 9e-6)
    assert (t.score_at, t.whiten_variance, t.missing_eos.how, t.missing_eos.value) == (
        "after",
        "unbiased",
        "subtract",
        1,
    )
    assert (t.kl.coef, t.optimizer.lr, t.epochs, t.kl.estimator) == (0.05, 3e-6, 4, "k1")
    g, d, r = (preset("grpo", name) for name in ("grpo", "dapo", "dr-grpo"))
    assert (g.responses, g.kl.coef, g.kl.estimator, g.aggregation) == (64, 0.04, "k3", "seq-mean-token-mean")
    assert (d.clip, d.clip_high, d.aggregation, d.kl.coef) == (0.2, 0.28, "token-mean", 0.0)
    assert d.dynamic_sampling > 0 and (d.overlong_buffer, d.response_length) == (4096, 20480)
    assert (r.std, r.aggregation, r.kl.coef) == ("none", "fixed-norm", 0.0)


def test_the_rate_of_instructgpt_rises_over_ten_rollouts_from_a_tenth():
    i = preset("ppo", "instructgpt")
    rate = schedule(i.optimizer, i.steps, i.updates_per_rollout)
    rates = [float(rate(n * i.updates_per_rollout)) / i.optimizer.lr for n in (0, 4, 9, 100, 499)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0], rel=1e-6)
