"""A reward model's score is of one response alone, learned from all pairs of a prompt, and ends up normalised."""

import math

import jax
import numpy as np
import pytest
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.models.heads import scalar_model
from jaxgpt.stages import reward
from jaxgpt.train.state import fingerprint, initial_state
from jaxgpt.train.step import make_step


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        finished(open_run(config(home), mesh), "sft", seed=1)
    return mesh


def made(home, mesh, **changes):
    c = config(home, **changes)
    return reward.stage(open_run(c, mesh), c.reward)


@pytest.fixture(scope="module")
def trained(home, mesh):
    """Stage, losses of its steps, last parameters."""
    with jax.set_mesh(mesh):
        stage = made(home, mesh)
        state, losses = first_state(stage), []
        step = make_step(stage.loss, stage.tx, stage.schedule)
        for n in range(stage.steps):
            state, report = step(state, stage.source(n, state).batch, {})
            losses.append({name: float(value) for name, value in report.items()})
    return stage, losses, state.params


@pytest.fixture(scope="module")
def scores(home, mesh):
    """The function from parameters and a ranking batch to scores [B, K]."""
    with jax.set_mesh(mesh):
        net = scalar_model(config(home).model, open_run(config(home), mesh).vocab)
        return jax.jit(lambda params, batch: reward.score_rankings(net.bind(params), batch))


def test_the_loss_begins_at_that_of_a_coin_and_falls(trained, mesh):
    stage, losses, params = trained
    assert losses[0]["loss"] == pytest.approx(math.log(2), abs=0.05)
    assert losses[-1]["loss"] < 0.4 and losses[-1]["accuracy"] > 0.8 and losses[-1]["margin"] > 0
    with jax.set_mesh(mesh):
        figures = stage.evaluate(params)
    assert figures.keys() == {"loss", "accuracy", "margin"} and stage.quality(figures) == figures["accuracy"]


def test_the_backbone_is_the_parents_and_the_head_is_new(home, mesh):
    with jax.set_mesh(mesh):
        run, stage = open_run(config(home), mesh), made(home, mesh)
        parent, params = run.load_language("sft"), stage.init()
        assert fingerprint(params["backbone"]) == fingerprint(parent["backbone"])
        assert params.keys() == {"backbone", "head_D", "bias"} and float(params["bias"]) == 0.0
        assert np.std(params["head_D"]) == pytest.approx(17**-0.5, rel=0.5)
        assert fingerprint(stage.init()) == fingerprint(params)


def test_a_score_does_not_depend_on_padding_or_company(trained, scores, mesh):
    stage, _, params = trained
    with jax.set_mesh(mesh):
        batch = {key: np.asarray(value) for key, value in stage.source(0, first_state(stage)).batch.items()}
        found = np.asarray(scores(params, batch))
        valid = batch["lengths"] > 0
        beyond = np.arange(batch["tokens"].shape[-1]) >= batch["lengths"][..., None]
        garbage = {**batch, "tokens": np.where(beyond, 7, batch["tokens"]).astype(np.int32)}
        np.testing.assert_allclose(np.asarray(scores(params, garbage))[valid], found[valid], atol=1e-6)
        longer = {**batch, "tokens": np.pad(batch["tokens"][..., :28], ((0, 0), (0, 0), (0, 4)))}
        np.testing.assert_allclose(np.asarray(scores(params, longer))[valid], found[valid], atol=1e-6)
        order = np.random.default_rng(0).permutation(len(found))
        shuffled = {key: value[order] for key, value in batch.items()}
        np.testing.assert_allclose(
            np.asarray(scores(params, shuffled))[valid[order]], found[order][valid[order]], atol=1e-6
        )


def test_the_order_of_responses_does_not_matter(trained, mesh):
    stage, _, params = trained
    with jax.set_mesh(mesh):
        batch = stage.source(0, first_state(stage)).batch
        loss = jax.jit(stage.loss)
        turned = {key: value[:, ::-1] for key, value in batch.items()}
        (one, figures), (other, others) = loss(params, batch), loss(params, turned)
        assert float(one.mean) == pytest.approx(float(other.mean), rel=1e-5)
        for name in figures:
            assert float(figures[name].mean) == pytest.approx(float(others[name].mean), rel=1e-4)
        worse = {**batch, "ranks": 10 - batch["ranks"]}
        assert float(loss(params, worse)[1]["accuracy"].mean) == pytest.approx(
            1 - float(figures["accuracy"].mean), abs=1e-6
        )


def test_scores_end_up_with_mean_0_and_deviation_1_in_the_same_order(home, trained, scores, mesh):
    stage, _, params = trained
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        rows = reward.load_rankings(run.paths("{run}/rankings.jsonl"), run.tokenizer, 32, 3)
        batch = {key: np.stack([rows[i][key] for i in range(len(rows))]) for key in rows[0]}
        valid = batch["lengths"] > 0
        before = np.asarray(scores(params, batch))[valid]
        after = np.asarray(scores(stage.finish(initial_state(params, stage.tx, {})), batch))[valid]
        assert np.mean(after) == pytest.approx(0, abs=1e-5) and np.std(after) == pytest.approx(1, rel=1e-5)
        np.testing.assert_allclose(after, (before - before.mean()) / before.std(), atol=1e-5)
        plain = made(home, mesh, reward={"normalize": False})
        assert plain.finish(initial_state(params, plain.tx, {})) is params


def test_prompts_on_both_sides_are_refused(home, mesh):
    shared = home / "small" / "shared.jsonl"
    line = (home / "small" / "rankings.jsonl").read_text().splitlines()[2]
    shared.write_text(line + "\n")
    both = {"path": "{run}/rankings.jsonl", "eval_path": str(shared)}
    with (
        jax.set_mesh(mesh),
        pytest.raises(UserError, match=r"shared.jsonl:1: its prompt is also at .*rankings.jsonl:3"),
    ):
        made(home, mesh, reward={"data": both})
