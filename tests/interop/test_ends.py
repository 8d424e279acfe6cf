"""Folders that list several end tokens: a response stops at the first of any, as transformers' generate does."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from test_tokenizer_files import byte_level, learned

import jaxgpt
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_json import TokenizerJson
from jaxgpt.interop.export import write_folder
from jaxgpt.interop.tokenizer_files import tokenizer_files, with_pad

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

PROMPTS = ["The fox", "Who?", "mississippi banana"]
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random GPT-2 that transformers wrote, with a byte-level tokenizer."""
    home = tmp_path_factory.mktemp("several")
    tokenizer = Tokenizer(byte_level(llama3=True))
    for name, data in tokenizer_files(tokenizer, context=128).items():
        (home / name).write_bytes(data)
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": tokenizer.size}
    config = transformers.GPT2Config(**sizes, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(home)
    return home


def theirs(folder: Path, new: int = 24) -> list[list[int]]:
    """Greedy responses, up to and with the end token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for prompt in PROMPTS:
        row = tokenizer(prompt, return_tensors="pt")
        whole = model.generate(**row, max_new_tokens=new, do_sample=False, pad_token_id=0)[0].tolist()
        found.append(whole[row["input_ids"].shape[1] :])
    return found


def name_ends(folder: Path, ends: list[int]) -> None:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": ends}))


def test_a_response_stops_at_the_second_end_as_in_transformers(folder, tmp_path):
    eos = Tokenizer.load(folder).eos
    name_ends(folder, [eos])
    long = theirs(folder)
    ends = sorted({long[0][5], long[2][2]})
    name_ends(folder, [eos, *ends])
    model = jaxgpt.load(f"hf:{folder}")
    assert model.tokenizer.ends == (eos, *ends)
    expected = theirs(folder)
    assert [len(row) for row in expected] != [len(row) for row in long] and len(expected[2]) <= 3
    ours = model.generate(PROMPTS, max_tokens=24, temperature=0)
    assert [one.tokens for one in ours] == expected
    for one in ours:
        assert one.ended == (one.tokens[-1] in model.tokenizer.ends)
        assert one.text == model.decode(one.tokens[:-1] if one.ended else one.tokens)
    assert model._advance._cache_size() == 1
    with jax.set_mesh(model.mesh):
        write_folder(tmp_path / "out", "language", model.config, model.params, model.tokenizer, "F32", 10**9)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [eos, *ends]
    assert theirs(tmp_path / "out") == expected
    again = Tokenizer.load(tmp_path / "out")
    assert (again.ends, again.hash) == (model.tokenizer.ends, model.tokenizer.hash)


@pytest.mark.parametrize("config", ["generation_config.json", "config.json"])
def test_ends_are_read_kept_and_hashed(config, tmp_path):
    for name, engine in {"json": byte_level(llama3=True), "model": learned()}.items():
        plain = Tokenizer(engine)
        home, more = tmp_path / name, (3, 5)
        plain.save(home)
        assert "end_tokens" not in json.loads((home / "tokenizer_config.json").read_text())
        (home / config).write_text(json.dumps({"eos_token_id": plain.eos}))
        assert (Tokenizer.load(home).ends, Tokenizer.load(home).hash) == ((plain.eos,), plain.hash)
        (home / config).write_text(json.dumps({"eos_token_id": [5, plain.eos, 3, 10**6]}))
        several = Tokenizer.load(home)
        assert several.eos == plain.eos and several.ends == (plain.eos, *more) and several.hash != plain.hash
        several.save(tmp_path / f"{name}-saved")
        back = Tokenizer.load(tmp_path / f"{name}-saved")
        assert (back.ends, back.hash) == (several.ends, several.hash)


def test_an_added_token_that_ends_is_one_that_no_text_encodes_to():
    spec = json.loads(byte_level(llama3=True).data)
    user = next(token for token in spec["added_tokens"] if token["content"] == ROLES[1])
    user["special"] = False
    data = json.dumps(spec).encode()
    assert user["id"] in TokenizerJson(data).encode(ROLES[1])
    assert user["id"] not in TokenizerJson(data, {"end_tokens": [ROLES[1]]}).encode(ROLES[1])


def test_a_named_end_does_not_pad_scores():
    engine = SentencePieceModel(learned().data, {"pad_token": "<s>", "end_tokens": ["<s>"]})
    assert with_pad(Tokenizer(engine)).pad == engine.unk
    assert np.array_equal(with_pad(Tokenizer(learned())).ends, [engine.eos])
