"""The published sizes through the TPU compiler: that they fit, what they exchange, and what is never whole on a chip.

UV_PROJECT_ENVIRONMENT=.venv-tpu uv run --extra tpu pytest -m tpu_compile tests/aot            # all, an hour
UV_PROJECT_ENVIRONMENT=.venv-tpu uv run --extra tpu pytest -m "tpu_compile and not slow" tests/aot
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import jax
import pytest
from rich.console import Console

from jaxgpt.aot import Compiled, compile_program, programs, target_devices
from jaxgpt.aot.verb import show
from jaxgpt.config.load import load
from jaxgpt.config.planned import Planned
from jaxgpt.config.schema import Config
from jaxgpt.errors import UserError
from jaxgpt.mesh import make_mesh
from jaxgpt.models.vocabulary import MOST
from jaxgpt.plan.chips import GIB, parse_target
from jaxgpt.plan.estimate import estimate
from jaxgpt.plan.meshes import Layout

pytestmark = [
    pytest.mark.tpu_compile,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"),
]
SCALE = Path(__file__).parents[2] / "configs/scale"
SMALL = ("model.layers=4", "pretrain.accumulate=2")


@pytest.fixture(autouse=True)
def no_tpu(monkeypatch):
    """libtpu looks for no machine; nothing is kept in the tests' cache of programs."""
    monkeypatch.setitem(os.environ, "TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setitem(os.environ, "TPU_WORKER_HOSTNAMES", "localhost")


def compiled(name: str, stage: str, topology: str, slices: int, changes: tuple[str, ...]) -> dict[str, Compiled]:
    """Every program of a stage, its figures printed (-s shows them)."""
    config: Config = load(SCALE / f"{name}.yaml", changes).config
    target = parse_target(topology, slices)
    layout = planned(config, stage, topology, slices)
    mesh = make_mesh(config.mesh, target_devices(topology, slices))
    found, console = {}, Console(width=120, highlight=False)
    console.print(
        f"\n{name} {stage} {topology} x {slices}, mesh {' x '.join(map(str, mesh.shape.values()))}, {changes}"
    )
    with jax.set_mesh(mesh):
        for program in programs(config, stage, mesh):
            found[program.name] = compile_program(program, mesh)
            use = layout.memory.programs[program.name]
            show(console, found[program.name], use.total, target.chip.hbm or 0.0)
    update = found["update"]
    assert not any(one.rematerialized for one in found.values())
    assert any("splash" in kernel for kernel in update.kernels)
    c, section = config.model, getattr(config, stage)
    matrix = c.layers * c.width * c.hidden * 2 // mesh.shape["tensor"]  # of all layers, joined
    assert all(size < matrix for size, shape in update.largest if shape.startswith(f"bf16[{c.layers},{c.width}"))
    if stage == "pretrain":
        tokens = section.batch // section.accumulate // (mesh.shape["data"] * mesh.shape["fsdp"])
        tokens *= section.context // mesh.shape["context"]
        logits = tokens * (c.vocab or 0) // mesh.shape["tensor"] * 4
        if logits > 2 * MOST:
            whole = {f"f32[{tokens},{(c.vocab or 0) // mesh.shape['tensor']}]"}
            assert not whole & {shape for _, shape in update.largest}
    return found


def planned(config: Config, stage: str, topology: str, slices: int) -> Layout:
    """The estimate for the file's mesh."""
    options = Planned(target=topology, slices=slices)
    layout = estimate(config, stage, parse_target(topology, slices), options, None, None).chosen
    assert layout is not None
    return layout


def assert_foretold(
    update: Compiled, name: str, stage: str, topology: str, slices: int, changes: tuple[str, ...]
) -> None:
    """The estimate of the update's bytes is within 15 % of the compiler's."""
    layout = planned(load(SCALE / f"{name}.yaml", changes).config, stage, topology, slices)
    assert layout.memory.programs["update"].total == pytest.approx(update.peak, rel=0.15)


@pytest.mark.parametrize(
    ("name", "topology", "slices", "changes"),
    [
        ("gpt2-xl", "v5e:4x4", 1, ()),
        ("gpt2-xl", "v5e:4x4", 2, ("mesh.data=2",)),
        ("llama-7b", "v5e:8x8", 1, ()),
        ("llama3-8b-128k", "v5p:4x4x4", 1, ()),
    ],
)
def test_four_layers_of_it_fit(name, topology, slices, changes):
    update = compiled(name, "pretrain", topology, slices, (*SMALL, *changes))["update"]
    kinds = {(one.kind, one.axes) for one in update.collectives}
    if name == "llama-7b":  # the residual stream is split over tensor between sub-layers
        assert {("all-gather", ("tensor",)), ("reduce-scatter", ("tensor",))} <= kinds
    if name == "llama3-8b-128k":
        assert ("all-gather", ("context",)) in kinds  # keys and values
    assert (("send", ("data",)) in kinds) == (slices > 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "topology", "slices", "changes"),
    [
        ("gpt2-xl", "v5e:4x4", 1, ()),
        ("gpt2-xl", "v5e:4x4", 2, ("mesh.data=2",)),
        ("llama-7b", "v5e:8x8", 1, ()),
        ("llama-65b", "v5p:4x4x8", 1, ()),
        ("gpt3-175b", "v5p:8x8x8", 1, ()),
        ("palm-540b", "v5p:8x8x16", 1, ()),
        ("llama3-8b-128k", "v5p:4x4x4", 1, ()),
    ],
)
def test_the_published_sizes_fit(name, topology, slices, changes):
    update = compiled(name, "pretrain", topology, slices, changes)["update"]
    assert_foretold(update, name, "pretrain", topology, slices, changes)


@pytest.mark.slow
def test_the_four_models_of_ppo_fit():
    found = compiled("llama-7b", "ppo", "v5e:8x8", 1, ())
    assert list(found) == ["sample", "measure", "score", "update"]
    assert_foretold(found["update"], "llama-7b", "ppo", "v5e:8x8", 1, ())


def test_too_much_is_said_with_what_would_take_less():
    with pytest.raises(UserError, match=r"it does not fit in memory: [\d.]+G of 15.75G a device would be used; what"):
        changes = ("mesh.fsdp=4", "mesh.tensor=1", "model.layers=16", "pretrain.batch=256", "model.remat=none")
        compiled("llama-7b", "pretrain", "v5e:2x2", 1, changes)


def test_a_topology_that_is_not_made_is_told():
    with pytest.raises(UserError, match="target=v5p:3x3x3: the TPU compiler knows no such topology"):
        target_devices("v5p:3x3x3")


def test_bytes_are_of_one_chip():
    found = compiled("gpt2-xl", "pretrain", "v5e:4x4", 1, SMALL)["update"]
    assert found.arguments < GIB < 16 * found.arguments
