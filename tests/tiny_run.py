"""A finished run made without training: a small tokenizer and random parameters, in the files that a run leaves."""

import functools
import json
from pathlib import Path

import jax
import numpy as np

import jaxgpt
from jaxgpt.config.schema import AttentionConfig, ModelConfig, TokenizerConfig
from jaxgpt.data.tokenizer import train_tokenizer
from jaxgpt.mesh import AXES
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import Net, Params
from jaxgpt.train.checkpoint import abstract, save_params

CONTEXT, VOCAB = 64, 384
CONFIG = ModelConfig(width=32, layers=1, context=CONTEXT, attention=AttentionConfig(heads=4, kv_heads=2))
SENTENCES = ["What is the cat? It is black.\n", "Tell me a story. One day the cat met a dog.\n"]
KINDS = {"pretrain": "language", "sft": "language", "reward": "scalar"}
LIKELY_END = 2.0
"""Factor of the end token's embedding: some responses end, and some do not."""

load_once = functools.cache(jaxgpt.load)
"""Models are not changed by their use, so tests may share them and their compiled programs."""


def random_params(net: Net, seed: int) -> Params:
    """Parameters on the current mesh, drawn by NumPy (nothing to compile) and the same on every mesh."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.normal(scale=0.25, size=leaf.shape) + ("scale" in jax.tree_util.keystr(path))
        return jax.device_put(x.astype(np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract(net.abstract))


@functools.cache
def make_run(run: Path) -> Path:
    """Writes a run with the finished stages of KINDS; once, however many ask for it."""
    tokenizer = train_tokenizer(SENTENCES * 20, TokenizerConfig(vocab=320))
    tokenizer.save(run / "tokenizer")
    meta = {"model": CONFIG.model_dump(mode="json"), "vocab": VOCAB, "tokenizer": tokenizer.hash}
    with jax.set_mesh(jax.make_mesh((1, 1, 1, 1), AXES, devices=jax.devices()[:1])):
        for seed, (stage, kind) in enumerate(KINDS.items()):
            params = random_params((language_model if kind == "language" else scalar_model)(CONFIG, VOCAB), seed)
            embed_VD = params["backbone"]["embed_VD"]
            louder = np.asarray(embed_VD) * np.where(np.arange(VOCAB) == tokenizer.eos, LIKELY_END, 1)[:, None]
            params["backbone"]["embed_VD"] = jax.device_put(louder.astype(np.float32), embed_VD.sharding)
            mark = save_params(run / stage / "params", params, {"kind": kind, **meta})
            (run / stage / "done.json").write_text(json.dumps({"step": 1, "fingerprint": mark}))
    return run
