"""Adapters as parameters: apart from the model they stand in, and added into its matrices.

Letters: N layers, I inputs, L rank, O outputs.
"""

from __future__ import annotations

from collections.abc import Collection

import jax
import jax.numpy as jnp

from jaxgpt.config.schema import LoraConfig
from jaxgpt.models.net import Params

PREFIX = "lora_"
"""What the name of an adapter begins with; the rest is its target."""
WEIGHTS = {
    "q": "q_DHK",
    "k": "k_DGK",
    "v": "v_DGK",
    "o": "o_HKD",
    "up": "up_DF",
    "gate": "gate_DF",
    "down": "down_FD",
}
"""The matrix that stands beside the adapter of a target."""


def split(params: Params, others: Collection[str] = ()) -> tuple[Params, Params]:
    """(adapters, all else): two trees that `joined` puts together again. Works on abstract parameters too.

    Arrays of the names in `others` go with the adapters.
    """
    adapters, base = {}, {}
    for name, part in params.items():
        if name.startswith(PREFIX) or name in others:
            adapters[name] = part
        elif isinstance(part, dict):
            inner = split(part, others)
            adapters |= {name: inner[0]} if inner[0] else {}
            base |= {name: inner[1]} if inner[1] else {}
        else:
            base[name] = part
    return adapters, base


def merged(params: Params, config: LoraConfig) -> Params:
    """The model without adapters that computes the same: W + A B alpha / rank for every matrix that has one.

    `params` is the joined tree; matrices without an adapter are the same arrays. Call under `jax.set_mesh`.
    """
    adapters = {name: part for name, part in params.items() if name.startswith(PREFIX)}
    plain = {
        name: merged(part, config) if isinstance(part, dict) else part
        for name, part in params.items()
        if name not in adapters
    }
    for name, part in adapters.items():
        weight = WEIGHTS[name.removeprefix(PREFIX)]
        plain[weight] = plain[weight] + product(part["a_IL"], part["b_LO"]) * config.scale
    return plain


def product(a_NIL: jax.Array, b_NLO: jax.Array) -> jax.Array:
    """A B of every layer, [N, I, O], in full precision; I and O are of one dimension or two."""
    return jax.vmap(lambda a_IL, b_LO: jnp.tensordot(a_IL, b_LO, axes=1, precision="highest"))(a_NIL, b_NLO)
