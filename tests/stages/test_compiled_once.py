"""Every program of a stage is compiled once, however many steps are taken and nothing is copied behind its back."""

import jax
import pytest
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.config.schema import RolloutConfig
from jaxgpt.pipeline import MAKE
from jaxgpt.train.step import make_step


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)])
def test_each_stage_compiles_each_program_once(home, name, shape):
    mesh = mesh_of(*shape)
    with jax.set_mesh(mesh):
        run = open_run(config(home), mesh)
        for parent in ("pretrain", "sft", "reward"):
            finished(run, parent, seed=1)
        section = getattr(run.config, name)
        stage = MAKE[name](run, section)
        step, state = make_step(stage.loss, stage.tx, stage.schedule), first_state(stage)
        steps = 2 * section.updates_per_rollout if isinstance(section, RolloutConfig) else 3
        for n in range(steps):
            drawn = stage.source(n, state)
            with jax.transfer_guard("disallow"):
                state, _ = step(state.replace(extras=drawn.extras), drawn.batch, {})
        programs = [step]
        if isinstance(section, RolloutConfig):
            programs += [stage.source._respond, stage.source._measure, stage.source._learn]
        if name == "dpo":
            programs += [stage.source._logp]
        stage.close()
    assert [program._cache_size() for program in programs] == [1] * len(programs)
