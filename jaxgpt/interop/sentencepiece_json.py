"""A SentencePiece model as a tokenizer.json, which transformers and the `tokenizers` library read.

Only where ids are equal for every text: byte-pair and character models without normalization. SentencePiece joins the
best-scored pair, the leftmost of several that make the same piece, and a list of merges ranks these by how the piece is
split. That makes no difference: two ways to split a piece never compete for the same characters (none of 90,000 random
strings under 3,000 random vocabularies of two letters came out otherwise).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgpt.data.sentencepiece_model import SPACE, SentencePieceModel
from jaxgpt.errors import UserError

_NOT = "the SentencePiece model cannot be exported to Hugging Face"
_CHARSMAP, _TRIM, _ESCAPE, _SUFFIX = 2, 4, 5, 24
"""Fields of NormalizerSpec: precompiled_charsmap, remove_extra_whitespaces, escape_whitespaces; of TrainerSpec:
treat_whitespace_as_suffix."""


def to_json(model: SentencePieceModel) -> dict[str, Any]:
    """The content of a tokenizer.json. Raises UserError where none would give the same ids for every text."""
    pieces = list(model.pieces())
    _check(model, [kind for _, _, kind in pieces])
    scores = {piece: score for piece, score, kind in pieces if kind == "normal"}
    merges = _merges(scores) if model.kind == "bpe" else []
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if model.prepends:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, spaces]}
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    else:
        normalizer = spaces
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens(model),
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "post_processor": _post_processor(model),
        "decoder": {"type": "Sequence", "decoders": back},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": model.names.get("unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(kind == "byte" for _, _, kind in pieces),
            "ignore_merges": False,
            "vocab": {piece: i for i, (piece, _, _) in enumerate(pieces)},
            "merges": merges,
        },
    }


def added_tokens(model: SentencePieceModel) -> list[dict[str, Any]]:
    """Control pieces and unknown, which are special, and the user's own symbols, as tokenizer.json lists them."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    return [
        {"id": i, "content": piece, **flags, "normalized": SPACE in piece, "special": kind != "user defined"}
        for i, (piece, _, kind) in enumerate(model.pieces())
        if kind in ("control", "unknown", "user defined")
    ]


def _check(model: SentencePieceModel, kinds: list[str]) -> None:
    """Raises UserError for what cannot be told in a tokenizer.json so that every text gets the same ids."""
    problems = {
        f"its model is {model.kind}; only bpe and char ones can be told exactly (scores of unigram ones are rounded "
        "otherwise there)": model.kind not in ("bpe", "char"),
        "it normalizes text by a rule other than identity": bool(model.normalizer.get(_CHARSMAP, b"")),
        "it removes extra spaces (remove_extra_whitespaces)": bool(model.normalizer.get(_TRIM, 1)),
        "it keeps spaces as they are (escape_whitespaces is off)": not model.normalizer.get(_ESCAPE, 1),
        "it puts spaces at the ends of pieces (treat_whitespace_as_suffix)": bool(model.trainer.get(_SUFFIX, 0)),
        "it has unused pieces": "unused" in kinds,
        "it has user-defined symbols, and puts a space in front of texts": model.prepends and "user defined" in kinds,
    }
    for problem, found in problems.items():
        if found:
            raise UserError(
                f"{_NOT}: {problem}, and transformers would tokenize otherwise than the model was trained with"
            )


def _post_processor(model: SentencePieceModel) -> dict[str, Any] | None:
    if model.bos is None:
        return None
    name = model.names["bos_token"]
    bos, text, pair = (
        {"SpecialToken": {"id": name, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    )
    second = {"SpecialToken": {"id": name, "type_id": 1}}
    special = {name: {"id": name, "ids": [model.bos], "tokens": [name]}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, second, pair],
        "special_tokens": special,
    }


def _merges(scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order in which they are merged."""
    lacking = next((piece for piece in scores if any(char not in scores for char in piece)), None)
    if lacking is not None:
        raise UserError(f"{_NOT}: the piece {lacking!r} has characters that are no pieces themselves")
    made = {piece: pairs for piece in scores if (pairs := _pairs(piece, scores))}
    order = sorted(made, key=lambda piece: (-scores[piece], -len(piece)))
    for _, group in itertools.groupby(order, key=lambda piece: scores[piece]):
        tied = list(group)
        if len(tied) > 1 and not (_alone(tied, scores) and _runs_agree([pair for one in tied for pair in made[one]])):
            raise UserError(
                f"{_NOT}: the pieces {tied[0]!r} and {tied[1]!r} have the same score, so that none of them comes first"
            )
    return [pair for piece in order for pair in made[piece]]


def _pairs(piece: str, scores: Mapping[str, float]) -> list[tuple[str, str]]:
    cuts = ((piece[:at], piece[at:]) for at in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in scores and right in scores]


def _alone(tied: Sequence[str], scores: Mapping[str, float]) -> bool:
    """Whether pieces are the runs of one character (LLaMA's of spaces have one score), which is twice in no other."""
    twice = tied[0][0] * 2
    return all(set(piece) == {twice[0]} for piece in tied) and {p for p in scores if twice in p} <= {*tied}


def _runs_agree(pairs: Sequence[tuple[str, str]]) -> bool:
    """Whether merging runs of a character, which pieces of one score make, comes out alike by list and by place."""
    char, longest = pairs[0][0][0], max(len(left + right) for left, right in pairs)
    listed = {pair: rank for rank, pair in enumerate(pairs)}
    equal = dict.fromkeys(pairs, 0)
    return all(_merged(char * size, listed) == _merged(char * size, equal) for size in range(4 * longest))


def _merged(text: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
    """Symbols of a text: the pair of the least rank is joined, the leftmost of equals, until there is none."""
    symbols = list(text)
    while found := [(ranks[pair], at) for at, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols
