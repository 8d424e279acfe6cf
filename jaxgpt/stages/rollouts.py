"""Episodes for PPO: the policy responds, reward and reference models score, advantages are taken; all on the devices.

Letters: B episodes, P prompt length, N response length, T = P + N, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxgpt.advantages import adaptive_kl, episode_kl, gae, missing_eos, token_rewards, whiten
from jaxgpt.config.schema import PpoConfig
from jaxgpt.data.mixture import Batches
from jaxgpt.losses import token_entropy, token_logp
from jaxgpt.mesh import batch_spec, put_batch
from jaxgpt.models.heads import LanguageModel
from jaxgpt.models.net import Net, Params
from jaxgpt.sampling import generate, left_positions
from jaxgpt.stages.reward import last_token
from jaxgpt.train.loop import Drawn
from jaxgpt.train.state import State
from jaxgpt.train.step import Batch


def response_logits(lm: LanguageModel, batch: Batch, prompt: int) -> jax.Array:
    """Logits of every response token of left-padded episodes, [B, N, V]: read one position earlier."""
    positions_BT = left_positions(batch["segments"])
    hidden_BTD = lm.hidden(batch["tokens"], batch["segments"], positions_BT)
    return lm.logits(hidden_BTD[:, prompt - 1 : -1])


def response_values(net: Net, params: Params, batch: Batch, prompt: int) -> jax.Array:
    """The critic's value before every response token, [B, N]."""
    scores_BT = net.bind(params)(batch["tokens"], batch["segments"], left_positions(batch["segments"]))
    return scores_BT[:, prompt - 1 : -1]


def experience(
    config: PpoConfig, lm: Net, scalar: Net, models: dict[str, Params], episodes: Batch, kl_coef: jax.Array
) -> tuple[Batch, dict[str, jax.Array]]:
    """Log-probabilities, rewards, advantages and returns of finished episodes, and the rollout's figures.

    episodes: tokens, segments [B, T]; mask [B, N] float32, 1 on response tokens up to the end token; ended [B].
    models: policy, value, reference, reward parameters.
    """
    prompt, mask_BN, tau = config.prompt_length, episodes["mask"], config.temperature
    tokens_BN = episodes["tokens"][:, prompt:]
    logits_BNV = response_logits(lm.bind(models["policy"]), episodes, prompt)
    logp_BN = token_logp(logits_BNV, tokens_BN, tau)
    entropy_BN = token_entropy(logits_BNV, tau)
    reference_BN = token_logp(response_logits(lm.bind(models["reference"]), episodes, prompt), tokens_BN, tau)
    values_BN = response_values(scalar, models["value"], episodes, prompt)
    scores_BT = scalar.bind(models["reward"])(
        episodes["tokens"], episodes["segments"], left_positions(episodes["segments"])
    )
    lengths_B = jnp.sum(mask_BN, axis=1)
    raw_B = last_token(scores_BT, prompt - 1 + lengths_B.astype(jnp.int32))
    scores_B = missing_eos(raw_B, episodes["ended"], config.missing_eos.how, config.missing_eos.value)
    rewards_BN = token_rewards(scores_B, logp_BN, reference_BN, mask_BN, kl_coef)
    if config.whiten_rewards:
        rewards_BN = whiten(rewards_BN, mask_BN, shift_mean=False)
    advantages_BN, returns_BN = gae(rewards_BN, values_BN, mask_BN, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages_BN = whiten(advantages_BN, mask_BN)
    kl_B, count = episode_kl(logp_BN, reference_BN, mask_BN), jnp.sum(mask_BN)

    def mean(x_BN: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask_BN > 0, x_BN, 0.0)) / count

    error_BN = returns_BN - values_BN
    unexplained = mean(jnp.square(error_BN - mean(error_BN)))
    spread = mean(jnp.square(returns_BN - mean(returns_BN)))
    figures = {
        "objective/kl": jnp.mean(kl_B),
        "objective/score": jnp.mean(scores_B),
        "objective/rlhf_reward": jnp.mean(scores_B) - kl_coef * jnp.mean(kl_B),
        "objective/entropy": mean(entropy_BN),
        "objective/length": jnp.mean(lengths_B),
        "objective/eos_rate": jnp.mean(episodes["ended"].astype(jnp.float32)),
        "objective/kl_coef": kl_coef,
        "value/explained_variance": 1.0 - unexplained / jnp.maximum(spread, 1e-8),
    }
    batch = {
        "tokens": episodes["tokens"],
        "segments": episodes["segments"],
        "mask": mask_BN,
        "old_logp": logp_BN,
        "old_values": values_BN,
        "advantages": advantages_BN,
        "returns": returns_BN,
    }
    return jax.lax.stop_gradient(batch), figures


