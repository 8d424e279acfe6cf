"""What the stages share that learn from the policy's own responses: models, rollouts, what is handed on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jaxgpt.config.schema import ModelReward, PpoConfig, RolloutConfig
from jaxgpt.data.mixture import Batches, single
from jaxgpt.data.prompts import PromptRows, load_prompts
from jaxgpt.errors import UserError
from jaxgpt.graders import check_records
from jaxgpt.mesh import check_batch
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import Net, Params
from jaxgpt.models.transformer import compute_dtype
from jaxgpt.optim import average_of, decayed, schedule
from jaxgpt.stages.episodes import Actors, Critic
from jaxgpt.stages.judge import Judge
from jaxgpt.stages.rollouts import Estimate, Rollouts
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage
from jaxgpt.train.state import State
from jaxgpt.train.step import Batch, Loss

Drift = Callable[[Mapping[str, Any], Batch], jax.Array]


def prompt_rows(run: Run, config: RolloutConfig, name: str) -> PromptRows:
    """The prompts. Raises UserError naming the record that cannot be used, or that lacks what a reward asks for."""
    assert config.data is not None
    rows = load_prompts(run.paths(config.data.path), run.tokenizer, config.prompt_length, f"{name}.prompt_length")
    check_records(config.rewards, rows, f"{name}.rewards")
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
    lm = language_model(run.config.model, run.vocab)
    judged = [run.parent(name, f"reward {n}") for n in range(1, 1 + _reward_models(config))]
    rewards = [(net, _cast(params, config.frozen_dtype)) for net, params in map(run.load_reward, judged)]
    critic = _Value(run, config, start, judged) if isinstance(config, PpoConfig) else None
    actors = Actors(
        policy=lm,
        reference=lm if reference else None,
        critic=None if critic is None else critic.critic,
        prompt=config.prompt_length,
        temperature=config.temperature,
    )

    def init() -> dict[str, Params]:
        policy = {"policy": run.load_language(start)}
        return policy if critic is None else {**policy, "value": critic.init()}

    def frozen() -> dict[str, Params]:
        return {"reference": _cast(run.load_language(start), config.frozen_dtype)} if reference else {}

    rollouts = Rollouts(
        config=config,
        actors=actors,
        judge=Judge(config, rewards, prompts, run.tokenizer, name),
        estimate=estimate,
        frozen=frozen,
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
    abstract = {"policy": lm.abstract} if critic is None else {"policy": lm.abstract, "value": critic.abstract}
    return Stage(
        name=name,
        init=init,
        abstract=abstract,
        loss=loss(actors),
        source=rollouts,
        tx=tx,
        schedule=schedule(config.optimizer, config.steps, config.updates_per_rollout),
        steps=config.steps,
        tokens_per_step=config.batch * (config.prompt_length + config.response_length),
        boundary=lambda step: step % config.updates_per_rollout == 0,
        extras={"kl_coef": config.kl.coef},
        finish=_finish(config),
        notes=(
            f"{len(prompts):,} prompts, {config.iterations} rollouts of {config.episodes} episodes, "
            f"{config.updates_per_rollout} updates each",
            _memory(run, config, abstract, lm if reference else None, [net for net, _ in rewards]),
        ),
    )


class _Value:
    """PPO's critic: its computation and first parameters."""

    def __init__(self, run: Run, config: PpoConfig, start: str, judged: list[str]):
        self._run, self._start = run, start
        self._plain = scalar_model(run.config.model, run.vocab)
        self._from = config.critic_init or (judged[0] if judged else None)
        self._shared = config.critic == "shared"
        self._net = self._plain if self._from is None else run.reward_net(self._from)
        self.critic = Critic(None if self._shared else self._net)
        heads = {leaf: self._plain.abstract[leaf] for leaf in ("head_D", "bias")}
        self.abstract: Params = heads if self._shared else self._net.abstract

    def init(self) -> Params:
        """A reward model, or zeros on a trunk that is there: values begin as 0 (lm-human-preferences)."""
        mesh = jax.sharding.get_mesh()
        if not self._shared and self._from is not None:
            return self._run.load_reward(self._from)[1]
        heads = {
            leaf: jnp.zeros(like.shape, like.dtype, device=NamedSharding(mesh, like.sharding.spec))
            for leaf, like in self._plain.abstract.items()
            if leaf in ("head_D", "bias")
        }
        return heads if self._shared else {**heads, "backbone": self._run.load_language(self._start)["backbone"]}


def _reward_models(config: RolloutConfig) -> int:
    return sum(len(term.folders) for term in config.rewards if isinstance(term, ModelReward))


def _cast(params: Params, dtype: str) -> Params:
    """Matrices in another type; scales and offsets stay as they are, and so does the head."""
    return jax.tree.map(
        lambda leaf, matrix: leaf.astype(dtype) if matrix and leaf.ndim > 1 else leaf, params, decayed(params)
    )


def _finish(config: RolloutConfig) -> Callable[[State], Params]:
    if isinstance(config, PpoConfig) and config.ema is not None:
        return lambda state: average_of(state.opt, "policy")
    return lambda state: state.params["policy"]


def _bytes(tree: Any, size: int | None = None) -> int:
    """Bytes of one device's part of a tree of arrays or shapes; `size` is that of an element, unset for its own."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        spec = jax.sharding.get_abstract_mesh()
        ways = math.prod(spec.shape[axis] for axis in jax.tree.leaves(tuple(leaf.sharding.spec)) if axis is not None)
        total += leaf.size * (size or leaf.dtype.itemsize) // ways
    return total


def _memory(run: Run, config: RolloutConfig, trained: Params, reference: Net | None, rewards: list[Net]) -> str:
    """What the models take on each device: of what is trained parameters, gradients and both moments of Adam."""
    kept = 2 if config.frozen_dtype == "bfloat16" else 4
    parts = {part: 4 * _bytes(tree) for part, tree in trained.items()}
    if isinstance(config, PpoConfig) and config.ema is not None:
        parts["policy"] += _bytes(trained["policy"])
    if reference is not None:
        parts["reference"] = _bytes(reference.abstract, kept)
    if rewards:
        parts["reward"] = sum(_bytes(net.abstract, kept) for net in rewards)
    c, rows = run.config.model, config.rollout_batch or config.episodes
    ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
    heads = c.kv_heads // run.mesh.shape["tensor"] if c.kv_heads > 1 else 1
    slots = config.prompt_length + config.response_length
    parts["cache"] = 2 * c.layers * (rows // ways) * heads * slots * c.head_dim * compute_dtype(c).itemsize
    shown = ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in parts.items())
    return f"memory a device, MiB: {shown}; in all {sum(parts.values()) / 2**20:,.1f} and activations"
