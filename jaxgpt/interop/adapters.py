"""Adapters as PEFT keeps them: adapter_config.json and adapter_model.safetensors.

Where one tensor holds several of our matrices (GPT-2's c_attn), their adapters become one, whose rank is the sum: the
As one below the other, each B in rows and columns of its own.

Writes files.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.interop.export import choose_family, whole
from jaxgpt.interop.family import Family
from jaxgpt.interop.folder import write_json
from jaxgpt.interop.layout import letters_of, tensor_shape, view
from jaxgpt.interop.tensor_files import DTYPES, write_tensors
from jaxgpt.interop.weights import paths_of, sizes_of
from jaxgpt.models.lora import PREFIX, WEIGHTS
from jaxgpt.models.net import Params

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
OUTER = "base_model.model."
"""What PEFT puts before a module's name."""


class Part(NamedTuple):
    """One of our adapters in a module of theirs."""

    a_NIL: np.ndarray
    b_NLO: np.ndarray
    outputs: str
    """Letters of B's outputs."""
    layout: str
    """Of the module's outputs."""


def write_adapters(
    folder: Path, model: ModelConfig, lora: LoraConfig, adapters: Params, dtype: str, base: str | None
) -> Family:
    """Writes a language model's adapters as a folder, whole or not at all. `model` has its vocabulary set; `dtype` is
    "F32" or "BF16"; `base` is the Hugging Face folder that they are for, where they were trained on one.

    Raises UserError where transformers has no class for the model.
    """
    family, rank = choose_family(model, "language"), lora.rank
    modules, swapped = _modules(family, adapters)
    shapes, made = {}, {}
    for name, parts in modules.items():
        sizes = sizes_of(model) | {"L": rank * len(parts)}
        for layer in range(model.layers):
            a, b = (f"{OUTER}{name.format(layer)}.lora_{side}.weight" for side in "AB")
            shapes[a] = (sizes["L"], parts[0].a_NIL[0].size // rank)
            shapes[b] = tensor_shape(f"{parts[0].layout} L", sizes)
            made[a] = made[b] = (parts, layer, sizes)

    def value(name: str) -> np.ndarray:
        parts, layer, sizes = made[name]
        tensor = np.zeros(shapes[name], DTYPES[dtype])
        for number, part in enumerate(parts):
            rows = slice(number * rank, (number + 1) * rank)
            if name.endswith("lora_A.weight"):
                tensor[rows] = part.a_NIL[layer].reshape(-1, rank).T
            else:
                view(tensor, f"{part.layout} L", f"L{part.outputs}", sizes)[rows] = part.b_NLO[layer]
        return tensor

    with whole(folder) as place:
        write_json(
            place / CONFIG, _config(lora, {_tail(name): len(parts) for name, parts in modules.items()}, swapped, base)
        )
        write_tensors(place / TENSORS, shapes, dtype, value)
    return family


def _modules(family: Family, adapters: Params) -> tuple[dict[str, list[Part]], bool]:
    """Their modules by name, {} for the number of the layer, and whether their matrices have inputs first."""
    arrays, found, swapped = paths_of(jax.device_get(adapters)), dict[str, list[Part]](), False
    for path in arrays:
        place, _, leaf = path.rpartition("/")
        if leaf != "a_IL":
            continue
        above, _, adapter = place.rpartition("/")
        weight = WEIGHTS[adapter.removeprefix(PREFIX)]
        name, layout = family.tensors[f"{above}/{weight}"]
        a_NIL, b_NLO = arrays[path], arrays[f"{place}/b_LO"]
        outputs = letters_of(weight)[a_NIL.ndim - 2 :]
        words = layout.split()
        last = next(word for word in words if {letter for letter in word if letter.isupper()} == set(outputs))
        swapped = swapped or words[-1] == last
        found.setdefault(name.removesuffix(".weight"), []).append(Part(a_NIL, b_NLO, outputs, last))
    return found, swapped


def _tail(module: str) -> str:
    """A module's name within its layer."""
    return module.partition("{}.")[2]


def _config(lora: LoraConfig, counts: dict[str, int], swapped: bool, base: str | None) -> dict[str, object]:
    """PEFT's settings; `counts` says how many of our adapters each module holds."""
    several = {name: count for name, count in counts.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": {name: lora.rank * count for name, count in several.items()},
        "alpha_pattern": {name: lora.alpha * count for name, count in several.items()},
        "target_modules": sorted(counts),
        "fan_in_fan_out": swapped,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
