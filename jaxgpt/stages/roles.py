"""The models of a stage that learns from its own responses: policy, reference, critic, reward models."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxgpt.config.schema import ModelReward, PpoConfig, RolloutConfig
from jaxgpt.models.heads import HEAD, language_model, scalar_model
from jaxgpt.models.net import Net, Params
from jaxgpt.models.transformer import compute_dtype
from jaxgpt.optim import average_of, decayed
from jaxgpt.stages.episodes import Actors, Critic
from jaxgpt.stages.run import Run
from jaxgpt.stages.trained import Trained, trained
from jaxgpt.train.state import State

ADAPTERS_KEY = 2**30
"""Folded into a stage's key where its adapters are drawn; rollouts have smaller numbers."""


class Roles:
    """Who is who in a stage, and whose parameters are trained, kept or handed on.

    The reference is a copy of the policy's beginning, or with adapters the policy without them: the same arrays.
    """

    def __init__(self, run: Run, config: RolloutConfig, name: str, reference: bool):
        self._run, self._config, self._start = run, config, run.parent(name)
        run.check_language(self._start)
        c = run.config.model
        plain = language_model(c, run.vocab)
        self.reference: Net | None = plain if reference else None
        self.policy: Trained = trained(
            lambda lora: language_model(c, run.vocab, lora=lora),
            lambda: run.load_language(self._start),
            config.lora,
            jax.random.fold_in(run.key(name), ADAPTERS_KEY),
        )
        judged = [run.parent(name, f"reward {n}") for n in range(1, 1 + _reward_models(config))]
        self.rewards = [(net, _cast(params, config.frozen_dtype)) for net, params in map(run.load_reward, judged)]
        critic = _Value(run, config, self._start, judged) if isinstance(config, PpoConfig) else None
        self.models = {"policy": self.policy} if critic is None else {"policy": self.policy, "value": critic.model}
        self.actors = Actors(
            policy=self.policy.net,
            reference=self.reference,
            critic=None if critic is None else critic.critic,
            prompt=config.prompt_length,
            temperature=config.temperature,
        )

    def untrained(self) -> dict[str, Params]:
        """What the loss needs and nothing trains: the bases of adapters."""
        return {} if self._config.lora is None else {part: model.frozen() for part, model in self.models.items()}

    @functools.cached_property
    def _reference(self) -> dict[str, Params]:
        if self.reference is None:
            return {}
        if self._config.lora is not None:
            return {"reference": self.policy.frozen()}
        return {"reference": _cast(self._run.load_language(self._start), self._config.frozen_dtype)}

    def beside(self) -> dict[str, Params]:
        """What rollouts need beside the trained parameters."""
        return {**self.untrained(), **self._reference}

    def handed_on(self, state: State) -> Params:
        """The policy's trained parameters, or their average."""
        average = isinstance(self._config, PpoConfig) and self._config.ema is not None
        return average_of(state.opt, "policy") if average else state.params["policy"]

    def memory(self) -> str:
        """What the models take on each device: of what is trained parameters, gradients and both moments of Adam."""
        run, config = self._run, self._config
        kept = 2 if config.frozen_dtype == "bfloat16" else 4
        parts = {part: 4 * _bytes(model.abstract) for part, model in self.models.items()}
        if config.lora is not None:  # a base that is not trained, and is the reference as well
            apart = [part for part in parts if part == "policy" or self.actors.critic != Critic(None)]
            parts |= {part: parts[part] + _bytes(self.models[part].net.abstract) for part in apart}
        elif self.reference is not None:
            parts["reference"] = _bytes(self.reference.abstract, kept)
        if isinstance(config, PpoConfig) and config.ema is not None:
            parts["policy"] += _bytes(self.policy.abstract)
        if self.rewards:
            parts["reward"] = sum(_bytes(net.abstract, kept) for net, _ in self.rewards)
        c, rows = run.config.model, config.rollout_batch or config.episodes
        ways = run.mesh.shape["data"] * run.mesh.shape["fsdp"]
        heads = c.kv_heads // run.mesh.shape["tensor"] if c.kv_heads > 1 else 1
        slots = config.prompt_length + config.response_length
        parts["cache"] = 2 * c.layers * (rows // ways) * heads * slots * c.head_dim * compute_dtype(c).itemsize
        shown = ", ".join(f"{part} {size / 2**20:,.1f}" for part, size in parts.items())
        return f"memory a device, MiB: {shown}; in all {sum(parts.values()) / 2**20:,.1f} and activations"


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
