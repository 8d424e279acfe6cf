"""Files, settings and untrained parents for stages that take seconds."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import jax

from jaxgpt.config.schema import Config, MeshConfig
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.data.tokens import write_tokens
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.stages.run import Run
from jaxgpt.train.checkpoint import save_params
from jaxgpt.train.loop import Stage
from jaxgpt.train.state import State, initial_state

ANIMALS, THINGS = ("fox", "owl", "cat", "bear"), ("moon", "hat", "lake", "drum")
VOCAB = 128
TRAINED = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo", "rloo", "rejection")
BOTH = [{"type": "model"}, {"type": "length", "target": 3, "weight": 0.5}]
OPTIMIZER = {"lr": 1e-2, "warmup": 0.0, "schedule": "constant"}


def _write(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_data(runs: Path) -> Path:
    """Texts, conversations, rankings, prompts, a tokenizer of single characters, and token shards."""
    rng, home = Random(0), runs / "small"
    home.mkdir()
    texts = [f"a {rng.choice(ANIMALS)} saw a {rng.choice(THINGS)}. " * 3 for _ in range(60)]
    _write(home / "text.jsonl", [{"text": text} for text in texts])
    asked = [(f"a {animal}?", f"saw a {thing}") for animal in ANIMALS for thing in THINGS]
    talks = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}, *more]
        for q, a in asked
        for more in ([], [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "ok"}])
    ]
    _write(home / "talks.jsonl", [{"messages": talk} for talk in talks])
    _write(home / "talks_eval.jsonl", [{"prompt": "an owl?", "completion": "saw a hat"}])
    ranked = [{"prompt": q, "responses": [a, "no", "saw"], "ranks": [1, 3, 2]} for q, a in asked[::4]]
    ranked += [{"prompt": f"{thing}?", "chosen": "a lake", "rejected": "no"} for thing in THINGS]
    _write(home / "rankings.jsonl", ranked)
    _write(home / "rankings_eval.jsonl", [{"prompt": "the fox?", "responses": ["a hat", "no"], "ranks": [1, 2]}])
    _write(home / "prompts.jsonl", [{"prompt": f"a {animal}{'!' * n}"} for animal in ANIMALS for n in range(4)])
    tokenizer = small_tokenizer(home)
    write_tokens(texts, tokenizer, home / "tokens" / "text", 0.1, "document")
    return runs


def small_tokenizer(home: Path) -> Tokenizer:
    """Trains it the first time."""
    if not (home / "tokenizer").exists():
        config = Config().tokenizer.model_copy(update={"model_type": "char", "vocab": 64, "byte_fallback": False})
        words = [*ANIMALS, *THINGS, "a saw no why ok the an ?!."]
        train_tokenizer([" ".join(words)] * 5, config).save(home / "tokenizer")
    return Tokenizer.load(home / "tokenizer")


def config(runs: Path, **changes: dict[str, Any]) -> Config:
    """All four stages and DPO; `changes` are laid over the sections of their names."""
    sections: dict[str, Any] = {
        "model": {"width": 16, "layers": 1, "context": 32, "attention": {"heads": 2}, "mlp": {"width": 16}},
        "data": {"path": "{run}/text.jsonl", "val_fraction": 0.1},
        "pretrain": {"steps": 12, "batch": 8, "context": 24},
        "sft": {
            "steps": 12,
            "batch": 8,
            "context": 32,
            "data": {"path": "{run}/talks.jsonl", "eval_path": "{run}/talks_eval.jsonl"},
        },
        "reward": {
            "steps": 12,
            "batch": 8,
            "context": 32,
            "responses": 3,
            "data": {"path": "{run}/rankings.jsonl", "eval_path": "{run}/rankings_eval.jsonl"},
        },
        "ppo": {
            "iterations": 2,
            "episodes": 8,
            "batch": 4,
            "epochs": 2,
            "prompt_length": 14,
            "response_length": 6,
            "data": {"path": "{run}/prompts.jsonl"},
        },
        "dpo": {
            "steps": 12,
            "batch": 8,
            "context": 32,
            "data": {"path": "{run}/rankings.jsonl", "eval_path": "{run}/rankings_eval.jsonl"},
        },
    }
    prompts = {name: sections["ppo"][name] for name in ("iterations", "prompt_length", "response_length", "data")}
    sections["grpo"] = {**prompts, "episodes": 8, "responses": 4, "batch": 4, "rewards": BOTH}
    sections["rloo"] = {**prompts, "episodes": 8, "responses": 2, "batch": 8, "epochs": 2}
    sections["rejection"] = {**prompts, "episodes": 32, "responses": 4, "batch": 4}
    for name in TRAINED:
        sections[name] |= {"optimizer": OPTIMIZER}
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    return Config(name="small", runs=str(runs), **sections)


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor))


def open_run(config: Config, mesh: jax.sharding.Mesh) -> Run:
    """Call under `jax.set_mesh(mesh)`."""
    return Run.open(config, small_tokenizer(Path(config.runs) / config.name), mesh)


def finished(run: Run, name: str, seed: int, spread: float = 1.0) -> str:
    """Random parameters in the place of a trained stage; `spread` over the initializer's. Returns their fingerprint."""
    kind, make = ("scalar", scalar_model) if name == "reward" else ("language", language_model)
    net, home = make(run.config.model, run.vocab), run.folder / name
    params = jax.jit(net.init)(jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf * spread if leaf.ndim > 1 else leaf, params)
    mark = save_params(home / "params", params, run.meta(kind))
    (home / "done.json").write_text(json.dumps({"fingerprint": mark}))
    return mark


def first_state(stage: Stage) -> State:
    extras = {name: jax.numpy.float32(value) for name, value in stage.extras.items()}
    return jax.jit(lambda params: initial_state(params, stage.tx, extras))(stage.init())
