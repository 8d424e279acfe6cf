"""The held-out evaluation of an RL stage: the gold score of its responses, against those of the start."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from small_run import config, finished, first_state, make_data, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.models.net import joined
from jaxgpt.stages import grpo, ppo

GOLD = {"data": {"path": "{run}/prompts.jsonl"}, "rewards": [{"type": "length", "target": 2}], "prompts": 11}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = make_data(tmp_path_factory.mktemp("gold"))
    with jax.set_mesh(mesh_of()):
        run = open_run(config(runs), mesh_of())
        for seed, name in enumerate(("sft", "reward"), start=1):
            finished(run, name, seed, spread=5.0)
    return runs


def stage_of(runs, mesh, name="ppo", **changes):
    made = config(runs, **{name: {"gold": GOLD} | changes})
    module = {"ppo": ppo, "grpo": grpo}[name]
    return module.stage(open_run(made, mesh), getattr(made, name))


def measure(runs, shape=(1, 1, 1), **changes):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        stage = stage_of(runs, mesh, **changes)
        return stage.evaluate(joined(stage.frozen(), first_state(stage).params))


@pytest.fixture(scope="module")
def at_first(runs):
    return measure(runs)


def test_the_start_ties_with_itself(at_first):
    assert at_first["gold"] == at_first["gold_start"]
    assert (at_first["win_rate"], at_first["win_rate_error"], at_first["kl"]) == (0.5, 0.0, 0.0)
    assert list(at_first) == [
        "gold", "gold_error", "gold_start", "win_rate", "win_rate_error", "score", "kl", "length", "eos_rate",
    ]  # fmt: skip
    longest = config(runs=".").ppo.response_length
    assert 1.0 <= at_first["length"] <= longest and 0.0 <= at_first["eos_rate"] <= 1.0


def test_the_gold_score_is_what_the_graders_say(runs, at_first):
    """-(length - 2) / 2 over 2 tokens: the mean follows from the lengths, and no response is below 1 token."""
    assert -(at_first["length"] - 2) / 2 - 0.5 <= at_first["gold"] <= 0.0
    twice = measure(runs, gold=GOLD | {"rewards": [{"type": "length", "target": 2, "weight": 2.0}]})
    assert twice["gold"] == pytest.approx(2 * at_first["gold"], rel=1e-6)
    assert twice["gold_error"] == pytest.approx(2 * at_first["gold_error"], rel=1e-6)


def test_a_changed_policy_is_compared_with_the_start(runs, at_first):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        stage = stage_of(runs, mesh)
        params = first_state(stage).params
        changed = {**params, "policy": jax.tree.map(lambda leaf: jax.numpy.sin(7 * leaf), params["policy"])}
        found = stage.evaluate(changed)
        again = stage.evaluate(changed)
    assert found == again  # the same random numbers at every evaluation
    assert found["gold_start"] == at_first["gold"] != found["gold"]
    assert found["kl"] > 0.0 and 0.0 <= found["win_rate"] <= 1.0 and found["win_rate"] != 0.5


def test_rows_that_fill_up_a_chunk_do_not_count(runs):
    """11 prompts in chunks of 8: the last chunk has 5 rows too many."""
    found, shapes = measure(runs), {}
    mesh = mesh_of(2, 2, 1)
    with jax.set_mesh(mesh):
        gold = stage_of(runs, mesh).evaluate
        weights = [chunk["weight"] for chunk in gold._prompts()]
        shapes = [weight.shape for weight in weights]
    assert shapes == [(8,), (8,)] and np.concatenate(weights).sum() == 11
    other = measure(runs, (2, 2, 1))
    assert {key: pytest.approx(value, abs=1e-5) for key, value in found.items()} == other


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_stage_without_reference_reports_no_kl(runs, lora):
    found = measure(runs, name="grpo", kl={"coef": 0.0}, lora=lora)
    assert "kl" not in found and found["win_rate"] == 0.5
    assert "kl" in measure(runs, name="grpo", lora=lora)


def test_records_without_what_the_gold_score_needs_are_named(runs):
    with pytest.raises(UserError, match=r'prompts\.jsonl:1: no key "answer", and ppo\.gold\.rewards\[0\]'):
        measure(runs, gold=GOLD | {"rewards": [{"type": "exact"}]})
