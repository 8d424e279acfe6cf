"""SentencePiece models: text to token ids and back without loss, and learning one.

Roles and the ends of texts are control pieces, which no text encodes to.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import sentencepiece

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data import protobuf
from jaxgpt.data.templates import ROLES
from jaxgpt.errors import UserError

SPACE = "\u2581"  # SentencePiece's stand-in for the space; the character itself is spelt as its three bytes
KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
_CHUNK = 4096  # characters fed to the trainer at a time; it is slow on whole books
_THREADS = 4  # fixed, for the number is written into the model


class SentencePieceModel:
    """The engine of a tokenizer whose pieces are in a SentencePiece .model file."""

    file = "tokenizer.model"
    trims: Mapping[str, tuple[bool, bool]] = MappingProxyType({})
    """Control pieces that take the white space before and after them with them: none do."""

    def __init__(self, data: bytes, settings: Mapping[str, Any] | None = None, name: str = "tokenizer"):
        """`settings` may name `bos_token`, `eos_token` and `pad_token` and say `add_bos_token`, as Hugging Face's
        tokenizer_config.json does, and list `end_tokens`, by text or id, where several end what a language model says;
        unset means what the SentencePiece model says."""
        self.data, settings = data, settings or {}
        try:
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{name}: not a SentencePiece model") from error
        pieces = self._pieces
        self.size: int = pieces.get_piece_size()
        self.control = {pieces.id_to_piece(i): i for i in range(self.size) if pieces.is_control(i)}
        self.unk: int | None = pieces.unk_id() if pieces.unk_id() >= 0 else None
        bos, eos, pad = (
            self._named(settings.get(key), own)
            for key, own in (
                ("bos_token", pieces.bos_id()),
                ("eos_token", pieces.eos_id()),
                ("pad_token", pieces.pad_id()),
            )
        )
        if eos is None:
            raise UserError(f"{name}: the model has no eos (</s>) piece; train it with eos_id, or train one here")
        self.bos = bos if settings.get("add_bos_token", True) else None
        self.eos: int = eos
        known = {pieces.id_to_piece(i): i for i in range(self.size)}
        listed = {one if isinstance(one, int) else known.get(one) for one in settings.get("end_tokens", ())}
        self.ends: tuple[int, ...] = (eos, *sorted(listed & {*known.values()} - {eos}))
        self.pad: int = pad if pad is not None else self.unk if self.unk is not None else eos
        named = {"bos_token": bos, "eos_token": eos, "unk_token": self.unk, "pad_token": pad}
        self.names = {key: pieces.id_to_piece(token) for key, token in named.items() if token is not None}
        spelt = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        lossless = all(pieces.is_byte(i) for i in spelt) and not self.prepends
        self._space = spelt if lossless else None

    def _named(self, piece: str | None, own: int) -> int | None:
        """The id of a piece that settings name, where it can be an end or padding; else the model's own, if any."""
        if piece is not None and (piece in self.control or piece == self._piece(self.unk)):
            return self._pieces.piece_to_id(piece)
        return own if own >= 0 else None

    def _piece(self, token: int | None) -> str | None:
        return None if token is None else self._pieces.id_to_piece(token)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this engine again, with the data."""
        ends = {"end_tokens": [*map(self._piece, self.ends)]} if len(self.ends) > 1 else {}
        return {**self.names, "add_bos_token": self.bos is not None, **ends}

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex): equal hashes tokenize alike. That of the file alone where settings change nothing."""
        pieces, unk = self._pieces, -1 if self.unk is None else self.unk
        pads = (pieces.pad_id(), unk, pieces.eos_id())
        own = (pieces.bos_id(), pieces.eos_id(), next((pad for pad in pads if pad >= 0), -1))
        ours = (-1 if self.bos is None else self.bos, self.eos, self.pad, *self.ends[1:])
        return hashlib.sha256(self.data + (b"" if ours == own else repr(ours).encode())).hexdigest()

    @cached_property
    def kind(self) -> str:
        """unigram, bpe, word or char."""
        return KINDS[self.trainer.get(3, 1)]

    @cached_property
    def trainer(self) -> dict[int, int | bytes]:
        """The model's TrainerSpec by field numbers of sentencepiece_model.proto."""
        return protobuf.message(self._proto.get(2, b""))

    @cached_property
    def normalizer(self) -> dict[int, int | bytes]:
        """The model's NormalizerSpec by field numbers of sentencepiece_model.proto."""
        return protobuf.message(self._proto.get(3, b""))

    @cached_property
    def prepends(self) -> bool:
        """Whether the model puts a space in front of every text (add_dummy_prefix)."""
        return bool(self.normalizer.get(3, 1))

    @cached_property
    def normalizes(self) -> bool:
        """Whether the model changes texts otherwise: by a rule, or taking spaces away (remove_extra_whitespaces)."""
        return bool(self.normalizer.get(2, b"")) or bool(self.normalizer.get(4, 1))

    @cached_property
    def _proto(self) -> dict[int, int | bytes]:
        return protobuf.message(self.data)

    def pieces(self) -> Iterator[tuple[str, float, str]]:
        """Every piece in the order of ids: its text, its score and what it is: normal, unknown, control, byte, ..."""
        kinds = {1: "normal", 2: "unknown", 3: "control", 4: "user defined", 5: "unused", 6: "byte"}
        parts = (protobuf.message(value) for number, value in protobuf.fields(self.data) if number == 1)
        for i, part in enumerate(parts):
            yield self._pieces.id_to_piece(i), self._pieces.get_score(i), kinds[part.get(3, 1)]

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """[size] int32: UTF-8 bytes of text that each id stands for; 0 for control ids and unknown."""
        return np.array([self._bytes(i) for i in range(self.size)], np.int32)

    def _bytes(self, token: int) -> int:
        if self._pieces.is_control(token) or self._pieces.is_unknown(token):
            return 0
        return 1 if self._pieces.is_byte(token) else len(self._pieces.id_to_piece(token).replace(SPACE, " ").encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        if self._space is None or SPACE not in text:
            return self._pieces.encode(text)  # a list of one would cost ten times as much
        return self._encode_around_space(text)

    def encode_several(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if self._space is None or not any(SPACE in text for text in texts):
            return self._pieces.encode(list(texts), num_threads=1)
        return [self._encode_around_space(text) for text in texts]

    def _encode_around_space(self, text: str) -> list[int]:
        first, *rest = self._pieces.encode(text.split(SPACE), num_threads=1)
        return first + [token for part in rest for token in [*self._space, *part]]

    def encode_spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of one text, and the index of the character at which each begins."""
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for number, part in enumerate([text] if self._space is None else text.split(SPACE)):
            if number:
                ids += self._space
                starts += [at] * len(self._space)
                at += 1
            new, begins = self._spans(part)
            ids += new
            starts += [at + begin for begin in begins]
            at += len(part)
        return ids, starts

    def _spans(self, text: str) -> tuple[list[int], list[int]]:
        data = text.encode()
        ids = self._pieces.encode(text)
        sizes = self.piece_bytes[ids]
        begins = np.cumsum(sizes) - sizes - self.prepends
        if self.normalizes or sizes.sum() != len(data) + (self.prepends and bool(ids)):  # the model has to say it
            begins = self._begins(text)
        if len(data) > len(text):
            heads = np.flatnonzero(np.frombuffer(data, np.uint8) & 0xC0 != 0x80)  # first bytes of characters
            begins = np.searchsorted(heads, begins, side="right") - 1
        return ids, np.maximum(begins, 0).tolist()

    def _begins(self, text: str) -> np.ndarray:
        """The byte at which each token begins, as SentencePiece's own message tells: slow."""
        found = protobuf.fields(self._pieces.encode(text, out_type="serialized_proto"))
        return np.array([protobuf.message(piece).get(4, 0) for number, piece in found if number == 2], np.int64)

    def decode(self, tokens: list[int]) -> str:
        """The text of ids that are all this model's."""
        return self._pieces.decode(tokens)


def train_model(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Learns a SentencePiece model from at most `config.sample_bytes` of `texts`; equal texts give equal bytes."""
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
    return model.getvalue()


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
    for text in texts:
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
