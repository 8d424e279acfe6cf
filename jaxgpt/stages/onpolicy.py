"""What the stages share that learn from the policy's own responses: models, rollouts, what is handed on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxgpt.config.schema import ModelReward, PpoConfig, RlooConfig, RolloutConfig
from jaxgpt.data.mixture import Batches, single
from jaxgpt.data.prompts import PromptRows, load_prompts
from jaxgpt.errors import UserError
from jaxgpt.graders import check_records
from jaxgpt.health import Limits
from jaxgpt.mesh import check_batch
from jaxgpt.models.heads import HEAD, language_model, scalar_model
from jaxgpt.models.net import Net, Params, joined
from jaxgpt.models.transformer import compute_dtype
from jaxgpt.optim import average_of, decayed, schedule
from jaxgpt.stages.episodes import Actors, Critic
from jaxgpt.stages.gold import Gold, gold_rows
from jaxgpt.stages.judge import Judge
from jaxgpt.stages.rollouts import Estimate, Rollouts
from jaxgpt.stages.run import Run
from jaxgpt.stages.trained import Trained, trained
from jaxgpt.train.loop import Stage
from jaxgpt.train.state import State
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
    if text is not None:
        check_batch(run.mesh, text.batch // config.accumulate, f"{name}.ptx.batch / {name}.accumulate")
    prompts, start = prompt_rows(run, config, name), run.parent(name)
    run.check_language(start)
    plain = language_model(run.config.model, run.vocab)
    policy = trained(
        lambda lora: language_model(run.config.model, run.vocab, lora=lora),
        lambda: run.load_language(start),
        config.lora,
        run.key(f"{name} policy"),
    )
    judged = [run.parent(name, f"reward {n}") for n in range(1, 1 + _reward_models(config))]
    rewards = [(net, _cast(params, config.frozen_dtype)) for net, params in map(run.load_reward, judged)]
    critic = _Value(run, config, start, judged) if isinstance(config, PpoConfig) else None
    actors = Actors(
        policy=policy.net,
        reference=plain if reference else None,
        critic=None if critic is None else critic.critic,
        prompt=config.prompt_length,
        temperature=config.temperature,
    )
    models = {"policy": policy} if critic is None else {"policy": policy, "value": critic.model}

    def untrained() -> dict[str, Params]:
        return {part: model.frozen() for part, model in models.items()} if config.lora is not None else {}

    @functools.cache
    def beside() -> dict[str, Params]:
        """What rollouts need more: the reference, which is the policy without its adapters where it has some."""
        if not reference:
            return untrained()
        if config.lora is not None:
            return {**untrained(), "reference": policy.frozen()}
        return {"reference": _cast(run.load_language(start), config.frozen_dtype)}

    def handed_on(state: State) -> Params:
        """The policy's parameters, or their average."""
        average = isinstance(config, PpoConfig) and config.ema is not None
        return average_of(state.opt, "policy") if average else state.params["policy"]

    rollouts = Rollouts(
        config=config,
        actors=actors,
        judge=Judge(config, rewards, prompts, run.tokenizer, name),
        estimate=estimate,
        frozen=beside,
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
    abstract = {part: model.abstract for part, model in models.items()}
    return Stage(
        name=name,
        init=lambda: {part: model.first() for part, model in models.items()},
        abstract=abstract,
        frozen=untrained,
        loss=loss(actors),
        source=rollouts,
        tx=tx,
        schedule=schedule(config.optimizer, config.steps, config.updates_per_rollout),
        steps=config.steps,
        tokens_per_step=config.batch * (config.prompt_length + config.response_length),
        evaluate=_gold(run, config, name, policy, rollouts),
        quality=lambda figures: figures["gold"],
        boundary=lambda step: step % config.updates_per_rollout == 0,
        extras={"kl_coef": config.kl.coef},
        finish=lambda state: policy.whole(handed_on(state)),
        beside=lambda state: policy.beside(handed_on(state)),
        limits=limits(run, config),
        notes=(
            *policy.notes,
            f"{len(prompts):,} prompts, {config.iterations} rollouts of {config.episodes} episodes, "
            f"{config.updates_per_rollout} updates each",
            _memory(run, config, models, plain if reference else None, [net for net, _ in rewards]),
        ),
    )


def _gold(run: Run, config: RolloutConfig, name: str, policy: Trained, rollouts: Rollouts) -> Gold | None:
    """The held-out evaluation, where there is one."""
    rows = gold_rows(run, config, name)
    if config.gold is None or rows is None:
        return None
    scored = config.model_copy(update={"rewards": config.gold.rewards})
    return Gold(
        config=config,
        actors=rollouts.actors,
        judge=Judge(scored, [], rows, run.tokenizer, f"{name}.gold"),
        prompts=rows,
        beside=rollouts.frozen,
        start=lambda: {"policy": joined(policy.frozen(), policy.first())},
        mesh=run.mesh,
        key=run.key("gold"),
        ends=rollouts.ends,
        pad=run.tokenizer.pad,
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


class _Value:
    """PPO's critic: its computation, and what of it is trained."""

    def __init__(self, run: Run, config: PpoConfig, start: str, judged: list[str]):
        self._run, self._start = run, start
        plain = scalar_model(run.config.model, run.vocab)
        self._from = config.critic_init or (judged[0] if judged else None)
        self._heads: Params = {leaf: plain.abstract[leaf] for leaf in HEAD}
        if config.critic == "shared":
            self.critic = Critic(None)
            self.model = Trained(plain, self._zeros, self._heads, dict, lambda params: params, lambda params: {})
            return
        make, load = (lambda lora: scalar_model(run.config.model, run.vocab, lora)), self._on_trunk
        if self._from is not None:
            source = self._from
            make, load = (lambda lora: run.reward_net(source, lora)), (lambda: run.load_reward(source)[1])
        self.model = trained(make, load, config.lora, run.key("critic"))
        self.critic = Critic(self.model.net)

    def _zeros(self) -> Params:
        """A head whose values are 0 (lm-human-preferences)."""
        mesh = jax.sharding.get_mesh()
        return {
            leaf: jnp.zeros(like.shape, like.dtype, device=NamedSharding(mesh, like.sharding.spec))
            for leaf, like in self._heads.items()
        }

    def _on_trunk(self) -> Params:
        return {**self._zeros(), "backbone": self._run.load_language(self._start)["backbone"]}


def _reward_models(config: RolloutConfig) -> int:
    return sum(len(term.folders) for term in config.rewards if isinstance(term, ModelReward))


def _cast(params: Params, dtype: str) -> Params:
    """Matrices in another type; scales and offsets stay as they are, and so does the head."""
    return jax.tree.map(
        lambda leaf, matrix: leaf.astype(dtype) if matrix and leaf.ndim > 1 else leaf, params, decayed(params)
    )


def _bytes(tree: Any, size: int | None = None) -> int:
    """Bytes of one device's part of a tree of arrays or shapes; `size` is that of an element, unset for its own."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        spec = jax.sharding.get_abstract_mesh()
        ways = math.prod(spec.shape[axis] for axis in jax.tree.leaves(tuple(leaf.sharding.spec)) if axis is not None)
        total += leaf.size * (size or leaf.dtype.itemsize) // ways
    return total


def _memory(
    run: Run, config: RolloutConfig, models: Mapping[str, Trained], reference: Net | None, rewards: list[Net]
) -> str:
    """What the models take on each device: of what is trained parameters, gradients and both moments of Adam."""
    kept = 2 if config.frozen_dtype == "bfloat16" else 4
    parts = {part: 4 * _bytes(model.abstract) for part, model in models.items()}
    if config.lora is not None:  # a base that is not trained, and is the reference as well
        apart = ("policy", "value") if isinstance(config, PpoConfig) and config.critic == "separate" else ("policy",)
        parts |= {part: parts[part] + _bytes(models[part].net.abstract) for part in apart}
    elif reference is not None:
        parts["reference"] = _bytes(reference.abstract, kept)
    if isinstance(config, PpoConfig) and config.ema is not None:
        parts["policy"] += _bytes(models["policy"].abstract)
    if rewards:
        parts["reward"] = sum(_bytes(net.abstract, kept) for net in rewards)
    c, rows = run.config.model, config.rollout_batch or config.episodes
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    heads = c.kv_heads // run.mesh.shape["tensor"] if c.kv_heads > 1 else 1
    slots = config.prompt_length + config.response_length
    parts["cache"] = 2 * c.layers * (rows // ways) * heads * slots * c.head_dim * compute_dtype(c).itemsize
    shown = ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in parts.items())
    return f"memory a device, MiB: {shown}; in all {sum(parts.values()) / 2**20:,.1f} and activations"
