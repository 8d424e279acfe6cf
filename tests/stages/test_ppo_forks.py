"""The choices of published PPO recipes: critic, pretraining rows, averages, early stops, where responses end."""

import dataclasses
import io
import json

import jax
import numpy as np
import optax
import pytest
from rich.console import Console
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.models.heads import language_model
from jaxgpt.models.net import joined
from jaxgpt.optim import average_of
from jaxgpt.stages import ppo
from jaxgpt.stages.pretrain import language_loss
from jaxgpt.train.checkpoint import load_params
from jaxgpt.train.loop import train
from jaxgpt.train.step import make_step


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        finished(run, "sft", seed=1, spread=15.0)
        finished(run, "reward", seed=2, spread=5.0)
    return mesh


def made(home, mesh, **changes):
    c = config(home, ppo=changes)
    return c, ppo.stage(open_run(c, mesh), c.ppo)


def gradient(stage, state, batch):
    """Of the sum of the loss's means, as the step takes it."""

    def total(params):
        terms, _ = stage.loss(params, batch)
        return sum(term.mean for term in terms)

    return jax.device_get(jax.jit(jax.grad(total))(state.params))


def close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_the_gradient_of_ppo_ptx_is_that_of_ppo_and_27_8_times_that_of_the_text(home, mesh):
    with jax.set_mesh(mesh):
        _, plain = made(home, mesh)
        _, both = made(home, mesh, ptx={"coef": 27.8, "batch": 8, "context": 24})
        state = first_state(both)
        drawn = both.source(0, state)
        alone = {name: x for name, x in drawn.batch.items() if name != "ptx"}
        whole, policy = gradient(both, state, drawn.batch), gradient(plain, state, alone)
        text_loss = language_loss(both.source.actors.policy)
        text = jax.jit(jax.grad(lambda params: text_loss(params, drawn.batch["ptx"])[0].mean))
        text = jax.device_get(text(state.params["policy"]))
        expected = jax.tree.map(lambda p, t: p + 27.8 * t, policy["policy"], text)
        apart = jax.tree.map(lambda a, b: a - b, whole["policy"], expected)
        assert float(optax.tree.norm(apart) / optax.tree.norm(expected)) < 1e-5
        close(whole["value"], policy["value"], rtol=1e-5, atol=1e-7)
        later, again = both.source(1, state).batch["ptx"], both.source(1, state).batch["ptx"]
        assert np.array_equal(later["tokens"], again["tokens"])  # the text is a function of the step: it resumes
        assert not np.array_equal(later["tokens"], drawn.batch["ptx"]["tokens"])


def test_the_update_of_ppo_ptx_does_not_depend_on_how_it_is_cut(home, mesh):
    found = []
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh, ptx={"coef": 2.0, "batch": 8, "context": 24})
        batch = stage.source(0, first_state(stage)).batch
        for accumulate in (1, 2, 4):
            step = make_step(stage.loss, stage.tx, stage.schedule, accumulate)
            state, report = step(first_state(stage), batch, {})
            found.append((jax.device_get(report), jax.device_get(state.params)))
    for report, params in found[1:]:
        close(report, found[0][0], rtol=1e-4, atol=1e-5)
        close(params, found[0][1], rtol=1e-2, atol=2e-4)


def test_a_shared_critic_is_a_head_on_the_policys_trunk(home, mesh):
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh, critic="shared")
        state = first_state(stage)
        assert {name: leaf.shape for name, leaf in state.params["value"].items()} == {"head_D": (16,), "bias": ()}
        drawn = stage.source(0, state)
        assert np.all(np.asarray(drawn.batch["values"]) == 0.0)
        moved = jax.tree.map(lambda x: x + 0.1, state.params["value"])
        other = gradient(stage, state.replace(params={**state.params, "value": moved}), drawn.batch)
        _, apart = made(home, mesh, critic="separate", value_coef=0.0)
        assert np.abs(other["value"]["head_D"]).max() > 1e-4
        still = gradient(apart, first_state(apart), apart.source(0, first_state(apart)).batch)
        assert all(np.all(leaf == 0.0) for leaf in jax.tree.leaves(still["value"]))


