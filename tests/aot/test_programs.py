"""The programs of every stage, traced over shapes alone, are those that training runs."""

from __future__ import annotations

import math
from pathlib import Path

import jax
import pytest

from jaxgpt.aot import compile_program, programs
from jaxgpt.aot.compiled import explained
from jaxgpt.config.load import load
from jaxgpt.errors import UserError
from jaxgpt.mesh import make_mesh

SCALE = Path(__file__).parents[2] / "configs/scale"
SMALL = (
    "model.layers=2", "model.width=32", "model.attention.heads=4", "model.mlp.width=64", "model.vocab=64",
    "mesh.fsdp=4", "mesh.tensor=2", "ppo.prompt_length=8", "ppo.response_length=8", "ppo.episodes=16",
    "ppo.rollout_batch=8", "ppo.batch=8", "sft.context=32", "sft.batch=8", "reward.context=32", "reward.batch=8",
    "pretrain.context=32", "pretrain.batch=16", "pretrain.accumulate=2",
)  # fmt: skip
NAMES = {
    "pretrain": ["update"],
    "sft": ["update"],
    "reward": ["update"],
    "ppo": ["sample", "measure", "score", "update"],
    "dpo": ["reference", "update"],
    "grpo": ["sample", "measure", "update"],
    "rloo": ["sample", "measure", "update"],
    "rejection": ["sample", "measure", "update"],
}
OTHERS = {
    name: f"{name}={{prompt_length: 8, response_length: 8, episodes: 16, responses: 4, batch: 4, "
    "rewards: [{type: length}]}"
    for name in ("grpo", "rloo", "rejection")
} | {"dpo": "dpo={context: 32, batch: 8, lora: {rank: 2}}"}


@pytest.mark.parametrize("stage", NAMES)
def test_every_stage_is_traced_on_a_mesh(stage):
    config = load(SCALE / "llama-7b.yaml", [*SMALL, *([OTHERS[stage]] if stage in OTHERS else [])]).config
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        found = programs(config, stage, mesh)
        assert [program.name for program in found] == NAMES[stage]
        for program in found:
            program.function.lower(*program.arguments)


def test_a_compiled_program_tells_what_it_takes():
    config = load(SCALE / "llama-7b.yaml", SMALL).config
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        (update,) = programs(config, "pretrain", mesh)
        compiled = compile_program(update, mesh)
        leaves = jax.tree.leaves(update.arguments)
        shares = (x.shape if x.sharding is None else x.sharding.shard_shape(x.shape) for x in leaves)
        assert compiled.arguments == pytest.approx(4 * sum(map(math.prod, shares)), rel=0.01)  # all of four bytes
        assert compiled.temporaries > 0 and compiled.seconds > 0 and not compiled.rematerialized
        assert {one.kind for one in compiled.collectives} >= {"all-gather", "all-reduce"}
        gathered = sum(one.count for one in compiled.collectives if one.kind == "all-gather" and one.axes == ("fsdp",))
        assert gathered >= 2 * 2 * 2  # two parts of the batch, two layers, forward and back; some are joined in one


def test_shapes_that_do_not_divide_are_told_before_anything_is_compiled():
    config = load(SCALE / "llama3-8b-128k.yaml", ["mesh.fsdp=1", "mesh.context=8", "pretrain.context=100"]).config
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), pytest.raises(UserError) as error:
        programs(config, "pretrain", mesh)
    assert str(error.value) == (
        "pretrain.context: 100 tokens do not divide into the 16 pieces of mesh.context=8 (two for each device); use "
        "96 or 112"
    )


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used "
            "30.58G of 15.75G hbm. Exceeded hbm capacity by 14.83G.",
            "it does not fit in memory: 30.58G of 15.75G a device would be used; what takes less: a larger mesh.fsdp",
        ),
        ("INTERNAL: RET_CHECK failure\nmore", "INTERNAL: RET_CHECK failure"),
    ],
)
def test_the_compilers_errors_are_said_in_words(message, words):
    assert explained(message).startswith(words) and "\n" not in explained(message)
