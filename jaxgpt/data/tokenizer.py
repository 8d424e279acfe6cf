"""SentencePiece models: learning one, and text to token ids and back without loss.

Roles and the ends of texts are control pieces, which no text encodes to: what a user writes is always plain text.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
import sentencepiece

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.chat import BUILT_IN, ROLES, check_template
from jaxgpt.errors import UserError, nearest

_SPACE = "\u2581"  # SentencePiece's stand-in for the space; the character itself is spelt as its three bytes
_CHUNK = 4096  # characters fed to the trainer at a time; it is slow on whole books
_THREADS = 4  # fixed, for the number is written into the model


class Tokenizer:
    """A SentencePiece model with its chat template."""

    def __init__(
        self, model: bytes, template: str = BUILT_IN, name: str = "tokenizer", template_name: str = "built-in"
    ):
        self.model = model
        self.template = template
        self.template_name = template_name
        check_template(template, template_name)
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name}: not a SentencePiece model") from error
        self.size: int = self._pieces.get_piece_size()
        self.control: dict[str, int] = {
            self._pieces.id_to_piece(i): i for i in range(self.size) if self._pieces.is_control(i)
        }
        self.bos: int = self._pieces.bos_id()
        self.eos: int = self._pieces.eos_id()
        if self.bos < 0 or self.eos < 0:
            lacks = "bos (<s>)" if self.bos < 0 else "eos (</s>)"
            raise UserError(
                f"{name}: the model has no {lacks} piece; train it with bos_id and eos_id, or train one here"
            )
        pad = self._pieces.pad_id()
        self.pad: int = pad if pad >= 0 else self._pieces.unk_id()  # padding is known by lengths, never by this id
        self._names = {i: piece for piece, i in self.control.items()}
        spelt = [self._pieces.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        self._space = spelt if all(self._pieces.is_byte(i) for i in spelt) else None

    @classmethod
    def load(cls, path: str | Path, template: str | None = None) -> Tokenizer:
        """Reads a tokenizer folder or a .model file; `template` is a Jinja file, unset takes the folder's or ours."""
        path = Path(path).expanduser()
        model = path / "tokenizer.model" if path.is_dir() else path
        if not model.is_file():
            near = nearest(model.name, (p.name for p in model.parent.iterdir())) if model.parent.is_dir() else ""
            raise UserError(f"tokenizer {model} does not exist.{near}")
        beside = path / "template.jinja"
        if template is None and path.is_dir() and beside.is_file():
            return cls(model.read_bytes(), _read_template(beside), str(model), str(beside))
        if template is None:
            return cls(model.read_bytes(), BUILT_IN, str(model))
        return cls(model.read_bytes(), _read_template(Path(template).expanduser()), str(model), template)

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.model, template.jinja and tokenizer.json (a summary for people)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"size": self.size, "bos": self.bos, "eos": self.eos, "pad": self.pad, "control": self.control}
        (folder / "template.jinja").write_bytes(self.template.encode())
        (folder / "tokenizer.json").write_text(json.dumps({**summary, "hash": self.hash}, indent=2) + "\n")
        (folder / "tokenizer.model.part").write_bytes(self.model)
        (folder / "tokenizer.model.part").replace(folder / "tokenizer.model")  # last: a model means a whole folder

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the model and the template: equal hashes render conversations alike."""
        return hashlib.sha256(self.model_hash.encode() + self.template.encode()).hexdigest()

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 (hex) of the model alone: equal hashes tokenize text alike."""
        return hashlib.sha256(self.model).hexdigest()

    @cached_property
    def unk(self) -> int:
        """The id of characters that the model cannot spell (none, with byte fallback)."""
        return self._pieces.unk_id()

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """[size] int32: UTF-8 bytes of text that each id stands for; 0 for control ids and unknown."""
        return np.array([self._bytes(i) for i in range(self.size)], np.int32)

    def _bytes(self, token: int) -> int:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return 0
        return 1 if self._pieces.is_byte(token) else len(self._pieces.id_to_piece(token).replace(_SPACE, " ").encode())

    @overload
    def encode(self, text: str) -> list[int]: ...
    @overload
    def encode(self, text: Sequence[str]) -> list[list[int]]: ...
    def encode(self, text: str | Sequence[str]) -> list[int] | list[list[int]]:
        """Token ids of one text or several; never a control id, so no BOS and no EOS.

        Halves of surrogate pairs, which are no characters, become U+FFFD.
        """
        if isinstance(text, str):
            one = _valid(text)
            if self._space is None or _SPACE not in one:
                return self._pieces.encode(one)  # a list of one would cost ten times as much
            return self._encode_around_space(one)
        return self._encode(list(text))

    def _encode(self, texts: list[str]) -> list[list[int]]:
        texts = [_valid(text) for text in texts]
        if self._space is None or not any(_SPACE in text for text in texts):
            return self._pieces.encode(texts, num_threads=1)
        return [self._encode_around_space(text) for text in texts]

    def _encode_around_space(self, text: str) -> list[int]:
        first, *rest = self._pieces.encode(text.split(_SPACE), num_threads=1)
        return first + [token for part in rest for token in [*self._space, *part]]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; control ids and ids beyond the model's pieces (rows that pad an embedding) give nothing."""
        return self._pieces.decode([i for i in map(int, tokens) if 0 <= i < self.size and i not in self._names])

    def decode_visible(self, tokens: Iterable[int]) -> str:
        """The text with control pieces shown by name, for people to look at."""
        out: list[str] = []
        run: list[int] = []
        for token in [*map(int, tokens), -1]:  # -1 flushes the last run
            if 0 <= token < self.size and token not in self._names:
                run.append(token)
                continue
            out.append(self._pieces.decode(run) if run else "")
            run = []
            if token >= 0:
                out.append(self._names.get(token, f"<{token}>"))
        return "".join(out)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learns a SentencePiece model from at most `config.sample_bytes` of `texts`; equal texts give equal bytes."""
    template, name = BUILT_IN, "built-in"
    if config.template is not None:
        template, name = _read_template(Path(config.template).expanduser()), config.template
        check_template(template, name)
    sample = _sample(_chunks(texts), config.sample_bytes)
    if not sample:
        raise UserError("there is no text to learn a tokenizer from; see tokenizer.path_text and data")
    whole = config.model_type == "char" or not config.byte_fallback
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab,
            character_coverage=1.0 if whole else 0.9995,
            byte_fallback=config.byte_fallback,
            split_digits=config.split_digits,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            control_symbols=list(ROLES.values()),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            hard_vocab_limit=False,
            max_sentence_length=1 << 20,
            num_threads=_THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise _explained(error, config) from error
    return Tokenizer(model.getvalue(), template, template_name=name)


def _explained(error: RuntimeError, config: TokenizerConfig) -> UserError:
    text = " ".join(str(error).split())
    needed = re.search(r"smaller than required_chars\.?\s*(\d+)\s*vs\s*(\d+)", text)
    if needed:
        return UserError(
            f"tokenizer.vocab is {config.vocab}, but the control pieces, bytes and characters of the text are already "
            f"{needed[2]}; set tokenizer.vocab higher"
        )
    if "too small" in text.lower():
        return UserError(f"tokenizer.vocab is {config.vocab}, too small for this text; SentencePiece says: {text}")
    return UserError(f"SentencePiece could not learn a tokenizer (vocab {config.vocab}, {config.model_type}): {text}")


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    """Documents cut at line ends into parts of about `_CHUNK` characters; line ends stay, for they are learned too."""
    for text in map(_valid, texts):
        if len(text) <= _CHUNK:
            yield text
            continue
        part: list[str] = []
        length = 0
        for line in text.splitlines(keepends=True):
            for at in range(0, len(line), _CHUNK):
                piece = line[at : at + _CHUNK]
                if part and length + len(piece) > _CHUNK:
                    yield "".join(part)
                    part, length = [], 0
                part.append(piece)
                length += len(piece)
        yield "".join(part)


def _sample(chunks: Iterable[str], limit: int) -> list[str]:
    """The chunks with the smallest hashes, up to `limit` bytes in all, in their order: a sample that needs no seed."""
    kept: list[tuple[bytes, int, str]] = []  # a heap whose first is the next to go
    total = 0
    for at, chunk in enumerate(chunks):
        data = chunk.encode()
        if not data:
            continue
        rank = bytes(255 - byte for byte in hashlib.blake2b(data, digest_size=8).digest())
        heapq.heappush(kept, (rank, -at, chunk))
        total += len(data)
        while total > limit and len(kept) > 1:
            total -= len(heapq.heappop(kept)[2].encode())
    return [chunk for _, _, chunk in sorted(kept, key=lambda entry: -entry[1])]


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_template(path: Path) -> str:
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(f"chat template {path} does not exist.{near}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"chat template {path}: not UTF-8 at byte {error.start}") from error