def test_without_a_reward_model_the_critic_begins_on_the_policys_trunk_and_says_zero(home, mesh):
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh, rewards=[{"type": "length", "target": 2}])
        state = first_state(stage)
        close(jax.device_get(state.params["value"]["backbone"]), jax.device_get(state.params["policy"]["backbone"]))
        drawn = stage.source(0, state)
        assert np.all(np.asarray(drawn.batch["values"]) == 0.0)
        assert float(drawn.metrics["objective/scores"]) <= 0.0


def test_the_critic_is_trained_alone_at_first(home, mesh):
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh, critic_warmup=1)
        step, state = make_step(stage.loss, stage.tx, stage.schedule), first_state(stage)
        start = jax.device_get(state.params)
        for n in range(4):
            drawn = stage.source(n, state)
            state, _ = step(state.replace(extras=drawn.extras), drawn.batch, {})
        close(jax.device_get(state.params["policy"]), start["policy"], rtol=0, atol=0)
        assert np.abs(np.asarray(state.params["value"]["head_D"]) - start["value"]["head_D"]).max() > 1e-3
        drawn = stage.source(4, state)
        state, _ = step(state.replace(extras=drawn.extras), drawn.batch, {})
        moved = np.asarray(state.params["policy"]["backbone"]["embed_VD"]) - start["policy"]["backbone"]["embed_VD"]
        assert np.abs(moved).max() > 1e-4


def test_the_average_of_the_policy_is_handed_on(home, mesh):
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh, ema=0.9)
        step, state = make_step(stage.loss, stage.tx, stage.schedule), first_state(stage)
        average = jax.device_get(state.params["policy"])
        for n in range(3):
            drawn = stage.source(n, state)
            state, _ = step(state.replace(extras=drawn.extras), drawn.batch, {})
            average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, jax.device_get(state.params["policy"]))
        close(jax.device_get(stage.finish(state)), average, rtol=1e-5, atol=1e-6)
        assert stage.finish(state) is average_of(state.opt, "policy")


def test_a_policy_that_goes_too_far_is_left_alone_until_the_next_rollout(home, mesh):
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh, stop_kl=1e-9, epochs=3)
        step, state = make_step(stage.loss, stage.tx, stage.schedule), first_state(stage)
        reports, params = [], []
        for n in range(8):
            drawn = stage.source(n, state)
            state, report = step(state.replace(extras=drawn.extras), drawn.batch, {})
            reports.append(jax.device_get(report))
            params.append(jax.device_get(state.params))
    assert [int(report["idle"]) for report in reports] == [0, 0, 1, 2, 3, 4, 4, 4]
    close(params[5], params[1], rtol=0, atol=0)
    assert reports[6]["policy/entropy_avg"] > 0


def test_an_end_counts_from_a_token_on(home, mesh):
    c, stage = None, None
    with jax.set_mesh(mesh):
        c, stage = made(home, mesh, stop="o", stop_after=3)
        batch = jax.device_get(stage.source(0, first_state(stage)).batch)
        stop = open_run(c, mesh).tokenizer.encode("o")
    assert len(stop) == 1
    for tokens, mask in zip(batch["tokens"][:, 14:], batch["mask"], strict=True):
        length = int(mask.sum())
        assert length >= 4 and not np.any(tokens[3 : length - 1] == stop[0])
        assert length == 6 or tokens[length - 1] == stop[0]
    with jax.set_mesh(mesh), pytest.raises(UserError, match=r"ppo.stop: 'no' is 2 tokens"):
        made(home, mesh, stop="no")


def test_frozen_models_may_be_kept_in_half_precision(home, mesh):
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh, frozen_dtype="bfloat16")
        drawn = stage.source(0, first_state(stage))
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(stage.source._frozen["reference"]) if leaf.ndim > 1}
        assert "bfloat16" in dtypes and stage.source.judge.params["model"][0]["head_D"].dtype == "float32"
        assert abs(float(drawn.metrics["objective/kl"])) < 0.5 and drawn.batch["logp"].dtype == "float32"
    assert "memory a device" in stage.notes[1]


