"""Meshes: those that divide, what speaks against the others, their order, and what to change where none fits."""

from pathlib import Path

import jax
import pytest

from jaxgpt.config.load import load
from jaxgpt.config.planned import Planned
from jaxgpt.errors import UserError
from jaxgpt.mesh import AXES, check_model
from jaxgpt.plan.chips import CHIPS, parse_target
from jaxgpt.plan.estimate import estimate
from jaxgpt.plan.meshes import advice, layouts, on_torus, problems, shapes
from jaxgpt.plan.weights import Mesh
from jaxgpt.plan.work import work
from jaxgpt.runs import STAGES

CONFIGS = Path(__file__).parents[2] / "configs"
RL = ("grpo", "rloo", "rejection")


def config(*words: str, name: str = "meadow"):
    return load(CONFIGS / f"{name}.yaml", words).config


def test_every_factoring_is_a_shape():
    assert len(list(shapes(8))) == 20 and len(set(shapes(8))) == 20
    assert all(mesh.devices == 64 for mesh in shapes(64))


@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (1, 1, 8, 1), (1, 1, 1, 8), (1, 2, 2, 2), (8, 1, 1, 1)])
def test_dimensions_that_do_not_divide_are_those_of_the_mesh(shape):
    found = config("model.width=132", "model.vocab=1028", "pretrain.batch=32", "pretrain.context=128")
    ours = problems(work(found, "pretrain"), Mesh(*shape), parse_target("cpux8"))
    try:
        check_model(jax.make_mesh(shape, AXES), found.model, 1028)
        theirs = []
    except UserError as error:
        theirs = str(error).splitlines()
    theirs = [line for line in theirs if "kv_heads" not in line]  # as many as there are heads
    assert [line.split(" ")[0] for line in ours] == [line.split(" ")[0] for line in theirs]


def test_a_batch_that_does_not_divide_is_named_with_its_setting():
    plan = work(config("pretrain.batch=24", "pretrain.accumulate=2"), "pretrain")
    (told,) = problems(plan, Mesh(fsdp=8), parse_target("h100x8"))
    assert told == "pretrain.batch / pretrain.accumulate 12 does not divide by mesh.data x mesh.fsdp"


def test_data_alone_goes_across_slices():
    plan, target = work(config("pretrain.batch=64"), "pretrain"), parse_target("v5e:4x4", 2)
    assert problems(plan, Mesh(2, 16), target) == []
    assert "mesh.data is no multiple of 2 slices" in problems(plan, Mesh(1, 32), target)[0]


@pytest.mark.parametrize(
    ("target", "mesh", "holds"),
    [
        ("v5p:4x4x8", (1, 32, 1, 4), True),
        ("v5p:4x4x8", (1, 16, 1, 8), True),
        ("v5p:4x4x8", (1, 64, 1, 2), False),
        ("v5p:8x8x16", (1, 128, 1, 8), True),
        ("v6e:8x8", (1, 16, 1, 4), False),
        ("v5e:8x8", (1, 16, 1, 4), True),
        ("h100x64", (1, 32, 1, 2), True),
    ],
)
def test_a_torus_takes_whole_dimensions(target, mesh, holds):
    assert on_torus(Mesh(*mesh), parse_target(target)) is holds


def test_the_roofline_prefers_what_moves_least():
    """65B on 128 chips: all meshes that fit are bound by arithmetic, and the file's is among them."""
    found = config("mesh=null", name="scale/llama-65b")
    target, options = parse_target("v5p:4x4x8"), Planned()
    best = estimate(found, "pretrain", target, options, None, None)
    assert best.fits and best.layouts[0].fits
    moved = [sum(t.compute + t.hbm + t.ici for t in layout.times) for layout in best.layouts if layout.fits]
    assert moved[0] == min(moved) and best.layouts[0].times[0].by == "compute"
    # 1.4e12 tokens at 65.2e9 parameters, 6 N D and a little attention, at 40 % of 128 x 459 TFLOP/s
    flops = 350_000 * 2048 * 2048 * 6 * 65.2e9
    assert best.total == pytest.approx(flops, rel=0.05)
    assert best.seconds == pytest.approx(best.total / (0.4 * 128 * 459e12), rel=1e-6)


def test_cost_is_chips_times_hours_times_price():
    target = parse_target("v5p:4x4x8")
    found = estimate(config(name="scale/llama-65b"), "pretrain", target, Planned(price=2.0), None, None)
    assert found.asked == Mesh(1, 32, 1, 4) and found.chosen.mesh == found.asked
    assert found.cost == pytest.approx(found.seconds / 3600 * 128 * 2.0)


def test_a_mesh_of_another_size_than_the_target_is_told():
    with pytest.raises(UserError, match=r"mesh.data=1, mesh.fsdp=32.*128 devices, and v5p:2x2x2 has 8"):
        estimate(config(name="scale/llama-65b"), "pretrain", parse_target("v5p:2x2x2"), Planned(), None, None)


def test_what_does_not_fit_is_told_what_to_change():
    found = config("mesh=null", "model.remat=none", name="scale/llama-7b")
    target = parse_target("v5e:4x4")
    told = advice(found, "pretrain", target)
    assert told.fits and told.settings == ("model.remat=full", "pretrain.accumulate=32")
    changed = config("mesh=null", *told.settings, name="scale/llama-7b")
    assert any(layout.fits for layout in layouts(changed, "pretrain", target)[0])
    lost = advice(config("mesh=null", name="scale/gpt3-175b"), "pretrain", target)
    assert not lost.fits and lost.least > CHIPS["v5e"].hbm


def test_every_stage_has_a_plan():
    """On every machine, all eight stages of the meadow: the meshes that divide, most of which fit."""
    words = ["dpo.data.path=x", "reward.steps=10", "rejection.batch=4", *(f"{name}.data.path=x" for name in RL)]
    words += [f"{name}.rewards=[{{type: length}}]" for name in RL]
    found = config(*words)
    for target in ("cpu", "v5e:2x2", "v5p:2x2x1", "h100x4"):
        for stage in STAGES:
            one = estimate(found, stage, parse_target(target), Planned(), None, None)
            assert one.fits and one.total > 0 and one.seconds > 0, (target, stage)
            assert one.chosen.memory.peak > sum(one.chosen.memory.resident.values())


def test_what_a_stage_runs_and_how_often():
    found = config("grpo.data.path=x", "grpo.kl.coef=0", "grpo.episodes=64", "grpo.iterations=10", "grpo.batch=32")
    plan = work(found, "grpo")
    assert list(plan.models) == ["policy", "reward"]  # without a KL there is no reference
    assert {p.name: p.times for p in plan.programs} == {"sample": 10, "measure": 10, "score": 10, "update": 20}
    dpo = work(config("dpo.data.path=x", "dpo.steps=7", "dpo.batch=4", "dpo.responses=2"), "dpo")
    assert [(p.name, p.reads[0].rows, p.times) for p in dpo.programs] == [("update", 8, 7), ("reference", 8, 7)]
    judge = load(CONFIGS / "meadow.yaml", ["model=gpt2"]).config.model
    models = work(config(), "ppo", judge=judge).models
    assert models["reward"].config == judge and models["critic"].config == judge and models["policy"].config != judge
