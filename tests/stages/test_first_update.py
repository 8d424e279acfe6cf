"""The first update after a rollout: the policy that learns is still the one that sampled, at every token."""

import jax
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.stages import ppo


def test_no_ratio_of_the_first_minibatch_is_far_from_one(home):
    c, mesh = config(home, ppo={"temperature": 0.7}), mesh_of()
    with jax.set_mesh(mesh):
        run = open_run(c, mesh)
        finished(run, "sft", seed=1, spread=15.0)
        finished(run, "reward", seed=2, spread=5.0)
        stage = ppo.stage(run, c.ppo)
        state, loss = first_state(stage), jax.jit(lambda params, batch: stage.loss(params, batch)[1])
        batch = stage.source(0, state).batch
        figures = loss(state.params, batch)
        assert float(figures["val/ratio_gap"].reported) < 1e-5
        assert float(figures["policy/clipfrac_avg"].mean) == 0.0
        assert float(figures["policy/approxkl_avg"].weight) == float(batch["mask"].sum()) >= 4
        moved = {**state.params, "policy": jax.tree.map(lambda leaf: 1.1 * leaf, state.params["policy"])}
        assert float(loss(moved, batch)["val/ratio_gap"].reported) > 1e-2