def test_samples_of_every_so_many_rollouts_are_kept_to_be_read(home, mesh, tmp_path):
    c = config(home, ppo={"iterations": 3, "samples": 2, "samples_every": 2})
    with jax.set_mesh(mesh):
        train(ppo.stage(open_run(c, mesh), c.ppo), tmp_path, c.ppo, {"kind": "language"}, Console(file=io.StringIO()))
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 1, 9, 9]
    assert set(samples[0]) == {"step", "prompt", "response", "score", "kl", "length", "ended"}
    assert "a " in samples[0]["prompt"] and samples[0]["kl"] == 0.0


def test_policy_and_reference_share_nothing_that_is_trained(home, mesh):
    with jax.set_mesh(mesh):
        _, stage = made(home, mesh)
        state = first_state(stage)
        stage.source(0, state)
        both = joined(stage.source._frozen, state.params)
        assert set(both) == {"policy", "value", "reference"}
        held = {id(leaf) for leaf in jax.tree.leaves(both["reference"])}
        assert not held & {id(leaf) for leaf in jax.tree.leaves(state.params)}


def test_all_that_ppo_remembers_comes_back_after_a_cut(home, mesh, tmp_path):
    """Adaptive KL, pretraining rows, the average and both optimizers, with adapters: a run cut in its second rollout
    ends bit for bit as one that was not."""
    changes = {
        "iterations": 3,
        "kl": {"coef": 0.2, "controller": "adaptive", "horizon": 100},
        "ptx": {"coef": 1.0, "batch": 8, "context": 24},
        "ema": 0.9,
        "lora": {"rank": 2},
        "checkpoint": {"every": 1},
    }

    class Cut(Exception):
        pass

    def run(folder, cut=None):
        c = config(home, ppo=changes)
        stage = ppo.stage(open_run(c, mesh), c.ppo)

        def source(n, state):
            if n == cut:
                raise Cut
            return stage.source(n, state)

        one = dataclasses.replace(stage, source=source)
        return train(one, folder, c.ppo, {"kind": "language"}, Console(file=io.StringIO()))["fingerprint"]

    def lines(folder):
        read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if key != "time"} for line in read]

    with jax.set_mesh(mesh):
        whole = run(tmp_path / "whole")
        with pytest.raises(Cut):
            run(tmp_path / "cut", cut=6)
        assert run(tmp_path / "cut") == whole
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    coefficients = [line["objective/kl_coef"] for line in lines(tmp_path / "cut") if "objective/kl_coef" in line]
    assert len(set(coefficients)) == 3


def test_adapters_alone_are_trained_and_the_policy_is_handed_on_merged(home, mesh, tmp_path):
    c = config(home, ppo={"lora": {"rank": 2, "targets": ["q", "down"]}, "iterations": 1})
    with jax.set_mesh(mesh):
        run = open_run(c, mesh)
        stage = ppo.stage(run, c.ppo)
        state = first_state(stage)
        assert jax.tree.structure(stage.source.frozen()["reference"]) == jax.tree.structure(run.load_language("sft"))
        drawn = stage.source(0, state)
        assert float(drawn.metrics["objective/kl"]) == 0.0  # adapters begin as nothing
        trained = sum(leaf.size for leaf in jax.tree.leaves(state.params["policy"]))
        assert 0 < trained < 0.2 * sum(leaf.size for leaf in jax.tree.leaves(run.load_language("sft")))
        train(stage, tmp_path, c.ppo, run.meta("language"), Console(file=io.StringIO()))
        merged = load_params(tmp_path / "params", language_model(c.model, run.vocab).abstract)
        start = jax.device_get(run.load_language("sft"))
    moved = {
        "/".join(str(key.key) for key in path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: np.any(a != b), merged, start))
        if leaf
    }
    assert moved == {"backbone/blocks/attention/q_DHK", "backbone/blocks/mlp/down_FD"}
    assert (tmp_path / "adapters").is_dir()
