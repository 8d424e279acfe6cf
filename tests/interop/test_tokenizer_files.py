"""What transformers reads from an exported tokenizer gives the ids, texts, conversations and masks that ours gives."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data import protobuf
from jaxgpt.data.chat import render, render_text
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.templates import ROLES, read_template
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.data.tokenizer_json import TokenizerJson
from jaxgpt.errors import UserError
from jaxgpt.interop.tokenizer_files import QWEN2, tokenizer_files

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The fox sleeps in the old barn, and the rabbit doesn't know it.\n",
    "Ein naïve café: 12345 + 678 = 13023;  x  =  y;\n\n\tif x == 10:\n\t\treturn 'ok'   \n",
    "Лиса спит в старом сарае, а заяц об этом не знает. 狐狸睡在舊穀倉裡。 キツネは古い納屋で眠る。\n",  # noqa: RUF001
    "======== -------- aaaa abab ababab hahaha mississippi banana 1010101 ...... !!!!\n",
    "        eight spaces    four   three  two\n",
] * 40
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")
SCRIPTS = [(32, 126), (0xC0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x64A), (0x900, 0x97F)]
SCRIPTS += [
    (0x2000, 0x206F),
    (0x3040, 0x30FF),
    (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3),
    (0x1F300, 0x1F6FF),
    (0x20000, 0x2A000),
]


def strings(count: int, seed: int = 0) -> list[str]:
    """Text of many scripts, with runs of spaces and other characters, digits, line ends and joined emoji."""
    rng = random.Random(seed)
    words = " ".join(TEXTS[:5]).split()
    makers = [
        lambda: "".join(chr(rng.randint(*rng.choice(SCRIPTS))) for _ in range(rng.randint(1, 4))),
        lambda: rng.choice([" ", "  ", "\n", "\t", "\r\n", "=", "-", "a", "ab", "ha", "."]) * rng.randint(1, 17),
        lambda: str(rng.randint(0, 10 ** rng.randint(1, 9))),
        lambda: rng.choice(["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "e\u0301", "\ufeff", "\u200d", "\x00", "\x1b"]),
        lambda: rng.choice(["", " ", "  "]) + rng.choice(words),
    ]
    return ["".join(rng.choices(makers, [3, 2, 1, 1, 6])[0]() for _ in range(rng.randint(0, 12))) for _ in range(count)]


STRINGS = strings(2000)


def learned(**options: Any) -> SentencePieceModel:
    """A model by LLaMA's settings, where `options` say nothing else."""
    plain = {"model_type": "bpe", "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"}
    rest = {"remove_extra_whitespaces": False, "hard_vocab_limit": False, "minloglevel": 3}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=700, **plain | rest | options
    )
    return SentencePieceModel(model.getvalue())


def byte_level(llama3: bool = False) -> TokenizerJson:
    """A byte-level vocabulary: as GPT-2 has it, or as Llama 3: another way to split, and BOS in front of texts."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    pre, special = tokenizers.pre_tokenizers, ["<|endoftext|>"]
    made.pre_tokenizer, made.decoder = pre.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    if llama3:
        parts = [
            pre.Split(tokenizers.Regex(LLAMA3), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        made.pre_tokenizer, special = pre.Sequence(parts), ["<|begin|>", "<|endoftext|>", *ROLES.values()]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    if llama3:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", made.token_to_id("<|begin|>"))]
        )
    return TokenizerJson(made.to_str().encode())


def scored_alike(model: SentencePieceModel, kind: Callable[[str], bool]) -> SentencePieceModel:
    """The model with one score, the least, for all pieces of a kind."""

    def part(number: int, data: bytes) -> bytes:
        size = [len(data)] if len(data) < 128 else [len(data) & 127 | 128, len(data) >> 7]
        return bytes([number << 3 | 2, *size]) + data

    out = b""
    for number, value in protobuf.fields(model.data):
        if number == 1:
            piece = protobuf.message(value)
            score = struct.pack("<f", -1e9) if kind(piece[1].decode()) else piece.get(2, bytes(4))
            value = part(1, piece[1]) + b"\x15" + score + bytes([3 << 3, piece.get(3, 1)])
        out += part(number, value)
    return SentencePieceModel(out)


def is_spaces(piece: str) -> bool:
    """Whether a piece is a run of spaces: LLaMA's own model gives these one score."""
    return len(piece) > 1 and not piece.strip("\u2581")


