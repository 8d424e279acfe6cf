"""Which files a tokenizer is read from: a folder of ours, a Hugging Face model folder, or one file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxgpt.data.records import read_object
from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer_json import TokenizerJson, from_merges, prefix_space
from jaxgpt.errors import UserError, nearest

Engine = SentencePieceModel | TokenizerJson

MODEL, JSON, CONFIG, SPECIAL, ADDED = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
MERGES = {"vocab.json": "merges.txt", "encoder.json": "vocab.bpe"}
"""Files of a byte-level vocabulary, and of its merges beside it."""
TEMPLATES = ("template.jinja", "chat_template.jinja", "chat_template.json")
_MODELS = ("generation_config.json", "config.json")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")


def read_engine(path: Path) -> Engine:
    """Reads the pieces of a folder or a file. Raises UserError, naming the file, where there are none to read."""
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(f"tokenizer {path} does not exist.{near}")
    if path.suffix == ".model":
        return SentencePieceModel(path.read_bytes(), name=str(path))
    if path.name in MERGES:
        return _from_merges(path)
    if path.suffix == ".json":
        return _from_json(path)
    raise UserError(
        f"tokenizer {path}: expected a folder, a SentencePiece .model, a tokenizer.json, or a vocab.json with its "
        "merges.txt"
    )


def tokenizer_files(path: Path) -> list[Path]:
    """The files that a tokenizer at `path` may be read from, those that are there."""
    home, names = (path, (MODEL, JSON, *MERGES, *MERGES.values())) if path.is_dir() else (path.parent, (path.name,))
    if not path.is_dir() and path.suffix == ".model":
        return [path]
    if path.name in MERGES:
        names = (path.name, MERGES[path.name])
    beside = (*(TEMPLATES if path.is_dir() else ()), CONFIG, SPECIAL, ADDED, *_MODELS)
    return [home / name for name in (*names, *beside) if (home / name).is_file()] or [path]


def folder_template(path: Path) -> tuple[str, str] | None:
    """(text, file) of a folder's own chat template, or None: a file, or the key of its tokenizer_config.json."""
    for name in TEMPLATES[:2]:
        if (path / name).is_file():
            try:
                return (path / name).read_bytes().decode("utf-8-sig"), str(path / name)
            except UnicodeDecodeError as error:
                raise UserError(f"chat template {path / name}: not UTF-8 at byte {error.start}") from error
    for name in (TEMPLATES[2], CONFIG):
        found = _json(path / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}.get("default")
        if isinstance(found, str):
            return found, str(path / name)
    return None


def read_settings(folder: Path) -> dict[str, Any]:
    """bos_token, eos_token and pad_token by their text, add_bos_token, and end_tokens by text or id where there are
    several, as far as a folder's files say."""
    config, special = _json(folder / CONFIG), _json(folder / SPECIAL)
    found: dict[str, Any] = {}
    for key in _NAMED:
        named = _text(config.get(key)) or _text(special.get(key))
        if named is not None and key != "unk_token":
            found[key] = named
    if isinstance(config.get("add_bos_token"), bool):
        found["add_bos_token"] = config["add_bos_token"]
    ids = (_json(folder / name).get("eos_token_id") for name in _MODELS)
    ends = next((i for i in ids if i not in (None, [])), None)
    if isinstance(config.get("end_tokens"), list):
        found["end_tokens"] = config["end_tokens"]
    elif isinstance(ends, list) and len(ends) > 1:
        found["end_tokens"] = ends
    if "eos_token" not in found:
        piece = _piece(folder, ends[0] if isinstance(ends, list) else ends)
        if piece is not None:
            found["eos_token"] = piece
    return found


def _from_folder(path: Path) -> Engine:
    settings = read_settings(path)
    model, file = path / MODEL, path / JSON
    lacking: list[str] = []
    if model.is_file() and _is_sentencepiece(model):
        engine = SentencePieceModel(model.read_bytes(), settings, str(model))
        own = {piece for piece, _, _ in engine.pieces()}
        lacking = [piece for piece in _added(path) if piece not in own]
        if not lacking:
            return engine
    if file.is_file():
        return _from_json(file)
    if lacking:
        raise UserError(
            f"{path}: the added token {lacking[0]} is no piece of {MODEL}, and there is no {JSON} to have it; save the "
            f"tokenizer once more by transformers, which writes {JSON}"
        )
    for name in MERGES:
        if (path / name).is_file():
            return _from_merges(path / name)
    found = f"; {MODEL} is not a SentencePiece model" if model.is_file() else ""
    raise UserError(f"tokenizer {path}: no {MODEL}, {JSON} or vocab.json with merges.txt in this folder{found}")


