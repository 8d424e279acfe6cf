"""Pretraining begins at the loss of a guess, learns, and is a function of the seed and the step."""

import math
from pathlib import Path

import jax
import numpy as np
import pytest
from small_run import VOCAB, config, first_state, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.stages import pretrain
from jaxgpt.stages.run import vocabulary
from jaxgpt.train.state import fingerprint
from jaxgpt.train.step import make_step


def made(home, mesh, **changes):
    c = config(home, **changes)
    return pretrain.stage(open_run(c, mesh), c.pretrain)


def test_the_loss_begins_at_that_of_a_guess_and_falls(home):
    mesh = mesh_of(2, 1, 1)
    with jax.set_mesh(mesh):
        stage = made(home, mesh)
        state = first_state(stage)
        assert stage.evaluate(state.params)["nll"] == pytest.approx(math.log(VOCAB), abs=0.1)
        step, losses = make_step(stage.loss, stage.tx, stage.schedule), []
        for n in range(stage.steps):
            state, report = step(state, stage.source(n, state).batch, {})
            losses.append(float(report["loss"]))
        assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.1)
        assert losses[-1] < losses[0] - 1.0
        figures = stage.evaluate(state.params)
        assert figures["nll"] < math.log(VOCAB) - 1.0 and stage.quality(figures) == -figures["nll"]
        assert stage.tokens_per_step == 8 * 24


def test_a_batch_is_a_function_of_the_step(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        one, other = made(home, mesh).source, made(home, mesh).source
        in_order = [jax.device_get(one(n, _NO_STATE).batch) for n in range(5)]
        for n in (3, 4, 0):
            found = jax.device_get(other(n, _NO_STATE).batch)
            assert found.keys() == {"tokens", "targets", "mask", "segments", "positions"}
            assert all(np.array_equal(found[key], in_order[n][key]) for key in found)
        assert not np.array_equal(in_order[0]["tokens"], in_order[1]["tokens"])


class _NO_STATE:
    extras = {}  # noqa: RUF012


def test_parameters_are_a_function_of_the_seed(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        c = config(home)
        marks = [
            fingerprint(pretrain.stage(open_run(c.model_copy(update={"seed": seed}), mesh), c.pretrain).init())
            for seed in (0, 0, 1)
        ]
        assert marks[0] == marks[1] != marks[2]


def test_without_held_out_text_there_is_no_evaluation(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        stage = made(home, mesh, data={"val_fraction": 0.0})
        assert stage.evaluate is None


def test_what_does_not_fit_is_told_before_training(home):
    mesh = mesh_of(2, 2, 2)
    with (
        jax.set_mesh(mesh),
        pytest.raises(UserError, match=r"pretrain.batch / pretrain.accumulate: 6 rows do not divide over 4"),
    ):
        made(home, mesh, pretrain={"batch": 12, "accumulate": 2})
    tokenizer = open_run(config(home), mesh_of()).tokenizer
    assert vocabulary(config(home).model, tokenizer) == VOCAB
    with pytest.raises(UserError, match=rf"model.vocab is 8, and the tokenizer has {tokenizer.size} pieces"):
        vocabulary(config(home, model={"vocab": 8}).model, tokenizer)
    told = rf"^given: the model has 8 rows of embeddings, and the tokenizer from other has {tokenizer.size} pieces; exp"
    with pytest.raises(UserError, match=told):
        vocabulary(config(home, model={"vocab": 8}).model, tokenizer, Path("given"), Path("other"))