MADE = {
    "ours": lambda: train_tokenizer(TEXTS, TokenizerConfig(vocab=700)).engine,
    "ours without byte fallback": lambda: (
        train_tokenizer(TEXTS, TokenizerConfig(vocab=400, byte_fallback=False)).engine
    ),
    "char": lambda: train_tokenizer(TEXTS, TokenizerConfig(model_type="char")).engine,
    "llama": learned,
    "llama with roles": lambda: learned(control_symbols=list(ROLES.values())),
    "llama with chatml": lambda: SentencePieceModel(
        learned(control_symbols=["<|im_start|>", "<|im_end|>"]).data, {"eos_token": "<|im_end|>"}
    ),
    "llama without bos": lambda: SentencePieceModel(learned().data, {"add_bos_token": False}),
    "llama, runs of spaces alike": lambda: scored_alike(learned(allow_whitespace_only_pieces=True), is_spaces),
    "across words": lambda: learned(split_by_whitespace=False, split_by_unicode_script=False, split_by_number=False),
    "own symbols": lambda: learned(add_dummy_prefix=False, user_defined_symbols=["<think>", "ab", "\u2581\u2581"]),
    "gpt2": byte_level,
    "llama3": lambda: byte_level(llama3=True),
}


@pytest.fixture(scope="module", params=MADE)
def exported(request, tmp_path_factory) -> tuple[Tokenizer, Path]:
    """A tokenizer, and the folder it was exported to."""
    tokenizer = Tokenizer(MADE[request.param]())
    return tokenizer, write(tokenizer, tmp_path_factory.mktemp("exported"))


