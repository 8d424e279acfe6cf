"""tokenizer.json files and Hugging Face folders: which files are read, what stands in front, and where texts end."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.chat import render
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.data.tokenizer_folder import tokenizer_files
from jaxgpt.errors import UserError

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["the cat sat on the mat, and 42 dogs slept; naïve café 中文\n"] * 20
EOS = "<|endoftext|>"


def vocabulary() -> Any:
    """A small byte-level vocabulary with GPT-2's end of text."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


SPEC = json.loads(vocabulary().to_str())
IDS = SPEC["model"]["vocab"]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def added(*names: str, **flags: bool) -> dict[str, Any]:
    """The vocabulary with more special tokens."""
    more = [{"id": len(IDS) + i, "content": name, **FLAGS, **flags} for i, name in enumerate(names)]
    return {**SPEC, "added_tokens": [*SPEC["added_tokens"], *more]}


def bos_first(spec: dict[str, Any], name: str) -> dict[str, Any]:
    token = next(t["id"] for t in spec["added_tokens"] if t["content"] == name)
    single = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    special = {name: {"id": name, "ids": [token], "tokens": [name]}}
    template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    return {**spec, "post_processor": {"type": "Sequence", "processors": [level, template]}}


def folder(path: Path, spec: dict[str, Any] | None = None, **files: Any) -> Path:
    """A folder of a tokenizer.json and other JSON files."""
    path.mkdir(exist_ok=True)
    for name, value in {**({} if spec is None else {"tokenizer": spec}), **files}.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_one_file_and_the_two_files_of_gpt2_are_the_same_pieces(tmp_path):
    home = folder(tmp_path, SPEC, vocab=IDS)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in SPEC["model"]["merges"]]
    (home / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (home / "encoder.json").write_text(json.dumps(IDS))
    (home / "vocab.bpe").write_text((home / "merges.txt").read_text())
    one, two, old = (Tokenizer.load(home / name) for name in ("tokenizer.json", "vocab.json", "encoder.json"))
    text = "the cat\n\n naïve 中文 🙂 42"
    assert one.encode(text) == two.encode(text) == old.encode(text)
    for tokenizer in (one, two):
        assert (tokenizer.bos, tokenizer.prefix, tokenizer.unk) == (None, [], None)
        assert tokenizer.eos == tokenizer.pad == tokenizer.start == IDS[EOS]
        assert tokenizer.control == {EOS: IDS[EOS]}
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eos, 999]) == text
        assert tokenizer.piece_bytes[tokenizer.encode(text)].sum() == len(text.encode())
        assert tokenizer.template_name == "vicuna"
    assert two.hash == old.hash
    two.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").hash == two.hash


def test_characters_of_several_tokens_begin_together(tmp_path):
    tokenizer = Tokenizer.load(folder(tmp_path, SPEC))
    ids, starts = tokenizer.encode_spans("a🙂b")
    assert ids == tokenizer.encode("a🙂b")
    assert (starts[0], set(starts[1:-1]), starts[-1]) == (0, {1}, 2)


def test_what_stands_in_front_is_what_the_file_or_its_config_puts_there(tmp_path):
    spec = bos_first(added("<|begin|>"), "<|begin|>")
    begin = len(IDS)
    assert Tokenizer.load(folder(tmp_path / "a", spec)).prefix == [begin]
    assert Tokenizer.load(folder(tmp_path / "b", added("<|begin|>"))).prefix == []
    config = {"bos_token": "<|begin|>", "eos_token": EOS}
    assert Tokenizer.load(folder(tmp_path / "c", added("<|begin|>"), tokenizer_config=config)).prefix == []
    config = {**config, "add_bos_token": True}
    assert Tokenizer.load(folder(tmp_path / "d", added("<|begin|>"), tokenizer_config=config)).prefix == [begin]
    config = {**config, "add_bos_token": False}
    assert Tokenizer.load(folder(tmp_path / "e", spec, tokenizer_config=config)).prefix == []


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|end|>"}},
        {"tokenizer_config": {"eos_token": {"content": "<|end|>", "lstrip": False}}},
        {"special_tokens_map": {"eos_token": "<|end|>"}},
        {"config": {"eos_token_id": len(IDS)}},
        {"generation_config": {"eos_token_id": [len(IDS), 0]}, "config": {"eos_token_id": 0}},
    ],
)
def test_the_end_is_the_one_that_the_folder_names(tmp_path, files):
    tokenizer = Tokenizer.load(folder(tmp_path, added("<|end|>"), **files))
    assert tokenizer.eos == len(IDS)
    assert tokenizer.control == {EOS: IDS[EOS], "<|end|>": len(IDS)}


def test_a_named_end_is_a_control_piece_whatever_its_flags(tmp_path):
    spec = added("<|end|>", special=False)
    tokenizer = Tokenizer.load(folder(tmp_path, spec, tokenizer_config={"eos_token": "<|end|>"}))
    assert len(IDS) not in tokenizer.encode("a<|end|>")
    plain = Tokenizer.load(folder(tmp_path, spec, tokenizer_config={"eos_token": EOS}))
    assert len(IDS) in plain.encode("a<|end|>")  # an added token that is not special is text


