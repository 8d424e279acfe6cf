"""A model as pure functions over a nested dict of arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Params = Mapping[str, Any]
"""A nested dict of arrays."""


@dataclasses.dataclass(frozen=True)
class Net:
    """A model's parameters and computation, apart from each other.

    `init(key)` makes parameters, `bind(params)` gives the module that computes with them (inside a traced function, and
    never kept), `abstract` holds shapes, dtypes and shardings.
    """

    init: Callable[[jax.Array], Params]
    bind: Callable[[Params], Any]
    abstract: Params


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> Net:
    """Turns a module's constructor into a Net. Call it under `jax.set_mesh`: the shapes then carry shardings."""

    def construct(key: jax.Array) -> nnx.Module:
        return build(nnx.Rngs(params=key))

    graph, state = nnx.split(jax.eval_shape(lambda: construct(jax.random.key(0))))
    return Net(
        init=lambda key: nnx.to_pure_dict(nnx.state(construct(key))),
        bind=lambda params: nnx.merge(graph, params),
        abstract=nnx.to_pure_dict(state),
    )


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def joined(first: Params, second: Params) -> Params:
    """One tree of the leaves of two that share none, as frozen parameters and those that are trained."""
    both = {**first, **second}
    return {
        name: joined(first[name], second[name]) if name in first and name in second else part
        for name, part in both.items()
    }
