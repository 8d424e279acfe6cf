"""The tokenizer's part of a Hugging Face model folder: a tokenizer.json that gives equal ids, and what goes with it."""

from __future__ import annotations

import json
from typing import Any

from jaxgpt.data.sentencepiece_model import SentencePieceModel
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.interop.sentencepiece_json import added_tokens, to_json


def tokenizer_files(tokenizer: Tokenizer, context: int) -> dict[str, bytes]:
    """Files by name, for a model of `context` tokens. `Tokenizer.load` of the folder gives an equal hash.

    transformers' AutoTokenizer reads tokenizer.json as it is, whatever the model; llama.cpp reads tokenizer.model where
    there is one. Raises UserError for a tokenizer that transformers could not follow exactly.
    """
    engine = tokenizer.engine
    files = {engine.file: engine.data}
    if isinstance(engine, SentencePieceModel):
        files["tokenizer.json"] = _json(to_json(engine))
        added = added_tokens(engine)
        more = {"add_prefix_space": bool(engine.normalizer.get(3, 1))}
    else:
        added = [{**token, "special": token["special"] or token["content"] in engine.control} for token in engine.added]
        more = {}
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


def _flags(token: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in token.items() if key != "id"}


def _json(value: object, indent: int | None = None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()
