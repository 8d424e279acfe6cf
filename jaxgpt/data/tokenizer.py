"""Tokenizers: text to token ids and back, and the chat template of conversations.

The pieces come from an engine: a SentencePiece model, or a tokenizer.json by the `tokenizers` library. Roles and the
ends of texts are control pieces, which no text encodes to: what a user writes is always plain text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.chat import check_template, valid_text
from jaxgpt.data.sentencepiece_model import SentencePieceModel, train_model
from jaxgpt.data.templates import default_template, read_template
from jaxgpt.data.tokenizer_folder import CONFIG, Engine, folder_template, read_engine
from jaxgpt.places import place, write_whole


class Tokenizer:
    """Pieces and a chat template."""

    def __init__(self, engine: Engine, template: str | None = None, template_name: str = "template"):
        """`template` is Jinja text; unset takes the built-in one that suits the pieces."""
        self.engine = engine
        self.size: int = engine.size
        self.control: dict[str, int] = engine.control
        self.bos: int | None = engine.bos
        """What the tokenizer puts in front of a text; None where it puts nothing there."""
        self.eos: int = engine.eos
        """Ends every text that a model is trained on."""
        self.ends: tuple[int, ...] = engine.ends
        """What ends a response: eos first, and whatever else the folder that the tokenizer came from lists."""
        self.pad: int = engine.pad
        """Fills rows; padding is known by lengths, never by this id."""
        self.unk: int | None = engine.unk
        """The id of characters that the pieces cannot spell; None where they can spell all."""
        if template is None:
            template, template_name = default_template(engine.control)
        self.template, self.template_name = template, template_name
        check_template(template, template_name)
        self._names = {i: piece for piece, i in self.control.items()}

    @classmethod
    def load(cls, path: str | Path, template: str | None = None) -> Tokenizer:
        """Reads a tokenizer: our folder, a Hugging Face model folder, a SentencePiece .model, a tokenizer.json, or a
        vocab.json with its merges.txt beside it.

        `template` is a Jinja file or the name of a built-in one; unset takes the folder's, else the built-in one that
        suits. Of a folder with a tokenizer.model and a tokenizer.json the first is read where it has all pieces.
        """
        path = place(path).expanduser()
        engine = read_engine(path)
        found = read_template(template) if template is not None else folder_template(path) if path.is_dir() else None
        return cls(engine, *(found or default_template(engine.control)))

    def save(self, folder: str | Path) -> None:
        """Writes the engine's file, tokenizer_config.json (what it does not say), template.jinja and summary.json (for
        people)."""
        folder = place(folder)
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"size": self.size, "bos": self.bos, "eos": self.eos, "pad": self.pad, "control": self.control}
        (folder / "template.jinja").write_bytes(self.template.encode())
        _write_json(folder / CONFIG, self.engine.settings)
        _write_json(folder / "summary.json", {**summary, "hash": self.hash})
        write_whole(folder / self.engine.file, self.engine.data)  # last: it means a whole folder

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the pieces and the template: equal hashes render conversations alike."""
        return hashlib.sha256(self.model_hash.encode() + self.template.encode()).hexdigest()

    @property
    def model_hash(self) -> str:
        """SHA-256 (hex) of the pieces alone: equal hashes tokenize text alike."""
        return self.engine.hash

    @property
    def prefix(self) -> list[int]:
        """What stands in front of a text: BOS, or nothing."""
        return [] if self.bos is None else [self.bos]

    @property
    def start(self) -> int:
        """What a document begins with, so that its first token is predicted from something: BOS, or else the end token
        of the document before."""
        return self.eos if self.bos is None else self.bos

    @property
    def piece_bytes(self) -> np.ndarray:
        """[size] int32: UTF-8 bytes of text that each id stands for; 0 for control ids and unknown."""
        return self.engine.piece_bytes

    @overload
    def encode(self, text: str) -> list[int]: ...
    @overload
    def encode(self, text: Sequence[str]) -> list[list[int]]: ...
    def encode(self, text: str | Sequence[str]) -> list[int] | list[list[int]]:
        """Token ids of one text or several; never a control id, so no BOS and no EOS.

        Halves of surrogate pairs, which are no characters, become U+FFFD.
        """
        if isinstance(text, str):
            return self.engine.encode(valid_text(text))
        return self.engine.encode_several([valid_text(one) for one in text])

    def encode_spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of one text, and the index of the character at which each begins.

        Tokens that spell one character together begin at the same.
        """
        return self.engine.encode_spans(valid_text(text))

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; control ids and ids beyond the model's pieces (rows that pad an embedding) give nothing."""
        return self.engine.decode([i for i in map(int, tokens) if 0 <= i < self.size and i not in self._names])

    def decode_visible(self, tokens: Iterable[int]) -> str:
        """The text with control pieces shown by name, for people to look at."""
        out: list[str] = []
        run: list[int] = []
        for token in [*map(int, tokens), -1]:  # -1 flushes the last run
            if 0 <= token < self.size and token not in self._names:
                run.append(token)
                continue
            out.append(self.engine.decode(run) if run else "")
            run = []
            if token >= 0:
                out.append(self._names.get(token, f"<{token}>"))
        return "".join(out)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learns a SentencePiece model from at most `config.sample_bytes` of `texts`; equal texts give equal bytes."""
    template = () if config.template is None else read_template(config.template)
    if template:
        check_template(*template)
    return Tokenizer(SentencePieceModel(train_model(map(valid_text, texts), config)), *template)


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
