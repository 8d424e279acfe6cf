"""Reward models whose tokenizers have no piece that pads: transformers, padding by the exported folder's own
tokenizer, gives our scores."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from test_tokenizer_files import byte_level, learned
from tiny_run import CONFIG, random_params

import jaxgpt
from jaxgpt.api import Model
from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_json import TokenizerJson
from jaxgpt.interop.export import write_folder
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import scalar_model
from jaxgpt.models.net import Params

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

GPT2 = ModelConfig(
    width=32,
    layers=2,
    context=256,
    attention={"heads": 4, "qkv_bias": True, "out_bias": True},
    mlp={"type": "gelu_tanh", "bias": True},
    norm={"type": "layernorm", "bias": True},
    positions={"type": "learned"},
    tied=True,
)
LLAMA = CONFIG.model_copy(update={"context": 256})
MADE = {
    "byte-level": byte_level,
    "byte-level, padded by eos": lambda: TokenizerJson(byte_level().data, {"pad_token": "<|endoftext|>"}),
    "sentencepiece": learned,
    "sentencepiece, padded by eos": lambda: SentencePieceModel(learned().data, {"pad_token": "</s>"}),
}
CHATS = [
    [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": text}]
    for text in ("Me.", "The fox sleeps in the old barn. " * 3, "")
]


def made(folder: Path, config: ModelConfig, tokenizer: Tokenizer, spare: int) -> Model:
    """A random reward model of a vocabulary of `spare` more rows than the tokenizer needs, and its exported folder."""
    config = config.model_copy(update={"vocab": tokenizer.size + spare})
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))

    def drawn(_: Params) -> Params:
        return random_params(scalar_model(config, config.vocab), 3)

    ours = Model(folder, "scalar", config, config.vocab, tokenizer, mesh, drawn)
    with jax.set_mesh(mesh):
        write_folder(folder, "scalar", config, ours.params, tokenizer, "F32", 10**9)
    return ours


@pytest.mark.parametrize("engine", MADE)
@pytest.mark.parametrize(("config", "spare"), [(GPT2, 0), (LLAMA, 0), (LLAMA, 5)], ids=["gpt2", "llama", "llama+5"])
def test_scores_of_a_batch_that_the_folders_tokenizer_pads(engine, config, spare, tmp_path):
    tokenizer = Tokenizer(MADE[engine]())
    folder = tmp_path / "reward"
    ours = made(folder, config, tokenizer, spare)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    settings = json.loads((folder / "config.json").read_text())
    assert theirs.pad_token_id == settings["pad_token_id"] == model.config.pad_token_id != tokenizer.eos
    added = tokenizer.size if "byte" in engine else tokenizer.unk
    assert theirs.pad_token_id == added
    assert settings["vocab_size"] == max(tokenizer.size + spare, added + 1)
    rows = theirs.apply_chat_template(CHATS, return_dict=True, return_tensors="pt", padding=True)
    assert (rows["attention_mask"] == 0).any()
    with torch.no_grad():
        found = model(**rows).logits[:, 0].numpy() + model.config.score_bias
    expected = ours.score(CHATS)
    assert np.ptp(expected) > 0.1 and np.abs(found - expected).max() < 1e-5
    back = jaxgpt.load(f"hf:{folder}")
    assert np.abs(np.asarray(back.score(CHATS)) - expected).max() < 1e-6
