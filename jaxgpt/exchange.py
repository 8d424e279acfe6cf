"""The verbs that take models in and out: `import` and `export`.

Reads and writes folders.
"""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import yaml
from rich.console import Console

from jaxgpt.api import keep_compiled, load
from jaxgpt.config.options import Export, Import
from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop.adapters import write_adapters
from jaxgpt.interop.export import whole, write_folder
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.weights import read_params
from jaxgpt.mesh import check_model, make_mesh
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.lora import split
from jaxgpt.models.net import count
from jaxgpt.runs import ADAPTERS, FOREIGN, IMPORTED, KINDS, find_adapters, is_foreign
from jaxgpt.stages.run import vocabulary
from jaxgpt.train.checkpoint import load_params, params_meta, save_params

DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def import_folder(folder: Path, wanted: Import) -> int:
    """Reads a Hugging Face folder and writes it as a run whose one result is `imported`; returns 0.

    Raises UserError where anything of it cannot be read exactly; nothing is left then.
    """
    keep_compiled()
    console, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    foreign = Foreign.describe(folder)
    tokenizer = Tokenizer.load(wanted.tokenizer or foreign.path, wanted.template)
    vocab = vocabulary(foreign.model, tokenizer, foreign.path, Path(wanted.tokenizer or foreign.path))
    mesh = make_mesh(wanted.mesh)
    check_model(mesh, foreign.model, vocab)
    out = Path(wanted.out or f"runs/{foreign.path.resolve().name}").expanduser()
    model = foreign.model.model_dump(mode="json")
    with _stoppable(), whole(out) as part, jax.set_mesh(mesh):
        net = (language_model if foreign.kind == "language" else scalar_model)(foreign.model, vocab)
        params = read_params(foreign, net.abstract)
        home = part / IMPORTED
        home.mkdir()
        meta = {"kind": foreign.kind, "model": model, "vocab": vocab, "tokenizer": tokenizer.hash}
        if foreign.kind == "scalar":
            meta |= {"normalization": {"gain": foreign.gain}}
        mark = save_params(home / "params", params, meta)
        (home / "config.yaml").write_text(yaml.safe_dump({"from": str(folder), "model": model}, sort_keys=False))
        tokenizer.save(part / "tokenizer")
        (home / "done.json").write_text(json.dumps({"fingerprint": mark, "params": count(params)}, indent=1) + "\n")
    console.print(
        f"{foreign.family.causal if foreign.kind == 'language' else foreign.family.classifier}  "
        f"{count(params):,} parameters, {tokenizer.size:,} tokens  {time.monotonic() - began:.1f} s"
    )
    use = (
        f'jaxgpt sample {shlex.quote(str(out))} "Once upon a time"'
        if foreign.kind == "language"
        else f"ppo.rewards='[{{type: model, models: {out}}}]'"
    )
    console.print(f"{out}   {KINDS[foreign.kind]}; next: {use}, or init={out} in a stage")
    return 0


def export(run: Path, folder: Path, wanted: Export) -> int:
    """Writes a finished model as a Hugging Face folder; returns 0.

    Raises UserError where transformers has no class that computes it; nothing is left then.
    """
    keep_compiled()
    console, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    model = load(run, wanted.stage, wanted.mesh)
    vocab = model.config.vocab or model.tokenizer.size  # rows that pad the embedding for our own sake stay here
    config = model.config.model_copy(update={"vocab": vocab})
    with _stoppable(), jax.set_mesh(model.mesh):
        family = write_folder(
            folder,
            model.kind,
            config,
            model.params,
            model.tokenizer,
            DTYPES[wanted.dtype],
            int(wanted.shard_gb * 1e9),
            model.gain,
        )
    size = sum(file.stat().st_size for file in folder.iterdir())
    name = family.causal if model.kind == "language" else family.classifier
    console.print(
        f"{folder}   {name}, {wanted.dtype}, {count(model.params):,} parameters, {size / 1e6:,.1f} MB   "
        f"{time.monotonic() - began:.1f} s"
    )
    if model.kind == "scalar":
        bias = float(model.params["bias"])
        console.print(f"transformers' {name} has no bias: a score is its logit + config.score_bias ({bias:.6g})")
    console.print(
        f"{folder / 'README.md'} tells what transformers does with control tokens in users' text", style="dim"
    )
    return 0


def export_adapters(run: Path, folder: Path, wanted: Export) -> int:
    """Writes the adapters of a finished stage in PEFT's format; returns 0.

    Raises UserError where the stage has none or is a reward model, or where transformers has no class for the model.
    """
    console, began = Console(highlight=False, soft_wrap=True), time.monotonic()
    stage = find_adapters(run, wanted.stage)
    kind, meta = params_meta(stage / "params")["kind"], params_meta(stage / ADAPTERS)
    if kind != "language":
        raise UserError(
            f"{stage} holds {KINDS[kind]}, whose head is no adapter; export it whole, without adapters=true"
        )
    lora, model, vocab = LoraConfig(**meta["lora"]), ModelConfig(**meta["model"]), meta["vocab"]
    mesh = make_mesh(wanted.mesh)
    check_model(mesh, model, vocab)
    foreign = str(meta["base"]).removeprefix(FOREIGN) if is_foreign(meta["base"]) else None
    with _stoppable(), jax.set_mesh(mesh):
        adapters = load_params(stage / ADAPTERS, split(language_model(model, vocab, lora=lora).abstract)[0])
        config = model.model_copy(update={"vocab": vocab})
        family = write_adapters(folder, config, lora, adapters, DTYPES[wanted.dtype], foreign)
    console.print(
        f"{folder}   adapters for {family.causal}, {wanted.dtype}, {count(adapters):,} parameters   "
        f"{time.monotonic() - began:.1f} s"
    )
    if foreign is None:
        base = shlex.quote(str(meta["base"]))
        console.print(f"they are for the model of jaxgpt export {base} HF_FOLDER")
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, so that what is half-written is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
