"""PPO begins where the SFT model is, and a run cut inside a rollout goes on bit for bit."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console
from small_run import config, finished, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.stages import ppo
from jaxgpt.train.checkpoint import params_meta
from jaxgpt.train.loop import train

KL = {"coef": 0.2, "controller": "adaptive", "horizon": 100}
SETTINGS = {"iterations": 3, "kl": KL, "checkpoint": {"every": 1}, "temperature": 0.7}


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        finished(run, "sft", seed=1, spread=15.0)
        finished(run, "reward", seed=2, spread=5.0)
    return mesh


class Cut(Exception):
    """The power goes."""


def trained(home, mesh, folder, cut=None):
    """Trains to the end, or until the batch of step `cut` is asked for."""
    c = config(home, ppo=SETTINGS)
    with jax.set_mesh(mesh):
        stage = ppo.stage(open_run(c, mesh), c.ppo)
        if cut is not None:
            source = stage.source

            def broken(n, state):
                if n == cut:
                    raise Cut
                return source(n, state)

            stage = dataclasses.replace(stage, source=broken)
        return train(stage, folder, c.ppo, {"kind": "language"}, Console(file=io.StringIO()))


def lines(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in read]


@pytest.fixture(scope="module")
def whole(home, mesh, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(home, mesh, folder)


def test_the_first_update_is_of_the_policy_that_made_the_episodes(whole):
    found = lines(whole[0])
    assert [line["step"] for line in found] == list(range(1, 13))
    first, second = found[0], found[1]
    assert first["objective/kl"] == 0.0  # the policy is the reference
    assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["policy/clipfrac_avg"] == first["val/clipfrac_avg"] == 0.0
    assert first["policy/approxkl_avg"] < 1e-9
    assert second["policy/approxkl_avg"] > 1e-9
    assert [line["step"] for line in found if "objective/kl" in line] == [1, 5, 9]
    assert abs(found[4]["objective/kl"]) > 1e-4
    for line in (found[4], found[8]):  # each rollout is of the policy that is then updated
        assert line["val/ratio"] == pytest.approx(1, abs=1e-5) and line["policy/clipfrac_avg"] == 0.0
    coefficients = [line["objective/kl_coef"] for line in found if "objective/kl_coef" in line]
    assert coefficients[0] == pytest.approx(0.2) and coefficients[1] == pytest.approx(0.2 * (1 - 0.2 * 8 / 100))
    assert len(set(coefficients)) == 3


def test_the_policy_alone_is_handed_on(home, whole, mesh):
    folder, done = whole
    assert done["step"] == 12 and done["tokens"] == 12 * 4 * 20
    with jax.set_mesh(mesh):
        policy = open_run(config(home), mesh).load_language("sft")
    assert done["params"] == sum(leaf.size for leaf in jax.tree.leaves(policy))
    assert done["fingerprint"] != json.loads((home / "small" / "sft" / "done.json").read_text())["fingerprint"]
    assert params_meta(folder / "params")["fingerprint"] == done["fingerprint"]


@pytest.mark.parametrize("cut", [2, 7])
def test_a_run_cut_inside_a_rollout_goes_on_bit_for_bit(home, whole, mesh, tmp_path, cut):
    with pytest.raises(Cut):
        trained(home, mesh, tmp_path, cut)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")) == ([4] if cut > 4 else [])
    done = trained(home, mesh, tmp_path)
    assert lines(tmp_path) == lines(whole[0])
    assert done["fingerprint"] == whole[1]["fingerprint"]


def test_the_learning_rate_falls_by_rollouts(home, mesh):
    c = config(home, ppo={"optimizer": {"lr": 1.0, "warmup": 0.0, "schedule": "linear", "final": 0.0}, "iterations": 3})
    with jax.set_mesh(mesh):
        stage = ppo.stage(open_run(c, mesh), c.ppo)
    assert [float(stage.schedule(np.int32(n))) for n in range(12)] == [1.0] * 4 + [0.5] * 4 + [0.0] * 4


@pytest.mark.parametrize(("value_lr", "rate"), [(None, 1e-3), (0.1, 0.1)])
def test_the_critic_may_have_a_learning_rate_of_its_own(home, mesh, value_lr, rate):
    optimizer = {"lr": 1e-3, "warmup": 0.0, "schedule": "constant", "weight_decay": 0.0}
    c = config(home, ppo={"optimizer": optimizer, "value_lr": value_lr})
    with jax.set_mesh(mesh):
        tx = ppo.stage(open_run(c, mesh), c.ppo).tx
        ones = {"policy": {"w_D": np.ones(3, np.float32)}, "value": {"w_D": np.ones(3, np.float32)}}
        updates, _ = tx.update(ones, tx.init(ones), ones)  # Adam's first step is of the length of its rate
    np.testing.assert_allclose(updates["policy"]["w_D"], -1e-3, rtol=1e-4)
    np.testing.assert_allclose(updates["value"]["w_D"], -rate, rtol=1e-4)


def test_what_does_not_fit_is_told_before_the_first_rollout(home, mesh):
    def refused(match, **changes):
        c = config(home, ppo=changes)
        with jax.set_mesh(mesh), pytest.raises(UserError, match=match):
            ppo.stage(open_run(c, mesh), c.ppo)

    refused(r"prompts.jsonl:\d+: prompt has \d+ tokens, ppo.prompt_length is 6", prompt_length=6)
    speaks = [{"type": "model", "models": "sft"}]
    refused(r"small/sft/params holds a language model; a reward model is needed", rewards=speaks)
    refused(r"small/reward/params holds a reward model; a language model is needed", init="reward")
