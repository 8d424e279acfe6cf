"""What of a model a stage trains: all its parameters, or adapters beside a base that stays as it is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from jaxgpt.config.schema import LoraConfig
from jaxgpt.models.heads import HEAD
from jaxgpt.models.lora import merged, split
from jaxgpt.models.net import Net, Params, count, joined
from jaxgpt.runs import ADAPTERS


@dataclasses.dataclass(frozen=True)
class Trained:
    """One model of a stage. `net` computes with `joined(frozen(), trained parameters)`."""

    net: Net
    first: Callable[[], Params]
    """The first trained parameters, on the mesh; new arrays at every call, for a state is used up by its step."""
    abstract: Params
    """Their shapes and shardings."""
    frozen: Callable[[], Params]
    """The others, always the same arrays: nothing, or the plain model's without a scalar model's head."""
    whole: Callable[[Params], Params]
    """Trained parameters to those of the plain model that computes the same."""
    beside: Callable[[Params], Mapping[str, Params]]
    """What is kept of trained parameters beside `whole`, by folder."""
    notes: tuple[str, ...] = ()


def trained(
    make: Callable[[LoraConfig | None], Net], load: Callable[[], Params], lora: LoraConfig | None, key: jax.Array
) -> Trained:
    """A model whose plain parameters `load` gives: trained whole, or with `lora` by adapters that `key` draws, and by
    its head where it has one. Call under `jax.set_mesh`."""
    if lora is None:
        plain = make(None)
        return Trained(plain, load, plain.abstract, dict, lambda params: params, lambda params: {})
    net = make(lora)
    abstract, rest = split(net.abstract, HEAD)
    start = functools.cache(lambda: split(load(), HEAD))  # (head, base)
    draw = jax.jit(lambda key: split(net.init(key))[0])
    merge = jax.jit(lambda params, base: merged(joined(base, params), lora))

    def first() -> Params:
        return joined(jax.tree.map(jnp.copy, start()[0]), draw(key))

    return Trained(
        net=net,
        first=first,
        abstract=abstract,
        frozen=lambda: start()[1],
        whole=lambda params: merge(params, start()[1]),
        beside=lambda params: {ADAPTERS: split(params)[0]},
        notes=(f"adapters: {count(abstract):,} parameters are trained, {count(rest):,} stay as they are",),
    )
