"""The first update after a rollout: the policy that learns is still the one that sampled, at every token."""

import jax
import numpy as np
from small_run import config, finished, first_state, mesh_of, open_run

from jaxgpt.losses import ratio_gap, token_logp
from jaxgpt.models.heads import language_model
from jaxgpt.stages import ppo
from jaxgpt.stages.rollouts import response_logits


def test_no_ratio_of_the_first_minibatch_is_far_from_one(home):
    c, mesh = config(home, ppo={"temperature": 0.7}), mesh_of()
    with jax.set_mesh(mesh):
        run = open_run(c, mesh)
        finished(run, "sft", seed=1, spread=15.0)
        finished(run, "reward", seed=2, spread=5.0)
        stage = ppo.stage(run, c.ppo)
        state = first_state(stage)
        batch, prompt, lm = stage.source(0, state).batch, c.ppo.prompt_length, language_model(c.model, run.vocab)

        @jax.jit
        def gap(policy, batch, temperature):
            logits_BNV = response_logits(lm.bind(policy), batch, prompt)
            return ratio_gap(
                token_logp(logits_BNV, batch["tokens"][:, prompt:], temperature), batch["old_logp"], batch["mask"]
            )

        assert float(gap(state.params["policy"], batch, 0.7)) < 1e-5
        assert float(gap(state.params["policy"], batch, 1.0)) > 0.1
        assert float(np.sum(batch["mask"])) >= 4
