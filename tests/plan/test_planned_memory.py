"""Bytes of a device: exact for what lies there, within 15 % of compiled programs in all."""

from pathlib import Path

import jax
import pytest

from jaxgpt.config.load import load
from jaxgpt.mesh import AXES
from jaxgpt.models.heads import language_model
from jaxgpt.optim import adamw
from jaxgpt.plan.chips import CHIPS, GIB
from jaxgpt.plan.memory import Share, has_kernel, memory
from jaxgpt.plan.weights import Mesh
from jaxgpt.plan.work import Model, Rows, work
from jaxgpt.train.state import initial_state

CONFIGS = Path(__file__).parents[2] / "configs"
CPU, V5E, V5P, H100 = (CHIPS[name] for name in ("cpu", "v5e", "v5p", "h100"))


def config(*words: str, name: str = "meadow"):
    return load(CONFIGS / f"{name}.yaml", words).config


COMPILED = [  # by the TPU compiler of jax 0.10.2: rows, tokens, mesh, remat, layers, GiB of arguments and temporaries
    ("gpt2-xl", "v5e", 64, 1024, (1, 16, 1, 1), "full", 48, 1.19, 2.24),
    ("llama-7b", "v5p", 128, 2048, (1, 16, 1, 4), "full", 32, 1.18, 5.07),
    ("llama-7b", "v5p", 128, 2048, (1, 64, 1, 1), "full", 32, 1.18, 5.03),
    ("llama-7b", "v5p", 128, 2048, (1, 16, 1, 4), "dots", 16, 0.61, 8.83),
    ("llama-7b", "v5p", 128, 2048, (1, 16, 1, 4), "none", 16, 0.61, 24.35),
    ("llama-7b", "v5p", 128, 2048, (1, 16, 1, 4), "attention", 16, 0.61, 4.54),
    ("llama-65b", "v5p", 256, 2048, (1, 32, 1, 4), "full", 80, 5.72, 15.15),
    ("llama3-8b", "v5p", 16, 32768, (1, 4, 4, 4), "full", 32, 1.41, 8.49),
    ("palm-8b", "v5p", 128, 2048, (1, 16, 1, 4), "full", 32, 1.54, 6.18),
    ("gpt2-xl", "v5e", 64, 1024, (1, 16, 1, 1), "none", 8, 0.25, 6.22),
]


@pytest.mark.parametrize(
    ("model", "chip", "rows", "tokens", "mesh", "remat", "layers", "arguments", "temporaries"), COMPILED
)
def test_a_training_step_is_near_what_the_tpu_compiler_makes(
    model, chip, rows, tokens, mesh, remat, layers, arguments, temporaries
):
    words = [f"model={model}", f"model.remat={remat}", f"model.layers={layers}", f"model.context={tokens}"]
    words += [f"pretrain.batch={rows}", f"pretrain.context={tokens}"]
    use = memory(config(*words), "pretrain", Mesh(*mesh), CHIPS[chip]).programs["update"]
    assert sum(use.arguments.values()) / GIB == pytest.approx(arguments, rel=0.05)
    assert use.total / GIB == pytest.approx(arguments + temporaries, rel=0.15)


@pytest.mark.parametrize(
    ("stage", "program", "arguments", "temporaries"),
    [
        ("pretrain", "update", 1.18, 5.22),  # of 16 parts
        ("reward", "update", 1.16, 2.43),
        ("ppo", "sample", 0.39, 9.13),
        ("ppo", "measure", 0.98, 1.40),
        ("ppo", "score", 0.19, 0.46),
        ("ppo", "update", 2.34, 2.43),
    ],
)
def test_the_stages_of_seven_billion_are_near_what_the_tpu_compiler_makes(stage, program, arguments, temporaries):
    found = memory(config(name="scale/llama-7b"), stage, Mesh(1, 16, 1, 4), V5E).programs[program]
    assert sum(found.arguments.values()) / GIB == pytest.approx(arguments, rel=0.05)
    assert found.total / GIB == pytest.approx(arguments + temporaries, rel=0.15)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 1, 2), (1, 2, 2, 2)])
