"""Parameters from the tensors of a folder and back, one at a time: no copy of the model is ever whole on the host.

Reads and writes files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgpt.config.schema import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.interop.family import Family
from jaxgpt.interop.folder import INDEX, SINGLE, Folder, write_json
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.layout import letters_of, tensor_shape, view
from jaxgpt.interop.tensor_files import DTYPES, write_tensors
from jaxgpt.models.net import Params
from jaxgpt.train.checkpoint import abstract

LAYERS = "/blocks/"
"""In the paths of arrays that hold all layers."""
OFFSET = "bias"
"""The score's offset, a setting of config.json (`score_bias`): transformers' classifiers have none."""
BUFFERS = re.compile(
    r"(rotary_emb\.(inv_freq|cos_cached|sin_cached)|position_ids|attn(\.attention)?\.(masked_)?bias"
    r"|attention\.(masked_)?bias)$"
)
"""Tensors that are no parameters; older versions of transformers saved them."""


class Part(NamedTuple):
    """One of our arrays, or one layer of it, in a tensor."""

    path: str
    layer: int | None
    layout: str


def sizes_of(model: ModelConfig) -> dict[str, int]:
    """The length of every letter of a layout; the model's vocabulary is set."""
    assert model.vocab is not None
    return {
        "V": model.vocab,
        "D": model.width,
        "F": model.hidden,
        "H": model.attention.heads,
        "G": model.kv_heads,
        "K": model.head_dim,
        "T": model.context,
    }


def paths_of(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path: "backbone/blocks/mlp/up_DF"."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def parts_of(family: Family, tree: Any) -> dict[str, list[Part]]:
    """Every tensor of a model of that family, by the name that is written, and what of ours lies in it."""
    found: dict[str, list[Part]] = {}
    for path, leaf in paths_of(tree).items():
        if path == OFFSET:
            continue
        name, layout = family.tensors[path]
        name = name.partition("|")[0]
        if LAYERS not in path:
            found.setdefault(name, []).append(Part(path, None, layout))
            continue
        for layer in range(leaf.shape[0]):
            found.setdefault(name.format(layer), []).append(Part(path, layer, layout))
    return found


def read_params(foreign: Foreign, target: Params) -> Params:
    """The parameters of a folder in the shapes and shardings of `target`, on the current mesh.

    Raises UserError where the folder's tensors are not exactly those of the model, before any of them is read.
    """
    return _Reader(foreign, target).params()


class _Reader:
    """The tensors of a folder as our arrays."""

    def __init__(self, foreign: Foreign, target: Params):
        self._folder, self._family, self._target = Folder.open(foreign.path), foreign.family, target
        self._sizes = sizes_of(foreign.model)
        bare = not any(name.startswith(self._family.base) for name in self._folder.tensors)
        self._base = self._family.base if bare else ""  # a folder of the inner model alone has names without it
        self._check()

    def _names(self, path: str) -> list[str]:
        """What a tensor can be called in this folder; {} is the number of the layer."""
        return [name.removeprefix(self._base) for name in self._family.tensors[path].name.split("|")]

    def _name(self, path: str, layer: int | None) -> str:
        names = [name if layer is None else name.format(layer) for name in self._names(path)]
        return next((name for name in names if name in self._folder.tensors), names[0])

    def _check(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for path, leaf in paths_of(self._target).items():
            if path == OFFSET:
                continue
            shape = tensor_shape(self._family.tensors[path].layout, self._sizes)
            for layer in range(leaf.shape[0]) if LAYERS in path else [None]:
                expected[self._name(path, layer)] = shape
        problems = []
        for name, shape in expected.items():
            found = self._folder.tensors.get(name)
            if found is None:
                problems.append(f"{name} is not there, expected {list(shape)}")
            elif found.shape != shape:
                problems.append(f"{name} is {list(found.shape)} in {found.file.name}, expected {list(shape)}")
        tied = {name for name in self._names("unembed_VD") if "unembed_VD" not in self._target}
        for name in self._folder.tensors.keys() - expected.keys() - tied:
            if not BUFFERS.search(name):
                problems.append(f"{name} has no place in {self._family.causal} with these settings")
        if problems:
            shown = "".join(f"\n  {problem}" for problem in sorted(problems)[:8])
            more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise UserError(f"{self._folder.path}: the tensors are not those that config.json describes:{shown}{more}")

    def params(self) -> Params:
        """All arrays on the current mesh, each device's part read from the files by itself."""

        def read(keys: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            path = _path(keys)
            array = jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: self._part(path, leaf, at))
            return array.block_until_ready()  # so that the host's copy of one is gone before the next is read

        return jax.tree_util.tree_map_with_path(read, abstract(self._target))

    def _part(self, path: str, leaf: Any, at: tuple[slice, ...]) -> np.ndarray:
        """A part of one array, in its dtype."""
        if path == OFFSET:
            return np.asarray(self._folder.config.get("score_bias", 0.0), leaf.dtype)
        out = np.empty([len(range(*s.indices(n))) for s, n in zip(at, leaf.shape, strict=True)], leaf.dtype)
        if LAYERS not in path:
            out[...] = self._array(path, None)[at]
            return out
        for i, layer in enumerate(range(*at[0].indices(leaf.shape[0]))):
            out[i] = self._array(path, layer)[at[1:]]
        return out

    def _array(self, path: str, layer: int | None) -> np.ndarray:
        tensor = self._folder.read(self._name(path, layer))
        return view(tensor, self._family.tensors[path].layout, letters_of(path), self._sizes)


def write_weights(
    folder: Path, family: Family, model: ModelConfig, params: Params, dtype: str, largest: int
) -> list[str]:
    """Writes all tensors as safetensors of at most `largest` bytes, and their index; returns the files' names.

    Rows of the embedding beyond `model.vocab` are left out, and rows that it lacks are zeros. `dtype` is as in the
    files' headers: "F32" or "BF16".
    """
    sizes, arrays, parts = sizes_of(model), paths_of(params), parts_of(family, params)
    shapes = {name: tensor_shape(inside[0].layout, sizes) for name, inside in parts.items()}
    shards = list(_shards(shapes, DTYPES[dtype].itemsize, largest))
    count = len(shards)
    named = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

    def value(name: str) -> np.ndarray:
        tensor = np.empty(shapes[name], DTYPES[dtype])
        for path, layer, layout in parts[name]:
            array = jax.device_get(arrays[path] if layer is None else arrays[path][layer])
            letters = letters_of(path)
            whole = view(tensor, layout, letters, sizes)
            if letters[0] == "V":
                whole[len(array) :] = 0
                array, whole = array[: len(whole)], whole[: len(array)]
            whole[...] = array
        return tensor

    for file, shard in zip(named, shards, strict=True):
        write_tensors(folder / file, {name: shapes[name] for name in shard}, dtype, value)
    if count > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * DTYPES[dtype].itemsize
        where = {name: file for file, shard in zip(named, shards, strict=True) for name in shard}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    return named


def _shards(shapes: Mapping[str, tuple[int, ...]], width: int, largest: int) -> Iterator[list[str]]:
    """Names in order, cut where the next tensor would make a file too large."""
    shard: list[str] = []
    size = 0
    for name, shape in shapes.items():
        more = width * math.prod(shape)
        if shard and size + more > largest:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += more
    yield shard