@dataclasses.dataclass
class Rollouts:
    """PPO's source: at each rollout boundary new episodes of the current policy, then minibatches of them.

    Prompts, sampling and permutations are functions of the run's seed and the rollout's number; what changes beside
    the parameters (the KL coefficient) is in the state's extras. The episodes in hand are never saved: checkpoints
    stand on boundaries.
    """

    config: PpoConfig
    lm: Net
    scalar: Net
    frozen: dict[str, Params]
    """Parameters of the reference and the reward model."""
    prompts: Batches
    mesh: jax.sharding.Mesh
    key: jax.Array
    ends: tuple[int, ...]
    pad: int

    def __post_init__(self) -> None:
        self._respond = jax.jit(self._generate)
        self._experience = jax.jit(self._score)
        self._pick = jax.jit(_pick)
        self._episodes: Batch | None = None

    def __call__(self, step: int, state: State) -> Drawn:
        """The minibatch of an update; at a boundary after a rollout."""
        rollout, update = divmod(step, self.config.updates_per_rollout)
        extras, figures = state.extras, {}
        if update == 0:
            self._episodes, figures, extras = self._roll(rollout, state)
        assert self._episodes is not None, f"update {step} stands inside a rollout that was not made"
        epoch, part = divmod(update, self.config.episodes // self.config.batch)
        seed = np.random.SeedSequence([*np.asarray(jax.random.key_data(self.key)).tolist(), rollout, epoch])
        order = np.random.default_rng(seed).permutation(self.config.episodes).astype(np.int32)
        rows = jax.device_put(order[part * self.config.batch :][: self.config.batch], P())
        return Drawn(self._pick(self._episodes, rows), extras, figures)

    def _roll(self, rollout: int, state: State) -> tuple[Batch, dict[str, jax.Array], dict[str, jax.Array]]:
        prompts = put_batch(self.prompts[rollout], self.mesh)
        key = jax.random.fold_in(self.key, rollout)
        episodes = self._respond(state.params["policy"], prompts, key)
        models = {"policy": state.params["policy"], "value": state.params["value"], **self.frozen}
        batch, figures, coef = self._experience(models, episodes, state.extras["kl_coef"])
        return batch, figures, {**state.extras, "kl_coef": coef}

    def _generate(self, policy: Params, prompts: Batch, key: jax.Array) -> Batch:
        c = self.config
        with jax.numpy_dtype_promotion("strict"):
            out = generate(
                self.lm.bind(policy), prompts["tokens"], prompts["segments"], key,
                new=c.response_length, temperature=c.temperature, ends=self.ends, pad=self.pad,
            )  # fmt: skip
        real_BN = jnp.arange(c.response_length) < out.lengths_B[:, None]
        return {
            "tokens": jnp.concatenate([prompts["tokens"], out.tokens_BN], axis=1),
            "segments": jnp.concatenate([prompts["segments"], real_BN.astype(jnp.int32)], axis=1),
            "mask": real_BN.astype(jnp.float32),
            "ended": out.done_B,
        }

    def _score(
        self, models: dict[str, Params], episodes: Batch, kl_coef: jax.Array
    ) -> tuple[Batch, dict[str, jax.Array], jax.Array]:
        with jax.numpy_dtype_promotion("strict"):
            batch, figures = experience(self.config, self.lm, self.scalar, models, episodes, kl_coef)
        kl = self.config.kl
        if kl.controller == "adaptive":
            kl_coef = adaptive_kl(kl_coef, figures["objective/kl"], kl.target, kl.horizon, self.config.episodes)
        return batch, figures, kl_coef


def _pick(episodes: Batch, rows: jax.Array) -> Batch:
    def take(x: Any) -> jax.Array:
        whole = jax.sharding.reshard(x, P(*(None,) * x.ndim))
        return whole.at[rows].get(out_sharding=batch_spec(x.ndim))

    return {name: take(x) for name, x in episodes.items()}