def write(tokenizer: Tokenizer, folder: Path) -> Path:
    for name, data in tokenizer_files(tokenizer, context=512).items():
        (folder / name).write_bytes(data)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def opened(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_every_text_has_the_same_ids_everywhere(exported):
    tokenizer, folder = exported
    theirs = opened(folder)
    found = theirs(STRINGS, add_special_tokens=False)["input_ids"]
    assert found == tokenizer.encode(STRINGS) == [tokenizer.encode(text) for text in STRINGS]
    if isinstance(tokenizer.engine, SentencePieceModel):
        assert found == sentencepiece.SentencePieceProcessor(model_proto=tokenizer.engine.data).encode(STRINGS)
    assert theirs("fox")["input_ids"] == [*tokenizer.prefix, *tokenizer.encode("fox")]
    assert not {token for ids in found for token in ids} & set(tokenizer.control.values())


def test_every_text_comes_back(exported):
    tokenizer, folder = exported
    if tokenizer.engine.unk is not None and any(tokenizer.unk in ids for ids in tokenizer.encode(STRINGS)):
        pytest.skip("not every character has a piece")
    theirs = opened(folder)
    for text, ids in zip(STRINGS, tokenizer.encode(STRINGS), strict=True):
        assert tokenizer.decode(ids) == theirs.decode(ids) == text
        led = isinstance(tokenizer.engine, SentencePieceModel) and tokenizer.engine.prepends and text
        assert tokenizer.piece_bytes[ids].sum() == len(text.encode()) + bool(led)


def test_spans_say_where_tokens_begin(exported):
    tokenizer, folder = exported
    theirs = opened(folder)
    for text in STRINGS[:500]:
        ids, starts = tokenizer.encode_spans(text)
        assert ids == tokenizer.encode(text)
        found = theirs(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert starts == [start for start, _ in found]


def test_the_exported_folder_is_the_same_tokenizer_again(exported, tmp_path):
    tokenizer, folder = exported
    again = Tokenizer.load(folder)
    assert (again.hash, again.template) == (tokenizer.hash, tokenizer.template)
    assert (again.bos, again.eos, again.pad, again.unk) == (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.unk)
    assert again.control == tokenizer.control
    tokenizer.save(tmp_path)
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


def test_transformers_knows_the_ends_and_control_tokens(exported):
    tokenizer, folder = exported
    theirs = opened(folder)
    assert (theirs.eos_token_id, theirs.model_max_length, len(theirs)) == (tokenizer.eos, 512, tokenizer.size)
    assert set(theirs.all_special_ids) >= {tokenizer.eos, *tokenizer.prefix}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    special = {t["content"] for t in config["added_tokens_decoder"].values() if t["special"]}
    assert special >= set(tokenizer.control)


def talks(count: int) -> list[list[dict[str, str]]]:
    rng = random.Random(1)
    found = []
    for _ in range(count):
        texts = [
            rng.choice(["", " ", "\n", "  "]) + text + rng.choice(["", " ", "\n", "\n\n"])
            for text in strings(4, rng.random())
        ]
        roles = ["user", "assistant"] * 2 if rng.random() < 0.5 else ["system", "user", "assistant"]
        found.append([{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)])
    return found


CHATML = """\
{% for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- m.content + '<|im_end|>' }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
"""Which writes no BOS."""


@pytest.mark.parametrize("template", ["roles", "vicuna", "chatml"])
def test_conversations_are_the_same_text_ids_and_mask(exported, template, tmp_path):
    engine = exported[0].engine
    if template == "roles" and ROLES["user"] not in engine.control:
        pytest.skip("has no roles")
    tokenizer = Tokenizer(engine, *((CHATML, template) if template == "chatml" else read_template(template)))
    theirs = opened(write(tokenizer, tmp_path))
    for messages in talks(150):
        assert theirs.apply_chat_template(messages, tokenize=False) == render_text(tokenizer, messages)
        found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = render(tokenizer, messages)
        assert found["input_ids"] == ids
        assert found["assistant_masks"] == mask
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == render(tokenizer, messages[:-1], add_generation_prompt=True)[0]


def test_control_pieces_in_what_a_user_writes_stay_text(exported):
    tokenizer, _ = exported
    wanted = [*tokenizer.control, "</s>", "<s>", "<|user|>", "<|endoftext|>", "<unk>"]
    for text in [*wanted, " ".join(wanted), "".join(wanted), f"a{wanted[0]}b"]:
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.control.values())
        assert tokenizer.decode(ids) == text or tokenizer.unk in ids
        assert tokenizer.encode_spans(text)[0] == ids
        messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        ids, _ = render(tokenizer, messages)
        assert ids.count(tokenizer.eos) == 1


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"model_type": "unigram"}, "its model is unigram; only bpe and char"),
        ({"model_type": "word"}, "its model is word; only bpe and char"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalizes text by a rule other than identity"),
        ({"remove_extra_whitespaces": True}, "removes extra spaces"),
        ({"treat_whitespace_as_suffix": True}, "puts spaces at the ends of pieces"),
        ({"user_defined_symbols": ["<think>"]}, "has user-defined symbols, and puts a space in front"),
    ],
)
def test_what_transformers_would_tokenize_otherwise_is_not_exported(options, problem):
    if options.get("model_type") == "word":
        options = {**options, "byte_fallback": False}
    with pytest.raises(UserError, match=f"cannot be exported to Hugging Face: .*{problem}"):
        tokenizer_files(Tokenizer(learned(**options)), 512)


def test_pieces_of_one_score_that_are_no_runs_are_not_exported():
    with pytest.raises(UserError, match=r"the pieces '.+' and '.+' have the same score"):
        tokenizer_files(Tokenizer(scored_alike(learned(), lambda piece: piece in ("==", "--"))), 512)


def test_models_of_type_qwen2_need_its_way_to_split():
    for made in (learned, byte_level):
        with pytest.raises(UserError, match="every model of type qwen2 as Qwen2 does"):
            tokenizer_files(Tokenizer(made()), 512, "qwen2")
    spec = json.loads(byte_level(llama3=True).data)
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": QWEN2}
    spec["normalizer"] = {"type": "NFC"}
    assert tokenizer_files(Tokenizer(TokenizerJson(json.dumps(spec).encode())), 512, "qwen2")
