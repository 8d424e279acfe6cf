"""What stands on a backbone: the next token's logits, or one number for each token.

Letters: B batch, T time, D model width, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import P

from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.mesh import LAYOUT
from jaxgpt.models.kernels import project
from jaxgpt.models.net import Net, functional
from jaxgpt.models.sequence import cut
from jaxgpt.models.transformer import Backbone
from jaxgpt.models.vocabulary import predictions

HEAD = ("head_D", "bias")
"""The parameters of a scalar model that are not its backbone's."""


class LanguageModel(nnx.Module):
    """A distribution over the next token."""

    def __init__(
        self, c: ModelConfig, vocab: int, rngs: nnx.Rngs, dropout: float = 0.0, lora: LoraConfig | None = None
    ):
        self.c = c
        self.backbone = Backbone(c, vocab, rngs, dropout, lora)
        std = c.width**-0.5 if c.init_std == "fan_in" else c.init_std
        unembed = None if c.tied else jax.random.normal(rngs.params(), (vocab, c.width)) * std
        self.unembed_VD = (
            None if unembed is None else nnx.Param(unembed, out_sharding=(LAYOUT["vocab"], LAYOUT["width"]))
        )

    def hidden(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        seeds_B: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states that predict the token after each position, [B, T, D]: in the order of the tokens, whole."""
        return cut(tokens_BT.shape[1]).natural(self.backbone(tokens_BT, segments_BT, positions_BT, seeds_B))

    def logp(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array,
        positions_BT: jax.Array,
        targets_BT: jax.Array,
        seeds_B: jax.Array | None = None,
    ) -> jax.Array:
        """log p of a target behind each position: nats, float32 [B, T]. Where the mesh splits time, so is all of it."""
        order = cut(tokens_BT.shape[1])
        hidden_BTD = self.backbone(tokens_BT, segments_BT, positions_BT, seeds_B)
        with jax.named_scope("head"):
            return order.natural(self.predicted(hidden_BTD, order.place(targets_BT))[0])

    def predicted(
        self,
        hidden_BTD: jax.Array,
        targets_BT: jax.Array,
        temperature: float | jax.Array = 1.0,
        *,
        entropy: bool = False,
    ) -> tuple[jax.Array, ...]:
        """log p of the targets and, where asked for, the entropy of each prediction, at a temperature: nats, float32
        [B, T] each."""
        return predictions(hidden_BTD, self._matrix, targets_BT, self._bounded, temperature, entropy=entropy)

    @property
    def _matrix(self) -> jax.Array:
        return (self.backbone.embed_VD if self.unembed_VD is None else self.unembed_VD)[...]

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Unnormalised log-probabilities of the next token, [B, T, V] float32."""
        return self._bounded(project(hidden_BTD, self._matrix.T, dtype=jnp.float32)[0])

    def _bounded(self, logits: jax.Array) -> jax.Array:
        logits = logits * self.c.logit_scale
        cap = self.c.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class ScalarModel(nnx.Module):
    """A number at every token: the reward model reads the last one, the critic all."""

    def __init__(self, c: ModelConfig, vocab: int, rngs: nnx.Rngs, lora: LoraConfig | None = None):
        self.backbone = Backbone(c, vocab, rngs, lora=lora)
        head_D = jax.random.normal(rngs.params(), (c.width,)) * (c.width + 1) ** -0.5
        self.head_D = nnx.Param(head_D, out_sharding=(None,))
        self.bias = nnx.Param(jnp.zeros((), out_sharding=P()))

    def __call__(self, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Scores, [B, T] float32."""
        hidden_BTD = self.backbone(tokens_BT, segments_BT, positions_BT).astype(jnp.float32)
        scores_BT = jnp.einsum("btd,d->bt", hidden_BTD, self.head_D[...], precision="highest")  # not bf16 on TPUs
        return cut(tokens_BT.shape[1]).natural(scores_BT + self.bias[...])


def language_model(c: ModelConfig, vocab: int, dropout: float = 0.0, lora: LoraConfig | None = None) -> Net:
    """A language model as pure functions, with adapters where `lora` asks for them; call under `jax.set_mesh`."""
    return functional(lambda rngs: LanguageModel(c, vocab, rngs, dropout, lora))


def scalar_model(c: ModelConfig, vocab: int, lora: LoraConfig | None = None) -> Net:
    """A reward or value model as pure functions, with adapters where `lora` asks for them; call under
    `jax.set_mesh`."""
    return functional(lambda rngs: ScalarModel(c, vocab, rngs, lora))
