"""A vocab.json with merges.txt and what stands beside them: the ids of transformers' GPT2Tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer_files import byte_level, strings

from jaxgpt.data.chat import render
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop.tokenizer_files import tokenizer_files

transformers = pytest.importorskip("transformers")

SPEC = json.loads(byte_level().data)
VOCAB = SPEC["model"]["vocab"]
SIZE = len(VOCAB)
TEXT = "The fox<think> sleeps</think>in the old barn"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
DECODER = {
    str(SIZE): {"content": "<|user|>", **FLAGS, "special": True},
    str(SIZE + 1): {"content": "<think>", **FLAGS, "special": False},
    str(SIZE + 2): {"content": "<|end|>", **FLAGS, "special": True},
}
TEMPLATE = "{% for m in messages %}{{ '<|user|>' + m.content + '<|end|>' }}{% endfor %}"


def home(path: Path, config: dict[str, Any], **files: Any) -> Path:
    path.mkdir(exist_ok=True)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in SPEC["model"]["merges"]]
    (path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "chat_template": TEMPLATE, **config}
    everything = {"vocab": VOCAB, "config": {"model_type": "gpt2"}, "tokenizer_config": config, **files}
    for name, value in everything.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


LISTED = {"<|user|>": SIZE, "<think>": SIZE + 1, "<|end|>": SIZE + 2}


@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": DECODER}, {}),
        ({"additional_special_tokens": ["<|user|>"]}, {"added_tokens": LISTED}),
        ({}, {"added_tokens": LISTED, "special_tokens_map": {"additional_special_tokens": ["<|user|>"]}}),
        ({"added_tokens_decoder": DECODER, "add_prefix_space": True}, {}),
    ],
    ids=["decoder", "added", "map", "prefix"],
)
def test_added_tokens_and_the_space_in_front_are_those_of_transformers(tmp_path, config, files):
    folder = home(tmp_path / "theirs", config, **files)
    tokenizer = Tokenizer.load(folder)
    assert (tokenizer.size, tokenizer.eos) == (SIZE + 3, SIZE + 2)
    assert tokenizer.control == {"<|endoftext|>": VOCAB["<|endoftext|>"], "<|user|>": SIZE, "<|end|>": SIZE + 2}
    assert SIZE + 1 in tokenizer.encode(TEXT)
    for name, data in tokenizer_files(tokenizer, 512).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    texts = [TEXT, "fox", " fox", *strings(200)]
    messages = [{"role": "user", "content": text} for text in texts[:3]]
    for place in (folder, tmp_path):
        theirs = transformers.AutoTokenizer.from_pretrained(place)
        assert theirs(texts, add_special_tokens=False)["input_ids"] == tokenizer.encode(texts)
        assert theirs.apply_chat_template(messages, return_dict=False) == render(tokenizer, messages)[0]
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash
    led = config.get("add_prefix_space", False)
    assert (tokenizer.encode("fox") == tokenizer.encode(" fox")) == led


def test_pieces_that_a_folder_names_are_control_pieces(tmp_path):
    """As OPT's, whose end stands in its vocab.json."""
    vocab = {**VOCAB, "</s>": SIZE, "<pad>": SIZE + 1}
    tokenizer = Tokenizer.load(home(tmp_path, {"eos_token": "</s>", "pad_token": "<pad>"}, vocab=vocab))
    assert (tokenizer.eos, tokenizer.pad, tokenizer.size) == (SIZE, SIZE + 1, SIZE + 2)
    assert not {SIZE, SIZE + 1} & {*tokenizer.encode("</s><pad>")}
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a</s>b<pad>")["input_ids"] == [VOCAB["a"], SIZE, VOCAB["b"], SIZE + 1]


def test_ids_that_the_library_would_not_give_are_refused(tmp_path):
    folder = home(tmp_path, {"eos_token": "<|endoftext|>"}, added_tokens={"<think>": SIZE + 40})
    with pytest.raises(UserError, match=rf"vocab\.json: damaged: <think> is {SIZE + 40} there"):
        Tokenizer.load(folder)


def test_a_tokenizer_json_that_says_otherwise_of_the_space_is_refused(tmp_path):
    folder = home(tmp_path, {"eos_token": "<|endoftext|>", "add_prefix_space": True}, tokenizer=SPEC)
    with pytest.raises(UserError, match=r"add_prefix_space false, and tokenizer_config\.json beside it says true"):
        Tokenizer.load(folder)
