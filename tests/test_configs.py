"""The configs that come with jaxgpt load, and run on 1, 2, 4 and 8 devices as they are."""

import math
from pathlib import Path

import jax
import pytest

from jaxgpt.config.load import load
from jaxgpt.mesh import AXES, check_batch, check_model, mesh_shape
from jaxgpt.ready import check_ready
from jaxgpt.runs import STAGES

CONFIGS = sorted(Path(__file__).parents[1].joinpath("configs").glob("*.yaml"))


def test_there_are_configs():
    assert {path.stem for path in CONFIGS} >= {"meadow", "gsm8k", "shakespeare"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_every_config_runs_on_any_machine(path, devices):
    loaded = load(path)
    check_ready("config", loaded)
    config, shape = loaded.config, mesh_shape(loaded.config.mesh, devices)
    mesh = jax.make_mesh(shape, AXES, devices=jax.devices()[: math.prod(shape)])
    check_model(mesh, config.model, 128)
    stages = [(name, section) for name in STAGES if (section := getattr(config, name)) is not None]
    assert stages
    for name, section in stages:
        check_batch(mesh, section.batch // section.accumulate, f"{name}.batch / {name}.accumulate")