def _from_json(file: Path) -> TokenizerJson:
    engine = TokenizerJson(file.read_bytes(), read_settings(file.parent), str(file))
    wanted, found = _json(file.parent / CONFIG).get("add_prefix_space"), prefix_space(_json(file))
    if isinstance(wanted, bool) and found not in (None, wanted):
        raise UserError(
            f"{file}: its ByteLevel pre-tokenizer has add_prefix_space {_word(found)}, and {CONFIG} beside it says "
            f"{_word(wanted)}; make both say what the model was trained with"
        )
    return engine


def _word(value: Any) -> str:
    return json.dumps(value)


def _from_merges(vocab: Path) -> TokenizerJson:
    merges = vocab.parent / MERGES[vocab.name]
    if not merges.is_file():
        raise UserError(f"tokenizer {vocab}: its merges are missing: expected {merges.name} beside it")
    config = _json(vocab.parent / CONFIG)
    kind = config.get("tokenizer_class", "GPT2Tokenizer")
    if str(kind).removesuffix("Fast") != "GPT2Tokenizer":
        raise UserError(
            f"tokenizer {vocab}: of a {kind}, which splits text in a way of its own that only a {JSON} tells; save the "
            f"tokenizer once more by transformers, which writes {JSON}"
        )
    prefix = config.get("add_prefix_space") is True
    data = from_merges(vocab.read_bytes(), merges.read_bytes(), str(vocab), _beside(vocab.parent), prefix)
    return TokenizerJson(data, read_settings(vocab.parent), str(vocab))


def _is_sentencepiece(path: Path) -> bool:
    try:
        SentencePieceModel(path.read_bytes(), name=str(path))
    except UserError:
        return False
    return True


def _added(folder: Path) -> list[str]:
    """The tokens that a folder's files say were added to its model, or named."""
    config, special = _json(folder / CONFIG), _json(folder / SPECIAL)
    named = [_text(part.get(key)) for part in (config, special) for key in _NAMED]
    listed = [_text(token) for token in _values(config.get("added_tokens_decoder"))]
    more = [_text(token) for part in (config, special) for token in part.get("additional_special_tokens") or ()]
    return list(dict.fromkeys(t for t in (*named, *listed, *more, *_json(folder / ADDED)) if t is not None))


def _beside(folder: Path) -> dict[str, dict[str, Any]]:
    """The flags of the tokens that a folder's files say were added or name, by text; with their ids where told."""
    config, special = _json(folder / CONFIG), _json(folder / SPECIAL)
    parts = (config, special)
    named = {_text(value) for part in parts for key, value in part.items() if key.endswith("_token")}
    named |= {_text(token) for part in parts for token in part.get("additional_special_tokens") or ()}
    found: dict[str, dict[str, Any]] = {text: {} for text in sorted(text for text in named if text is not None)}
    for text, token in _json(folder / ADDED).items():
        found[text] = {"id": token, "special": False}
    for token, one in (config.get("added_tokens_decoder") or {}).items():
        if isinstance(one, dict) and _text(one) is not None:
            flags = {key: one[key] for key in _FLAGS if isinstance(one.get(key), bool)}
            found[one["content"]] = {"special": False, **flags, "id": int(token)}
    return {text: {**flags, "special": True} if text in named else flags for text, flags in found.items()}


def _piece(folder: Path, token: Any) -> str | None:
    """The added token of a number, by the files that give one."""
    if not isinstance(token, int):
        return None
    if (folder / JSON).is_file():
        added = _json(folder / JSON).get("added_tokens") or ()
        return next((one["content"] for one in added if one.get("id") == token), None)
    listed = {one: text for text, one in _json(folder / ADDED).items()}
    return _text((_json(folder / CONFIG).get("added_tokens_decoder") or {}).get(str(token))) or listed.get(token)


def _values(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, dict) else []


def _text(token: Any) -> str | None:
    """A token's text: files give it alone, or among its flags."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _json(file: Path) -> dict[str, Any]:
    """A file's object; empty where there is no such file."""
    return read_object(file) if file.is_file() else {}
