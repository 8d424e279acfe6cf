"""PPO against the reward model, with the KL from the SFT model in the reward (Ouyang et al. 2022; Ziegler et al. 2019).

The trainables are one tree, {"policy", "value"}; the frozen reference and reward models only help to build the batch.
"""

from __future__ import annotations

from jaxgpt.config.schema import PpoConfig
from jaxgpt.data.mixture import Batches, single
from jaxgpt.data.prompts import PromptRows, load_prompts
from jaxgpt.losses import Metrics, ppo_policy, ppo_value, token_logp
from jaxgpt.mesh import check_batch
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import Net, Params
from jaxgpt.optim import adamw, by_part, schedule
from jaxgpt.stages.rollouts import Rollouts, response_logits, response_values
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage
from jaxgpt.train.step import Batch, Loss, Terms


def ppo_loss(config: PpoConfig, lm: Net, scalar: Net) -> Loss:
    """Clipped surrogate plus clipped value loss, both means over the response tokens of the minibatch."""

    def loss(params: Params, batch: Batch) -> tuple[Terms, Metrics]:
        logits_BNV = response_logits(lm.bind(params["policy"]), batch, config.prompt_length)
        logp_BN = token_logp(logits_BNV, batch["tokens"][:, config.prompt_length :], config.temperature)
        values_BN = response_values(scalar, params["value"], batch, config.prompt_length)
        mask_BN = batch["mask"]
        policy, figures = ppo_policy(logp_BN, batch["old_logp"], batch["advantages"], mask_BN, config.clip)
        value, more = ppo_value(values_BN, batch["old_values"], batch["returns"], mask_BN, config.value_clip)
        return (policy, value.scaled(config.value_coef)), figures | more

    return loss


def load(run: Run, config: PpoConfig) -> PromptRows:
    """The prompts. Raises UserError naming the record that cannot be used."""
    assert config.data is not None
    return load_prompts(run.paths(config.data.path), run.tokenizer, config.prompt_length)


def stage(run: Run, config: PpoConfig) -> Stage:
    """PPO as a value; call under `jax.set_mesh`."""
    check_batch(run.mesh, config.batch // config.accumulate, "ppo.batch / ppo.accumulate")
    lm, scalar = language_model(run.config.model, run.vocab), scalar_model(run.config.model, run.vocab)
    init, reward = run.parent("ppo"), run.parent("ppo", "reward 1")
    prompts = load(run, config)
    rollouts = Rollouts(
        config=config,
        lm=lm,
        scalar=scalar,
        frozen={"reference": run.load_language(init), "reward": run.load_scalar(reward)},
        prompts=Batches(single(prompts, run.config.seed), config.episodes, run.hosts),
        mesh=run.mesh,
        key=run.key("ppo"),
        ends=run.tokenizer.ends,
        pad=run.tokenizer.pad,
    )
    critic = config.optimizer.model_copy(update={"lr": config.value_lr or config.optimizer.lr})
    per = config.updates_per_rollout
    return Stage(
        name="ppo",
        init=lambda: {"policy": run.load_language(init), "value": run.load_scalar(reward)},
        abstract={"policy": lm.abstract, "value": scalar.abstract},
        loss=ppo_loss(config, lm, scalar),
        source=rollouts,
        tx=by_part({"policy": adamw(config.optimizer, config.steps, per), "value": adamw(critic, config.steps, per)}),
        schedule=schedule(config.optimizer, config.steps, per),
        steps=config.steps,
        tokens_per_step=config.batch * (config.prompt_length + config.response_length),
        boundary=lambda step: step % per == 0,
        extras={"kl_coef": config.kl.coef},
        finish=lambda state: state.params["policy"],
        notes=(f"{len(prompts):,} prompts, {config.iterations} rollouts of {config.episodes} episodes",),
    )
