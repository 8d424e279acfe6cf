"""Fine-tuning begins at the base model and counts what the assistant says and its end, nothing else."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import VOCAB, config, finished, first_state, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.stages import sft
from jaxgpt.train.state import fingerprint
from jaxgpt.train.step import make_step


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        finished(open_run(config(home), mesh), "pretrain", seed=0)
    return mesh


def made(home, mesh, **changes):
    c = config(home, **changes)
    return sft.stage(open_run(c, mesh), c.sft)


def test_the_loss_begins_at_that_of_a_guess_and_falls(home, mesh):
    with jax.set_mesh(mesh):
        stage = made(home, mesh)
        state = first_state(stage)
        before = stage.evaluate(state.params)["nll"]
        step, losses = make_step(stage.loss, stage.tx, stage.schedule), []
        for n in range(stage.steps):
            state, report = step(state, stage.source(n, state).batch, {})
            losses.append(float(report["loss"]))
        assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)
        assert losses[-1] < losses[0] - 1.0 and stage.evaluate(state.params)["nll"] < before - 1.0


def test_it_begins_with_the_parameters_of_its_parent(home, mesh):
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        mark = finished(run, "pretrain", seed=0)
        assert fingerprint(made(home, mesh).init()) == mark
        assert fingerprint(made(home, mesh, sft={"init": "random"}).init()) != mark
        with pytest.raises(UserError, match=r"init=pretrian: no finished stage there. Did you mean 'pretrain'"):
            made(home, mesh, sft={"init": "pretrian"}).init()


def test_only_what_the_assistant_says_counts(home, mesh):
    with jax.set_mesh(mesh):
        stage, tokenizer = made(home, mesh), open_run(config(home), mesh).tokenizer
        state = first_state(stage)
        batch = stage.source(0, state).batch
        tokens, mask = np.asarray(batch["targets"]), np.asarray(batch["mask"]) > 0
        for row in range(len(tokens)):
            said = [text for text in tokenizer.decode_visible(tokens[row][mask[row]]).split("</s>") if text]
            assert said and all(text == "ok" or text.startswith("saw a ") for text in said)
        loss = jax.jit(lambda params, batch: stage.loss(params, batch)[0].mean)
        other = {**batch, "targets": jnp.where(batch["mask"] > 0, batch["targets"], 5)}
        assert float(loss(state.params, batch)) == float(loss(state.params, other))
        assert float(loss(state.params, {**batch, "mask": jnp.ones_like(batch["mask"])})) != float(
            loss(state.params, batch)
        )


def test_dropout_is_drawn_for_each_step_and_row_and_not_for_each_part(home, mesh):
    with jax.set_mesh(mesh):
        stage = made(home, mesh, sft={"dropout": 0.3})
        state = first_state(stage)
        batches = [stage.source(n, state).batch for n in range(4)]
        seeds = np.concatenate([np.asarray(batch["seeds"]) for batch in batches])
        assert seeds.dtype == np.uint32 and len(set(seeds.tolist())) == 4 * 8
        again = made(home, mesh, sft={"dropout": 0.3}).source(2, state).batch
        assert np.array_equal(again["seeds"], batches[2]["seeds"])
        reseeded = {**batches[0], "seeds": batches[1]["seeds"]}
        one, parts = (make_step(stage.loss, stage.tx, stage.schedule, accumulate) for accumulate in (1, 4))
        first, cut, other = (
            float(step(first_state(stage), batch, {})[1]["loss"])
            for step, batch in ((one, batches[0]), (parts, batches[0]), (one, reseeded))
        )
        assert cut == pytest.approx(first, rel=1e-6) and abs(other - first) > 1e-5
        plain = made(home, mesh)
        assert stage.evaluate(state.params) == plain.evaluate(state.params)  # measured without dropout