def test_parameters_and_optimizer_are_the_arrays_of_a_state(shape):
    found = config("model.vocab=1024")
    with jax.set_mesh(jax.make_mesh(shape, AXES, devices=jax.devices()[: Mesh(*shape).devices])):
        net = language_model(found.model, 1024)
        state = jax.eval_shape(lambda p: initial_state(p, adamw(found.pretrain.optimizer, 100), {}), net.abstract)
    held = sum(
        4 * leaf.sharding.shard_shape(leaf.shape)[0] * leaf.size // leaf.shape[0]
        if len(leaf.shape) == 1
        else 4 * jax.numpy.prod(jax.numpy.array(leaf.sharding.shard_shape(leaf.shape))).item()
        for leaf in jax.tree.leaves(state)
        if leaf.shape
    )
    resident = memory(found, "pretrain", Mesh(*shape), CPU).resident
    assert resident["parameters"] + resident["optimizer"] == held
    assert resident["optimizer"] == 2 * resident["parameters"]


def test_policies_keep_less_and_less():
    def activations(remat: str, chip=V5P) -> float:
        words = ("model=llama-7b", f"model.remat={remat}", "pretrain.context=2048")
        return memory(config(*words), "pretrain", Mesh(1, 4, 1, 4), chip).programs["update"].temporaries["activations"]

    none, dots, attention, full = map(activations, ("none", "dots", "attention", "full"))
    assert none > dots > attention > full
    assert full == 32 * 4 * 2048 / 4 * 4096 * 2  # 32 layers, 4 rows, time split over tensor, 4096 wide, bfloat16
    words = ("model=llama-7b", "model.remat=offload", "pretrain.context=2048")
    assert memory(config(*words), "pretrain", Mesh(1, 4, 1, 4), V5P).host == dots


def test_scores_are_kept_where_there_is_no_kernel():
    c = config("model=llama-7b").model
    one = Mesh()
    assert [has_kernel(c, 2048, one, chip) for chip in (CPU, V5E, H100)] == [False, True, True]
    assert not has_kernel(c, 96, one, V5E)  # no multiple of 128
    assert not has_kernel(c, 2048, Mesh(context=32), V5E)
    assert not has_kernel(config("model=palm-8b").model, 2048, one, H100)  # heads of 256
    share = Share.of(Model("policy", c, 32000), Rows("policy", 4, 96), one, V5E)
    assert share.scores == 4.0 * 4 * 32 * 96 * 96


def test_logits_are_made_in_chunks():
    c = config("model=llama-7b").model
    share = Share.of(Model("policy", c, 32000), Rows("policy", 8, 2048, 2048), Mesh(), V5E)
    assert share.logits == (8, 2048 * 32000 * 4)  # of 16,384 tokens so many as 256 MiB holds
    split = Share.of(Model("policy", c, 32000), Rows("policy", 8, 2048, 2048), Mesh(tensor=4), V5E)
    assert split.logits == (2, 8192 * 8000 * 4)


def test_parts_of_a_batch_take_less_but_for_the_sum_of_gradients():
    whole, parts = (
        memory(config(f"pretrain.accumulate={n}"), "pretrain", Mesh(), CPU).programs["update"].temporaries
        for n in (1, 4)
    )
    assert parts["activations"] == whole["activations"] / 4
    assert parts["gradients"] == 2 * whole["gradients"]


def test_ppo_has_four_models_a_cache_and_three_kinds_of_programs():
    found = memory(config("model.vocab=1024"), "ppo", Mesh(), CPU)
    policy, critic = 4 * 984_192, 4 * (984_192 + 129)
    assert found.resident == {
        "policy parameters": policy,
        "policy optimizer": 2 * policy,
        "critic parameters": critic,
        "critic optimizer": 2 * critic,
        "reference frozen": policy,
        "reward frozen": critic,
    }
    assert list(found.programs) == ["sample", "measure", "score", "update"]
    section = config().ppo
    slots, rows = section.prompt_length + section.response_length, section.episodes
    assert found.programs["sample"].temporaries["KV cache"] == 2 * 4 * rows * slots * 128 * 4


def test_adapters_leave_their_base_without_gradients_and_are_their_own_reference():
    found = config("model.vocab=1024", "ppo.lora={rank: 8, targets: [q, v]}")
    plan, resident = work(found, "ppo"), memory(found, "ppo", Mesh(), CPU).resident
    adapters = 4 * 2 * (128 * 8 + 8 * 128)
    assert "reference frozen" not in resident and "reference" not in plan.models
    assert resident["policy parameters"] == 4 * (984_192 + adapters)
    assert resident["policy optimizer"] == 2 * 4 * adapters


def test_frozen_models_are_half_in_bfloat16():
    full, half = (
        memory(config("model.vocab=1024", f"ppo.frozen_dtype={t}"), "ppo", Mesh(), CPU).resident["reference frozen"]
        for t in ("float32", "bfloat16")
    )
    assert full == 4 * 984_192
    assert half == pytest.approx(full / 2, rel=0.01)  # all but vectors
