"""Where finished models lie, and how they are loaded.

Reads files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxgpt.api.model import Model
from jaxgpt.config.schema import LoraConfig, MeshConfig, ModelConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.weights import read_params
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import HEAD, language_model, scalar_model
from jaxgpt.models.lora import merged, split
from jaxgpt.models.net import Params, joined
from jaxgpt.places import absolute as absolute_path
from jaxgpt.places import place
from jaxgpt.runs import find_stage, is_foreign
from jaxgpt.stages.run import vocabulary
from jaxgpt.train.checkpoint import abstract, load_checkpoint, load_params, params_meta


def load(path: str | Path, stage: str | None = None, mesh: MeshConfig | None = None) -> Model:
    """Loads a model: a finished stage's folder (runs/meadow/sft), a run's, whose last language model is taken, one
    checkpoint of a stage, finished or not (runs/meadow/sft/checkpoints/100), or a Hugging Face folder (hf:gpt2).

    The mesh defaults to one device. Raises UserError where there is no such model, or it is damaged.
    """
    devices = make_mesh(mesh or MeshConfig(data=1, fsdp=1, tensor=1))
    if is_foreign(path):
        return _foreign(find_stage(Path(path), stage), devices)
    path = place(path)
    if path.parent.name == "checkpoints" and path.is_dir() and stage is None:
        folder, home = path, path.parent.parent.parent / "tokenizer"
        with jax.set_mesh(devices):
            tree, host = load_checkpoint(path)
        meta, params = host.get("model", {}), tree["params"].get("policy", tree["params"])

        def read(target: Params) -> Params:
            return _placed(params, target) if "lora" not in meta else _adapted(params, meta, target, mesh)

    else:
        folder = find_stage(path, stage)
        meta, home = params_meta(folder / "params"), folder.parent / "tokenizer"

        def read(target: Params) -> Params:
            return load_params(folder / "params", target)

    lacking = [key for key in ("kind", "model", "vocab", "tokenizer") if key not in meta]
    if lacking:
        raise UserError(f"{folder}: not written by jaxgpt (no {', '.join(lacking)} beside the arrays)")
    tokenizer = Tokenizer.load(home)
    if tokenizer.hash != meta["tokenizer"]:
        raise UserError(f"{home} is not the tokenizer that {folder} was trained with")
    gain = meta.get("normalization", {}).get("gain", 1.0)
    return Model(folder, meta["kind"], ModelConfig(**meta["model"]), meta["vocab"], tokenizer, devices, read, gain)


def _placed(params: Params, target: Params) -> Params:
    return jax.tree.map(lambda x, t: jax.device_put(x, t.sharding), params, abstract(target))


def _adapted(params: Params, meta: Mapping[str, Any], target: Params, mesh: MeshConfig | None) -> Params:
    """The adapters of a checkpoint, and a scalar model's head, in the model that they were trained on."""
    lora, model = LoraConfig(**meta["lora"]), ModelConfig(**meta["model"])
    make = language_model if meta["kind"] == "language" else scalar_model
    placed = _placed(params, split(make(model, meta["vocab"], lora=lora).abstract, HEAD)[0])
    base = load(meta["base"], mesh=mesh).params
    kept = {name: part for name, part in base.items() if name in target and name not in HEAD}
    return merged(joined(kept, placed), lora)


def _foreign(path: Path, devices: jax.sharding.Mesh) -> Model:
    found = Foreign.describe(path)
    tokenizer = Tokenizer.load(found.path)
    return Model(
        found.path,
        found.kind,
        found.model,
        vocabulary(found.model, tokenizer, found.path, found.path),
        tokenizer,
        devices,
        lambda target: read_params(found, target),
        found.gain,
    )


def keep_compiled(folder: Path | None = None) -> None:
    """Keeps compiled programs between processes, in a folder or the user's cache, unless the environment of jax already
    says where."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = folder or Path.home() / ".cache" / "jaxgpt" / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(absolute_path(folder)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
