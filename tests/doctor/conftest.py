"""A small run with every stage, of which none is trained; and one with an SFT and a reward model."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import pytest
from examined import setup
from rich.console import Console
from small_run import finished, make_data, mesh_of, open_run

from jaxgpt.pipeline import Pipeline


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """The folder of a run without a finished stage."""
    return make_data(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The folder of a run with an SFT and a reward model."""
    runs, mesh = make_data(tmp_path_factory.mktemp("trained")), mesh_of()
    c = setup(runs, ("sft", "reward", "ppo"))
    Pipeline(c, Console(file=io.StringIO())).tokenizer()
    with jax.set_mesh(mesh):
        run = open_run(c, mesh)
        finished(run, "sft", seed=1, spread=15.0)
        finished(run, "reward", seed=2, spread=5.0)
    return runs
