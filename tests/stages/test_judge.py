"""What a response is worth: reward models, ensembles and graders of text, added up with their weights."""

import sys
import types

import jax
import numpy as np
import pytest
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.errors import UserError
from jaxgpt.stages import grpo

PROMPTS = {"iterations": 1, "episodes": 8, "responses": 4, "batch": 8}


@pytest.fixture(scope="module")
def mesh(home):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        finished(run, "sft", seed=1, spread=15.0)
        finished(run, "reward", seed=2, spread=5.0)
        other = run.folder.parent / "other"
        finished(type(run)(run.config, other, run.tokenizer, run.mesh, run.vocab), "reward", seed=3, spread=5.0)
    return mesh


def judged(home, mesh, rewards):
    """The episodes of the first rollout, and the score of each by name."""
    c = config(home, grpo={**PROMPTS, "rewards": rewards})
    with jax.set_mesh(mesh):
        source = grpo.stage(open_run(c, mesh), c.grpo).source
        stage = grpo.stage(open_run(c, mesh), c.grpo)
        policy = first_state(stage).params["policy"]
        episodes, scores = source._scored(0, policy)
        return source, jax.device_get(episodes), jax.device_get(scores)


@pytest.fixture
def judge_module():
    """A user's module with judges of text."""
    module = types.ModuleType("my_judges")
    module.letters = lambda record, response: float(len(response))
    module.asked = lambda record, response: float(len(record["prompt"]))
    module.lost = lambda record, response: float("nan")
    sys.modules["my_judges"] = module
    yield
    del sys.modules["my_judges"]


def test_an_ensemble_is_the_mean_or_the_worst_of_its_members(home, mesh):
    folders = ["reward", str(home / "other" / "reward")]
    alone = [{"type": "model", "models": folder} for folder in folders]
    _, _, each = judged(home, mesh, alone)
    assert set(each) == {"model1", "model2", "total"}
    assert np.std(each["model1"] - each["model2"]) > 0.1
    for combine, expected in (
        ("mean", (each["model1"] + each["model2"]) / 2),
        ("worst", np.minimum(each["model1"], each["model2"])),
    ):
        _, _, found = judged(home, mesh, [{"type": "model", "models": folders, "combine": combine}])
        np.testing.assert_allclose(found["total"], expected, atol=1e-6)


def test_the_reward_is_the_weighted_sum_and_text_is_judged_without_its_end_token(home, mesh, judge_module):
    rewards = [
        {"type": "model", "weight": 0.5},
        {"type": "function", "function": "my_judges:letters", "weight": 2.0},
        {"type": "function", "function": "my_judges:asked", "weight": -1.0},
    ]
    source, episodes, found = judged(home, mesh, rewards)
    np.testing.assert_allclose(
        found["total"], 0.5 * found["model"] + 2.0 * found["function1"] - found["function2"], rtol=1e-6
    )
    for i, row in enumerate(episodes["row"]):
        length, ended = int(episodes["mask"][i].sum()), bool(episodes["ended"][i])
        text = source.tokenizer.decode(episodes["tokens"][i, 14 : 14 + length - ended].tolist())
        assert found["function1"][i] == len(text)
        assert found["function2"][i] == len(source.prompts.records[row]["prompt"])


def test_a_grader_that_gives_no_number_is_told_with_the_prompt(home, mesh, judge_module):
    with pytest.raises(UserError, match=r"prompts.jsonl:\d+: .*my_judges:lost gave NaN"):
        judged(home, mesh, [{"type": "function", "function": "my_judges:lost"}])
