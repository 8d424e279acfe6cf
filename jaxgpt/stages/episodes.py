"""What the models say of finished episodes: log-probabilities, entropies, values, scores.

Letters: B episodes, P prompt length, N response length, T = P + N, V vocabulary, D model width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxgpt.models.heads import LanguageModel
from jaxgpt.models.net import Net, Params
from jaxgpt.sampling import left_positions
from jaxgpt.train.step import Batch


def response_hidden(lm: LanguageModel, batch: Batch, prompt: int) -> jax.Array:
    """Hidden states that predict every response token of left-padded episodes, [B, N, D]: of one position earlier."""
    hidden_BTD = lm.hidden(batch["tokens"], batch["segments"], left_positions(batch["segments"]))
    return hidden_BTD[:, prompt - 1 : -1]


def token_scores(net: Net, params: Params, batch: Batch) -> jax.Array:
    """A reward or value model's number at every token, [B, T] float32."""
    return net.bind(params)(batch["tokens"], batch["segments"], left_positions(batch["segments"]))


@dataclasses.dataclass(frozen=True)
class Critic:
    """The value before every response token: from a model of its own, or from a head on the policy's hidden states."""

    net: Net | None
    """The model of its own; None for a head on the policy's trunk."""

    def values(self, params: Params, hidden_BND: jax.Array, batch: Batch, prompt: int) -> jax.Array:
        """[B, N] float32; `hidden_BND` is the policy's."""
        if self.net is not None:
            return token_scores(self.net, params, batch)[:, prompt - 1 : -1]
        hidden_BND = hidden_BND.astype(jnp.float32)
        return jnp.einsum("bnd,d->bn", hidden_BND, params["head_D"], precision="highest") + params["bias"]


@dataclasses.dataclass(frozen=True)
class Actors:
    """The models of an RL stage, as computations; their parameters come beside them, by the same names."""

    policy: Net
    reference: Net | None
    critic: Critic | None
    prompt: int
    """Prompt length P."""
    temperature: float

    def respond(self, params: Mapping[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Of the policy, with gradients: log-probabilities, entropies, and values where there is a critic; [B, N]."""
        lm = self.policy.bind(params["policy"])
        hidden_BND = response_hidden(lm, batch, self.prompt)
        tokens_BN = batch["tokens"][:, self.prompt :]
        logp_BN, entropy_BN = lm.predicted(hidden_BND, tokens_BN, self.temperature, entropy=True)
        if self.critic is None:
            return logp_BN, entropy_BN, None
        return logp_BN, entropy_BN, self.critic.values(params["value"], hidden_BND, batch, self.prompt)

    def measure(self, params: Mapping[str, Any], episodes: Batch) -> Batch:
        """The episodes with what is known of them before any update: "logp", "entropy", and "reference_logp" and
        "values" where there are such models; [B, N] float32, meaningless where the mask is 0."""
        logp_BN, entropy_BN, values_BN = self.respond(params, episodes)
        known = {**episodes, "logp": logp_BN, "entropy": entropy_BN}
        if values_BN is not None:
            known["values"] = values_BN
        if self.reference is not None:
            lm = self.reference.bind(params["reference"])
            hidden_BND, tokens_BN = response_hidden(lm, episodes, self.prompt), episodes["tokens"][:, self.prompt :]
            (known["reference_logp"],) = lm.predicted(hidden_BND, tokens_BN, self.temperature)
        return jax.lax.stop_gradient(known)


def masked_mean(x_BN: jax.Array, mask_BN: jax.Array) -> jax.Array:
    """Mean over the tokens of all episodes, float32 []."""
    return jnp.sum(jnp.where(mask_BN > 0, x_BN, 0.0)) / jnp.maximum(jnp.sum(mask_BN), 1.0)
