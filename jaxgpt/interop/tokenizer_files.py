"""The tokenizer's part of a Hugging Face model folder: a tokenizer.json that gives equal ids, and what goes with it."""

from __future__ import annotations

import json
from typing import Any

from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.data.tokenizer_folder import Engine
from jaxgpt.data.tokenizer_json import TokenizerJson
from jaxgpt.errors import UserError
from jaxgpt.interop.sentencepiece_json import added_tokens, to_json

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen2's tokenizers split a text."""


PAD = "<|pad|>"
"""The piece that is added to a vocabulary without one that could pad."""


def with_pad(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with a named padding piece that ends no conversation: transformers' classifiers read the score at
    the last token that is not padding. Its own one, else unknown, else a piece added behind all others."""
    engine = tokenizer.engine
    own = engine.names.get("pad_token")
    unknown = engine.names.get("unk_token") if tokenizer.unk not in tokenizer.ends else None
    if own is not None and tokenizer.pad not in tokenizer.ends:
        return tokenizer
    settings, data = {**engine.settings, "pad_token": unknown or PAD}, engine.data
    if isinstance(engine, SentencePieceModel):  # which always has an unknown piece
        return Tokenizer(SentencePieceModel(data, settings), tokenizer.template, tokenizer.template_name)
    if unknown is None and PAD not in engine.control:
        spec = json.loads(data)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        spec["added_tokens"].append({"id": engine.size, "content": PAD, **flags})
        data = json.dumps(spec, ensure_ascii=False).encode()
    return Tokenizer(TokenizerJson(data, settings), tokenizer.template, tokenizer.template_name)


def tokenizer_files(tokenizer: Tokenizer, context: int, model_type: str | None = None) -> dict[str, bytes]:
    """Files by name, for a model of `context` tokens. `Tokenizer.load` of the folder gives an equal hash.

    transformers' AutoTokenizer reads tokenizer.json as it is, and llama.cpp reads tokenizer.model where there is one.
    `model_type` is that of the folder's config.json: for qwen2, transformers 5 takes Qwen2's own way to split texts
    whatever the files say. Raises UserError for a tokenizer that transformers would not follow exactly.
    """
    engine = tokenizer.engine
    if model_type == "qwen2" and not _splits_as_qwen2(engine):
        raise UserError(
            "transformers tokenizes for every model of type qwen2 as Qwen2 does, and this tokenizer is another; export "
            "the model as another type, or train it with Qwen2's tokenizer"
        )
    files = {engine.file: engine.data}
    if isinstance(engine, SentencePieceModel):
        files["tokenizer.json"] = _json(to_json(engine))
        added = added_tokens(engine)
        more = {"add_prefix_space": engine.prepends}
    else:
        added = [{**token, "special": token["special"] or token["content"] in engine.control} for token in engine.added]
        more = {"add_prefix_space": True} if engine.prepends else {}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **engine.settings,
        **engine.names,
        **more,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(token["id"]): _flags(token) for token in added},
    }
    files["tokenizer_config.json"] = _json(config, indent=2)
    files["special_tokens_map.json"] = _json(engine.names, indent=2)
    files["chat_template.jinja"] = tokenizer.template.encode()
    return files


def _splits_as_qwen2(engine: Engine) -> bool:
    if isinstance(engine, SentencePieceModel):
        return False
    spec = json.loads(engine.data)
    normalizer, splitter = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    first = next(iter(splitter.get("pretokenizers", ())), {})
    return normalizer.get("type") == "NFC" and first.get("pattern") == {"Regex": QWEN2}


def _flags(token: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}


def _json(value: object, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()