def test_control_pieces_that_the_merges_could_make_are_kept_from_text(tmp_path):
    vocab = {**IDS, "</": len(IDS), "</s": len(IDS) + 1, "</s>": len(IDS) + 2}
    merges = [["<", "/"], ["</", "s"], ["</s", ">"], *SPEC["model"]["merges"]]
    model = {**SPEC["model"], "vocab": vocab, "merges": merges}
    spec = {**SPEC, "model": model, "pre_tokenizer": {**SPEC["pre_tokenizer"], "use_regex": False}}
    spec["added_tokens"] = [*SPEC["added_tokens"], {"id": len(IDS) + 2, "content": "</s>", **FLAGS}]
    raw = tokenizers.Tokenizer.from_str(json.dumps(spec))
    raw.encode_special_tokens = True
    assert len(IDS) + 2 in raw.encode("a</s>").ids  # the library's own setting is not enough
    tokenizer = Tokenizer.load(folder(tmp_path, spec))
    assert tokenizer.encode("</s>") == [len(IDS) + 1, IDS[">"]]
    assert tokenizer.decode(tokenizer.encode("a</s>")) == "a</s>"


def test_white_space_that_a_control_piece_takes_with_it_is_no_token(tmp_path):
    spec = added("<|user|>", "<|assistant|>", "<|end|>", rstrip=True)
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{% generation %}{{ m.content + '\n' + '<|end|>' }}"
        "{% endgeneration %}{% endfor %}"
    )
    config = {"eos_token": "<|end|>", "chat_template": template, "tokenizer_class": "PreTrainedTokenizerFast"}
    home = folder(tmp_path, spec, tokenizer_config=config, config={"model_type": "llama"})
    messages = [{"role": "user", "content": "  the cat\n"}, {"role": "assistant", "content": "\n"}]
    ids, _ = render(Tokenizer.load(home), messages)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(home)
    assert theirs.apply_chat_template(messages, return_dict=False) == ids


def test_a_folders_template_is_taken_from_where_it_stands(tmp_path):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]
    for number, template in enumerate((text, named)):
        home = folder(tmp_path / str(number), SPEC, tokenizer_config={"eos_token": EOS, "chat_template": template})
        assert Tokenizer.load(home).template == text
    (home / "chat_template.jinja").write_text("{{ eos_token }}")
    assert Tokenizer.load(home).template == "{{ eos_token }}"
    assert Tokenizer.load(home, "vicuna").template_name == "vicuna"
    with pytest.raises(
        UserError, match=r"chat template vicunya does not exist; .*roles, vicuna\. Did you mean 'vicuna'"
    ):
        Tokenizer.load(home, "vicunya")


def test_a_sentencepiece_model_is_read_where_it_has_every_token(tmp_path):
    made = train_tokenizer(TEXTS, TokenizerConfig(vocab=300))
    home = folder(tmp_path, SPEC, tokenizer_config={"eos_token": "</s>", "pad_token": "<pad>"})
    (home / "tokenizer.model").write_bytes(made.engine.data)
    assert Tokenizer.load(home).model_hash == made.model_hash
    folder(home, added_tokens={"<|end|>": len(IDS)}, tokenizer_config={"eos_token": EOS})
    assert Tokenizer.load(home).model_hash == Tokenizer.load(home / "tokenizer.json").model_hash
    (home / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"the added token <\|endoftext\|> is no piece of tokenizer\.model"):
        Tokenizer.load(home)
    folder(home, added_tokens={}, tokenizer_config={"add_bos_token": False, "eos_token": "<|user|>"})
    tokenizer = Tokenizer.load(home)
    assert (tokenizer.bos, tokenizer.eos) == (None, made.control["<|user|>"])
    assert tokenizer.model_hash != made.model_hash
    tokenizer.save(tmp_path / "saved")
    assert Tokenizer.load(tmp_path / "saved").hash == tokenizer.hash


def test_the_files_that_are_read_are_named(tmp_path):
    home = folder(tmp_path, SPEC, tokenizer_config={"eos_token": EOS})
    names = [path.name for path in tokenizer_files(home)]
    assert names == ["tokenizer.json", "tokenizer_config.json"]
    folder(home, vocab={}, added_tokens={})
    assert home / "added_tokens.json" in tokenizer_files(home / "vocab.json")
    assert tokenizer_files(home / "x.model") == [home / "x.model"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {**SPEC, "added_tokens": [], "model": {**SPEC["model"], "vocab": {"a": 0}, "merges": []}},
            "nothing says which",
        ),
        ({"size": 3, "hash": "x"}, "not a tokenizer.json of the tokenizers library"),
        ({**SPEC, "model": {"type": "WordPiece", "vocab": {"a": 0}}}, "a WordPiece model"),
        ({**SPEC, "decoder": {"type": "WordPiece", "prefix": "##"}}, "decodes by WordPiece"),
    ],
)
def test_files_that_cannot_be_followed_are_refused(tmp_path, spec, message):
    with pytest.raises(UserError, match=rf"tokenizer\.json: .*{message}"):
        Tokenizer.load(folder(tmp_path, spec))


def test_folders_without_a_tokenizer_say_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.model, tokenizer\.json or vocab\.json with merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.model").write_text("bGxh 0\n")  # as Llama 3's, which is no SentencePiece model
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(UserError, match=r"its merges are missing: expected merges\.txt"):
        Tokenizer.load(tmp_path)
    (tmp_path / "merges.txt").write_text("a b\n")
    with pytest.raises(UserError, match=r"not a byte-level vocabulary with its merges"):
        Tokenizer.load(tmp_path)
    folder(tmp_path, tokenizer_config={"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(UserError, match=r"of a Qwen2Tokenizer, which splits text in a way of its own"):
        Tokenizer.load(tmp_path)


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "tokenizers":
            raise ModuleNotFoundError(name)
        return real(name, *rest, **more)

    home = folder(tmp_path, SPEC)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the tokenizers library: pip install 'jaxgpt\[hf\]'"):
        Tokenizer.load(home)
