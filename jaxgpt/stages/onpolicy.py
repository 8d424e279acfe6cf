"""What the stages share that learn from the policy's own responses: models, rollouts, what is handed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgpt.config.schema import PpoConfig, RlooConfig, RolloutConfig
from jaxgpt.data.mixture import Batches, single
from jaxgpt.data.prompts import PromptRows, load_prompts
from jaxgpt.errors import UserError
from jaxgpt.graders import check_records
from jaxgpt.health import Limits
from jaxgpt.mesh import check_batch, check_time
from jaxgpt.models.transformer import compute_dtype
from jaxgpt.optim import schedule
from jaxgpt.stages.episodes import Actors
from jaxgpt.stages.gold import gold_rows, held_out
from jaxgpt.stages.judge import Judge
from jaxgpt.stages.roles import Roles
from jaxgpt.stages.rollouts import Estimate, Rollouts
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage
from jaxgpt.train.step import Batch, Loss

Drift = Callable[[Mapping[str, Any], Batch], jax.Array]


def prompt_rows(run: Run, config: RolloutConfig, name: str) -> PromptRows:
    """The prompts. Raises UserError naming the record that cannot be used, or that lacks what a reward asks for."""
    assert config.data is not None
    rows = load_prompts(run.paths(config.data.path), run.tokenizer, config.prompt_length, f"{name}.prompt_length")
    check_records(config.rewards, rows, f"{name}.rewards")
    gold_rows(run, config, name)
    return rows


def stop_tokens(run: Run, config: RolloutConfig, name: str) -> tuple[int, ...]:
    """The tokens that end a response. Raises UserError where `stop` is no single token."""
    if config.stop is None:
        return run.tokenizer.ends
    ids = run.tokenizer.encode(config.stop)
    if len(ids) != 1:
        raise UserError(
            f"{name}.stop: {config.stop!r} is {len(ids)} tokens of this tokenizer, expected the text of one; unset it "
            "to end with the chat template's end of a turn"
        )
    return (ids[0],)


def on_policy(
    run: Run,
    config: RolloutConfig,
    name: str,
    *,
    estimate: Estimate,
    loss: Callable[[Actors], Loss],
    tx: optax.GradientTransformation,
    reference: bool = True,
    rounds: int = 1,
    text: Batches | None = None,
    drift: Callable[[Actors], Drift] | None = None,
) -> Stage:
    """A stage over rollouts; call under `jax.set_mesh`. PPO's has a critic, `reference` says whether there is one."""
    check_batch(run.mesh, config.batch // config.accumulate, f"{name}.batch / {name}.accumulate")
    check_batch(run.mesh, config.rollout_batch or config.episodes, f"{name}.rollout_batch")
    check_time(
        run.mesh, config.prompt_length + config.response_length, f"{name}.prompt_length + {name}.response_length"
    )
    if text is not None:
        check_batch(run.mesh, text.batch // config.accumulate, f"{name}.ptx.batch / {name}.accumulate")
    prompts = prompt_rows(run, config, name)
    roles = Roles(run, config, name, reference)
    actors = roles.actors
    rollouts = Rollouts(
        config=config,
        actors=actors,
        judge=Judge(config, roles.rewards, prompts, run.tokenizer, name),
        estimate=estimate,
        frozen=roles.beside,
        prompts=prompts,
        draws=single(prompts, run.config.seed),
        mesh=run.mesh,
        key=run.key(name),
        tokenizer=run.tokenizer,
        ends=stop_tokens(run, config, name),
        rounds=rounds,
        drift=None if drift is None else drift(actors),
        limit=config.stop_kl if isinstance(config, PpoConfig) and config.stop_kl is not None else math.inf,
        text=text,
    )
    return Stage(
        name=name,
        init=lambda: {part: model.first() for part, model in roles.models.items()},
        abstract={part: model.abstract for part, model in roles.models.items()},
        frozen=roles.untrained,
        loss=loss(actors),
        source=rollouts,
        tx=tx,
        schedule=schedule(config.optimizer, config.steps, config.updates_per_rollout),
        steps=config.steps,
        tokens_per_step=config.batch * (config.prompt_length + config.response_length),
        evaluate=held_out(run, config, name, roles, rollouts.ends),
        quality=lambda figures: figures["gold"],
        boundary=lambda step: step % config.updates_per_rollout == 0,
        extras={"kl_coef": config.kl.coef},
        finish=lambda state: roles.policy.whole(roles.handed_on(state)),
        beside=lambda state: roles.policy.beside(roles.handed_on(state)),
        limits=limits(run, config),
        notes=(
            *roles.policy.notes,
            f"{len(prompts):,} prompts, {config.iterations} rollouts of {config.episodes} episodes, "
            f"{config.updates_per_rollout} updates each",
            roles.memory(),
        ),
    )


def limits(run: Run, config: RolloutConfig) -> Limits:
    """When a rollout's figures are worth a warning: what arithmetic leaves, and whether a ratio is a token's."""
    half = compute_dtype(run.config.model) == jnp.bfloat16
    return Limits(
        ratio_gap=0.1 if half else Limits.ratio_gap,
        sampler_gap=0.5 if half else Limits.sampler_gap,
        approx_kl=1.0 if isinstance(config, RlooConfig) else Limits.approx_kl,
        longest=config.response_length,
    )
