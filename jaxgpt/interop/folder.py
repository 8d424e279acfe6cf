"""A Hugging Face model folder: its config.json, and its tensors by name.

Reads files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxgpt.data.records import read_object
from jaxgpt.errors import UserError, nearest
from jaxgpt.interop.tensor_files import DTYPES, Tensor, map_tensor, read_header

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_config.json"
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Folder:
    """An opened folder; made by `open`, which looks at headers alone."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Raises UserError where the folder is none, or is not whole: a shard missing, cut short, or not as indexed."""
        path = Path(path).expanduser()
        return cls(path, read_config(path), _tensors(path))

    def read(self, name: str, index: Index = ()) -> np.ndarray:
        """A part of a tensor, in its own type (bfloat16 as ml_dtypes has it): a view of the file until it is copied.

        Raises UserError where the tensor is of a type that weights cannot have.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise UserError(
                f"{tensor.file}: {name} is of type {tensor.dtype}; weights are read as {', '.join(DTYPES)}. Quantized "
                "models must be turned back into one of these first"
            )
        return map_tensor(tensor)[index]


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a folder. Raises UserError where there is none."""
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such folder.{nearest(path.name, siblings)}")
    file = path / CONFIG
    if not file.is_file():
        adapter = " It holds an adapter: merge it into its base model first." if (path / ADAPTER).is_file() else ""
        raise UserError(f"{path}: no {CONFIG} there, so it is no Hugging Face model folder.{adapter}")
    return read_object(file)


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file as transformers does."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(path: Path) -> dict[str, Tensor]:
    if (path / INDEX).is_file():
        return _indexed(path)
    if (path / SINGLE).is_file():
        return read_header(path / SINGLE)
    pickled = [name for name in PICKLED if (path / name).is_file()]
    if pickled:
        raise UserError(
            f"{path}: only {pickled[0]} there, which can run any code when it is read; expected {SINGLE}. Where you "
            f'trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{path}').save_pretrained('{path}-safe')\""
        )
    shards = sorted(p.name for p in path.glob("*.safetensors"))
    found = f"; {shards[0]} is there, its index is not" if shards else ""
    raise UserError(f"{path}: no weights there: expected {SINGLE}, or {INDEX} and its shards{found}")


def _indexed(path: Path) -> dict[str, Tensor]:
    """The tensors of all shards, which must be exactly those of the index."""
    where = read_object(path / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise UserError(f"{path / INDEX}: expected weight_map, the shard of each tensor by name")
    shards = sorted(set(where.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise UserError(f"{path / INDEX}: shard {outside[0]!r} is not a file of this folder")
    missing = [shard for shard in shards if not (path / shard).is_file()]
    if missing:
        lost = sum(shard in missing for shard in where.values())
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path}: shard {missing[0]}{more} is missing ({lost} of {len(where)} tensors, {len(shards)} shards); copy "
            "or download it again"
        )
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        for name, tensor in read_header(path / shard).items():
            if name in tensors:
                raise UserError(f"{path}: tensor {name} is twice there: in {tensors[name].file.name} and {shard}")
            tensors[name] = tensor
    for name, shard in where.items():
        if name not in tensors:
            raise UserError(f"{path / INDEX}: tensor {name} should be in {shard}, and is not there")
    return tensors
