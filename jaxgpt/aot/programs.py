"""The programs that a stage of a config runs again and again, over shapes alone.

Nothing is loaded and nothing is computed: models are their abstract parameters, batches their shapes and shardings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxgpt.config.schema import (
    Config,
    DpoConfig,
    GrpoConfig,
    ModelReward,
    PpoConfig,
    PretrainConfig,
    RejectionConfig,
    RewardConfig,
    RlooConfig,
    RolloutConfig,
    SftConfig,
)
from jaxgpt.errors import UserError
from jaxgpt.losses import sequence_logp
from jaxgpt.mesh import batch_spec, check_batch, check_model, check_time
from jaxgpt.models.heads import HEAD, language_model, scalar_model
from jaxgpt.models.lora import split
from jaxgpt.models.net import Net, Params, joined
from jaxgpt.optim import adamw, by_part, decayed, schedule
from jaxgpt.stages import dpo, grpo, ppo, pretrain, rejection, reward, rloo
from jaxgpt.stages.episodes import Actors, Critic, token_scores
from jaxgpt.stages.rollouts import respond
from jaxgpt.train.state import initial_state
from jaxgpt.train.step import Batch, Loss, make_step

RESPONSES = 4
"""Responses to a prompt where the config leaves them to the data."""


class Program(NamedTuple):
    """A jitted function and what it would be given."""

    name: str
    function: Any
    arguments: tuple[Any, ...]


def programs(config: Config, stage: str, mesh: jax.sharding.Mesh) -> list[Program]:
    """The programs of a stage; call under `jax.set_mesh`.

    pretrain, sft, reward and dpo update (dpo also asks the reference); stages over rollouts sample, measure (policy,
    reference, critic), score (reward models) and update.
    Raises UserError where the mesh does not divide the model or the batch.
    """
    made = _Maker(config, stage, mesh)
    section = getattr(config, stage)
    check_model(mesh, config.model, made.vocab)
    check_batch(mesh, section.batch // section.accumulate, f"{stage}.batch / {stage}.accumulate")
    match section:
        case PretrainConfig() | SftConfig():
            return made.language(section)
        case RewardConfig():
            return made.ranking(section)
        case DpoConfig():
            return made.preference(section)
        case RolloutConfig():
            return made.rollouts(section)
    raise UserError(f"{stage}: not a stage that trains")


def vocabulary(config: Config) -> int:
    """Rows of the embedding: those of the config, else of the tokenizer to be trained, in whole blocks of 128."""
    return config.model.vocab or -(-config.tokenizer.vocab // 128) * 128


class _Maker:
    def __init__(self, config: Config, stage: str, mesh: jax.sharding.Mesh):
        self.config, self.stage, self.mesh = config, stage, mesh
        self.vocab = vocabulary(config)

    def rows(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        """An array of the batch."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, batch_spec(len(shape))))

    def text(self, rows: int, context: int) -> Batch:
        """A batch of packed text."""
        names = ("tokens", "targets", "segments", "positions")
        grid = {name: self.rows(rows, context) for name in names}
        return grid | {"mask": self.rows(rows, context, dtype=jnp.float32)}

    def update(
        self, section: Any, loss: Loss, tx: optax.GradientTransformation, params: Params, frozen: Params, batch: Batch
    ) -> Program:
        """The training step."""
        rate = schedule(section.optimizer, 1000)
        step = make_step(loss, tx, rate, section.accumulate)
        coef = {"kl_coef": jax.ShapeDtypeStruct((), jnp.float32)} if isinstance(section, RolloutConfig) else {}
        state = jax.eval_shape(lambda params, extras: initial_state(params, tx, extras), params, coef)
        if section.accumulate == 1:
            return Program("update", step, (state, batch, frozen))
        weights = jax.eval_shape(step.weigh, params, frozen, batch)
        return Program("update", step.update, (state, batch, frozen, weights))

    def models(self, section: Any, make: Callable[[Any], Net]) -> tuple[Net, Params, Params]:
        """A net, the abstract parameters that are trained, and those that are not."""
        lora = getattr(section, "lora", None)
        net = make(lora)
        return (net, net.abstract, {}) if lora is None else (net, *split(net.abstract, HEAD))

    def language(self, section: PretrainConfig | SftConfig) -> list[Program]:
        """Of the next token's loss."""
        check_time(self.mesh, section.context, f"{self.stage}.context")
        dropout = section.dropout if isinstance(section, SftConfig) else 0.0
        net, params, frozen = self.models(
            section, lambda lora: language_model(self.config.model, self.vocab, dropout, lora)
        )
        batch = self.text(section.batch, section.context)
        if dropout:
            batch["seeds"] = self.rows(section.batch, dtype=jnp.uint32)
        tx = adamw(section.optimizer, 1000)
        return [self.update(section, pretrain.language_loss(net), tx, params, frozen, batch)]

    def ranking(self, section: RewardConfig) -> list[Program]:
        """Of a reward model."""
        check_time(self.mesh, section.context, f"{self.stage}.context")
        net, params, frozen = self.models(section, lambda lora: scalar_model(self.config.model, self.vocab, lora))
        rows, responses = section.batch, section.responses or RESPONSES
        batch = {
            "tokens": self.rows(rows, responses, section.context),
            "lengths": self.rows(rows, responses),
            "ranks": self.rows(rows, responses),
            "margin": self.rows(rows, dtype=jnp.float32),
        }
        tx = adamw(section.optimizer, 1000)
        return [self.update(section, reward.ranking_loss(section, net), tx, params, frozen, batch)]

    def preference(self, section: DpoConfig) -> list[Program]:
        """Of DPO: the reference's log-probabilities, and the update."""
        check_time(self.mesh, section.context, f"{self.stage}.context")
        plain = language_model(self.config.model, self.vocab)
        net, params, frozen = self.models(
            section, lambda lora: language_model(self.config.model, self.vocab, lora=lora)
        )
        rows, responses = section.batch, section.responses or RESPONSES
        grid = {name: self.rows(rows, responses, section.context) for name in ("tokens", "targets", "segments")}
        grid |= {"mask": self.rows(rows, responses, section.context, dtype=jnp.float32)}
        grid |= {"ranks": self.rows(rows, responses)}

        def reference(params: Params, batch: Batch) -> jax.Array:
            return sequence_logp(dpo.response_logp(plain.bind(params), batch), batch["mask"])

        batch = grid | {"reference": self.rows(rows, responses, dtype=jnp.float32)}
        loss = dpo.preference_loss(net, section)
        return [
            Program("reference", jax.jit(reference), (plain.abstract, grid)),
            self.update(section, loss, adamw(section.optimizer, 1000), params, frozen, batch),
        ]

    def rollouts(self, section: RolloutConfig) -> list[Program]:
        """Of a stage that learns from its own responses."""
        c, length = self.config.model, section.prompt_length + section.response_length
        check_time(self.mesh, length, f"{self.stage}.prompt_length + {self.stage}.response_length")
        rows = section.rollout_batch or section.episodes
        check_batch(self.mesh, rows, f"{self.stage}.rollout_batch")
        plain = language_model(c, self.vocab)
        net, policy, base = self.models(section, lambda lora: language_model(c, self.vocab, lora=lora))
        parts, frozen = {"policy": policy}, {"policy": base} if base else {}
        critic = None
        if isinstance(section, PpoConfig):
            critic = Critic(None)
            if section.critic == "shared":
                parts["value"] = {leaf: scalar_model(c, self.vocab).abstract[leaf] for leaf in HEAD}
            else:
                made, parts["value"], base = self.models(section, lambda lora: scalar_model(c, self.vocab, lora))
                critic, frozen = Critic(made), frozen | ({"value": base} if base else {})
        reference = plain if isinstance(section, PpoConfig | RlooConfig) or section.kl.coef > 0 else None
        actors = Actors(net, reference, critic, section.prompt_length, section.temperature)
        whole: dict[str, Any] = {part: joined(frozen.get(part, {}), tree) for part, tree in parts.items()}
        if reference is not None:
            whole["reference"] = _cast(plain.abstract, section.frozen_dtype)
        prompts = {name: self.rows(rows, section.prompt_length) for name in ("tokens", "segments")}
        prompts["row"] = self.rows(rows)

        def sample(policy: Params, prompts: Batch, key: jax.Array) -> Batch:
            return respond(section, actors, policy, prompts, key, (0,), 0)

        def measure(params: Mapping[str, Any], episodes: Batch) -> Batch:
            return actors.measure(params, episodes)

        def score(params: tuple[Params, ...], episodes: Batch) -> list[jax.Array]:
            return [token_scores(judge, one, episodes) for one in params]

        key = jax.eval_shape(lambda: jax.random.key(0))
        episodes = jax.eval_shape(jax.jit(sample), whole["policy"], prompts, key)
        measured = jax.eval_shape(jax.jit(measure), whole, episodes)
        found = [
            Program("sample", jax.jit(sample), (whole["policy"], prompts, key)),
            Program("measure", jax.jit(measure), (whole, episodes)),
        ]
        judges = sum(len(term.folders) for term in section.rewards if isinstance(term, ModelReward))
        if judges:
            judge = scalar_model(c, self.vocab)
            given = {name: episodes[name] for name in ("tokens", "segments")}
            held = (_cast(judge.abstract, section.frozen_dtype),) * judges
            found.append(Program("score", jax.jit(score), (held, given)))
        estimate, loss, tx = _learning(section, actors)
        scores = self.rows(rows, dtype=jnp.float32)
        extras = {"kl_coef": jax.ShapeDtypeStruct((), jnp.float32)}
        learned = jax.eval_shape(jax.jit(estimate), measured, scores, extras).batch
        batch = {name: self.rows(section.batch, *x.shape[1:], dtype=x.dtype) for name, x in learned.items()}
        if isinstance(section, PpoConfig) and section.ptx is not None:
            batch["ptx"] = self.text(section.ptx.batch, section.ptx.context)
        found.append(self.update(section, loss, tx, parts, frozen, batch))
        return found


def _learning(section: RolloutConfig, actors: Actors) -> tuple[Any, Loss, optax.GradientTransformation]:
    """What a stage estimates from episodes, its loss and its optimizer."""
    one = by_part({"policy": adamw(section.optimizer, 1000)})
    match section:
        case PpoConfig():
            return ppo.ppo_estimate(section), ppo.ppo_loss(section, actors), ppo.optimizer(section)
        case GrpoConfig():
            return grpo.grpo_estimate(section), grpo.grpo_loss(section, actors), one
        case RlooConfig():
            return rloo.rloo_estimate(section), rloo.rloo_loss(section, actors), one
        case RejectionConfig():
            return rejection.rejection_estimate(section), rejection.rejection_loss(section, actors), one
    raise UserError(f"{type(section).__name__}: not a stage over rollouts")


def _cast(abstract: Params, dtype: str) -> Params:
    """Matrices in another type, as frozen models are kept."""
    return jax.tree.map(
        lambda leaf, matrix: leaf.update(dtype=jnp.dtype(dtype)) if matrix and len(leaf.shape) > 1 else leaf,
        abstract,
        decayed(abstract),
    )
