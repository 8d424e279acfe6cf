"""tokenizer.json files: text to token ids and back by the `tokenizers` library, imported only where such a file is.

Special tokens are control pieces, which no text encodes to. Read are byte-pair and unigram models, byte-level (GPT-2,
GPT-NeoX, Llama 3, Qwen2) or with byte fallback (LLaMA); a vocab.json with its merges becomes such a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from jaxgpt.errors import UserError

END = "<|endoftext|>"
"""GPT-2's end of text."""
_ENDS = (END, "</s>", "<|end_of_text|>", "<eos>")  # eos where nothing beside the file names it
_DECODERS = ("ByteLevel", "ByteFallback", "Replace", "Fuse", "Strip", "Metaspace")
_SPACE = "\u2581"


class TokenizerJson:
    """The engine of a tokenizer whose pieces are in a tokenizer.json."""

    file = "tokenizer.json"

    def __init__(self, data: bytes, settings: Mapping[str, Any] | None = None, name: str = "tokenizer.json"):
        """`settings` may name `bos_token`, `eos_token`, `pad_token` and say `add_bos_token`, as tokenizer_config.json
        does, and list `end_tokens`, by text or id, where several end what a model says. BOS goes in front of a text
        where that says so, or where the file's post-processor puts it there."""
        library = _library(name)
        self.data, settings = data, settings or {}
        spec = _checked(data, name)
        self._spec = spec
        ids = {token["content"]: token["id"] for token in spec["added_tokens"]}
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, list):
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        self._ids: dict[str, int] = vocab | ids
        self.size = max(self._ids.values()) + 1
        ends = [settings.get("eos_token"), *(end for end in _ENDS if "eos_token" not in settings)]
        eos = next((end for end in ends if end in self._ids), None)
        if eos is None:
            raise UserError(
                f"{name}: nothing says which token ends a text (found eos_token {settings.get('eos_token')!r}); name "
                'it in a tokenizer_config.json beside it: {"eos_token": "<|endoftext|>"}'
            )
        names = {"eos_token": eos} | {
            key: settings[key] for key in ("bos_token", "pad_token") if settings.get(key) in self._ids
        }
        first = next(_prefix(spec.get("post_processor")), None)
        if first in self._ids and settings.get("add_bos_token", True):
            names.setdefault("bos_token", first)
        if "add_bos_token" not in settings:
            self.bos = self._ids.get(first)
        else:
            self.bos = self._ids.get(names.get("bos_token")) if settings["add_bos_token"] else None
        unk = spec["model"].get("unk_token")
        if spec["model"]["type"] == "Unigram" and spec["model"].get("unk_id") is not None:
            unk = spec["model"]["vocab"][spec["model"]["unk_id"]][0]
        self.unk: int | None = self._ids.get(unk)
        self.eos = self._ids[eos]
        pads = (self._ids.get(names.get("pad_token")), self.unk, self.eos)
        self.pad: int = next(pad for pad in pads if pad is not None)
        listed = {one if isinstance(one, int) else self._ids.get(one) for one in settings.get("end_tokens", ())}
        more = listed & {*self._ids.values()} - {self.eos}
        self.ends: tuple[int, ...] = (self.eos, *sorted(more))
        special = {token["content"] for token in spec["added_tokens"] if token["special"] or token["id"] in more}
        special |= {*names.values()}
        self.control = {piece: self._ids[piece] for piece in sorted(special, key=self._ids.get) if piece != unk}
        self.names = names | ({} if self.unk is None else {"unk_token": unk})
        self.trims = {
            token["content"]: (token["lstrip"], token["rstrip"])
            for token in spec["added_tokens"]
            if token["content"] in self.control and (token["lstrip"] or token["rstrip"])
        }
        """Control pieces that take the white space before them, after them, or both, with them."""
        self._pieces = library.Tokenizer.from_str(json.dumps(_closed(spec, self.control)))
        self._pieces.encode_special_tokens = True
        self._check(name)

    def _check(self, name: str) -> None:
        """Raises UserError where the library gives ids other than the file's, or where text becomes a control id."""
        for piece, token in (self.control | {one["content"]: one["id"] for one in self.added}).items():
            if self._pieces.token_to_id(piece) != token:
                raise UserError(f"{name}: damaged: {piece} is {token} there, and not to the tokenizers library")
        for piece, token in self.control.items():
            if token in self.encode(piece):
                raise UserError(f"{name}: the text {piece} cannot be kept apart from the control token of this name")

    @property
    def settings(self) -> dict[str, Any]:
        """What makes this engine again, with the data."""
        named = {key: piece for key, piece in self.names.items() if key != "unk_token"}
        texts = {token: piece for piece, token in self._ids.items()}
        ends = {"end_tokens": [texts[token] for token in self.ends]} if len(self.ends) > 1 else {}
        return {**named, "add_bos_token": self.bos is not None, **ends}

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of the file and of what its settings add: equal hashes tokenize alike."""
        adds = (self.bos, self.eos, self.pad, *self.ends[1:])
        return hashlib.sha256(self.data + repr(adds).encode()).hexdigest()

    @cached_property
    def added(self) -> tuple[dict[str, Any], ...]:
        """The file's added tokens, special or not, as they stand there."""
        return tuple(self._spec["added_tokens"])

    @property
    def prepends(self) -> bool:
        """Whether a byte-level vocabulary puts a space in front of texts (add_prefix_space)."""
        return prefix_space(self._spec) or False

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in _types(self._spec.get("decoder"))

    @cached_property
    def piece_bytes(self) -> np.ndarray:
        """[size] int32: UTF-8 bytes of text that each id stands for; 0 for control ids and unknown."""
        out = np.zeros(self.size, np.int32)
        added = {token["content"] for token in self._spec["added_tokens"]}
        fallback = "ByteFallback" in _types(self._spec.get("decoder"))
        for piece, token in self._ids.items():
            if piece in self.control or token == self.unk:
                continue
            if piece in added:
                out[token] = len(piece.encode())
            elif self._byte_level:
                out[token] = len(piece)  # one character for each byte
            elif fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                out[token] = 1
            else:
                out[token] = len(piece.replace(_SPACE, " ").encode())
        return out

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self._pieces.encode(text, add_special_tokens=False).ids

    def encode_several(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        return [one.ids for one in self._pieces.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_spans(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of one text, and the index of the character at which each begins."""
        found = self._pieces.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    def decode(self, tokens: list[int]) -> str:
        """The text of ids that are all this model's."""
        return self._pieces.decode(tokens, skip_special_tokens=False)


def from_merges(
    vocab: bytes, merges: bytes, name: str, more: Mapping[str, Mapping[str, Any]], prefix_space: bool = False
) -> bytes:
    """A tokenizer.json of GPT-2's two files: vocab.json (or encoder.json) and merges.txt (or vocab.bpe).

    `more` are the flags of added tokens by text, with the id of those that are no pieces of the vocabulary. With
    `prefix_space` a text is tokenized as if a space stood before it.
    """
    try:
        pieces = json.loads(vocab)
        lines = [line for line in merges.decode().split("\n") if line and not line.startswith("#version")]
        pairs = [line.split(" ") for line in lines]
        if not isinstance(pieces, dict) or any(len(pair) != 2 or "".join(pair) not in pieces for pair in pairs):
            raise ValueError("a merge that is no piece of the vocabulary")
    except ValueError as error:
        raise UserError(f"{name}: not a byte-level vocabulary with its merges ({error})") from error
    level = {"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": False, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"content": text, **flags, **own, **_id(pieces, text)} for text, own in ({END: {}} | dict(more)).items()]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted((token for token in added if "id" in token), key=lambda token: token["id"]),
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": level,
        "decoder": level,
        "model": {**model, **affixes, "vocab": pieces, "merges": pairs},
    }
    return json.dumps(spec, ensure_ascii=False).encode()


def prefix_space(spec: Mapping[str, Any]) -> bool | None:
    """What a tokenizer.json that splits texts as GPT-2 does says of add_prefix_space; None for any other."""
    splitter = spec.get("pre_tokenizer") or {}
    return splitter.get("add_prefix_space", True) if splitter.get("type") == "ByteLevel" else None


def _id(pieces: Mapping[str, int], text: str) -> dict[str, int]:
    return {"id": pieces[text]} if text in pieces else {}


def _library(name: str) -> Any:
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise UserError(f"{name}: reading it needs the tokenizers library: pip install 'jaxgpt[hf]'") from error
    return tokenizers


def _checked(data: bytes, name: str) -> dict[str, Any]:
    """The file's JSON. Raises UserError where it is none, or of a kind that this engine does not know."""
    try:
        spec = json.loads(data)
        model, decoder = spec["model"], spec.get("decoder")
        kind = model.setdefault("type", "BPE" if "merges" in model else "")
        spec.setdefault("added_tokens", [])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: not a tokenizer.json of the tokenizers library") from error
    if kind not in ("BPE", "Unigram"):
        raise UserError(f"{name}: a {kind or 'nameless'} model; text can be kept whole by BPE and Unigram ones alone")
    strange = [decoder for decoder in _types(decoder) if decoder not in _DECODERS]
    if strange or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise UserError(
            f"{name}: decodes by {strange[0] if strange else 'word affixes'}; known are byte-level vocabularies and "
            "those with a sign for the space"
        )
    return spec


def _closed(spec: Mapping[str, Any], control: Mapping[str, int]) -> dict[str, Any]:
    """The file's JSON without any way from text to a control piece, or anything that is not about pieces."""
    model = dict(spec["model"])
    if model["type"] == "Unigram":
        model["vocab"] = [[piece, -1e6 if piece in control else score] for piece, score in model["vocab"]]
    elif any(piece in model["vocab"] for piece in control):
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if "".join(pair) not in control]
    added = [{**token, "special": token["special"] or token["content"] in control} for token in spec["added_tokens"]]
    return {**spec, "model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}


def _types(part: Mapping[str, Any] | None) -> list[str]:
    """Types of a decoder or post-processor, those of a sequence one by one."""
    if part is None:
        return []
    inner = part.get("decoders", part.get("processors"))
    return [part["type"]] if inner is None else [kind for one in inner for kind in _types(one)]


def _prefix(processor: Mapping[str, Any] | None) -> Iterator[str]:
    """The tokens that a post-processor puts in front of a text."""
    if processor is None:
        return
    for one in processor.get("processors", ()):
        yield from _prefix(one)
    if "cls" in processor:
        yield processor["cls"][0]
    for part in processor.get("single", ()):
        if "SpecialToken" not in part:
            return
        yield processor["special_tokens"][part["SpecialToken"]["id"]]["tokens"][0]
