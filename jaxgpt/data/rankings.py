"""Rankings to learn preferences from: all responses to one prompt stay together in one row."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import numpy as np

from jaxgpt.config.schema import Rankings
from jaxgpt.data.chat import Message
from jaxgpt.data.conversations import as_messages, messages_under, render_record
from jaxgpt.data.records import Paths, Record, read_jsonl
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError

WIDTH = 32
"""Rows are as wide as the longest of them needs, in units of so many tokens."""
SOURCES = ("subset", "kind", "source")
"""Keys of what a record is one of; the first that it has counts."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The rendered responses to one prompt, `ids` each [n] int32, and their ranks, 1 the best, equal for a tie.

    `spans`, each [n] uint8, are 1 on what the assistant says in the response and the token that ends it.
    """

    where: str
    prompt: str
    """The messages before the responses, as JSON: [[role, content], ...]."""
    ids: tuple[np.ndarray, ...]
    spans: tuple[np.ndarray, ...]
    ranks: tuple[int, ...]
    kind: str | None
    margin: float = 0.0
    """By how much the winner of each of its pairs has to win, in units of the score."""

    @property
    def messages(self) -> list[Message]:
        """The prompt."""
        return [{"role": role, "content": content} for role, content in json.loads(self.prompt)]


class RankingRows:
    """Rankings as rows: `rows[i]` is {"tokens": [K, context], "lengths": [K], "ranks": [K], "margin": []}.

    All int32, the margin float32. A ranking of fewer than K responses has length 0 and rank 0 for the ones it lacks.
    Padding tokens are 0.
    """

    def __init__(self, rankings: Sequence[Ranking], context: int, responses: int):
        self.rankings = list(rankings)
        self.context = context
        self.responses = responses

    def __len__(self) -> int:
        return len(self.rankings)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        ranking = self.rankings[row]
        tokens = np.zeros((self.responses, self.context), np.int32)
        lengths = np.zeros(self.responses, np.int32)
        ranks = np.zeros(self.responses, np.int32)
        ranks[: len(ranking.ranks)] = ranking.ranks
        for number, ids in enumerate(ranking.ids):
            tokens[number, : len(ids)] = ids
            lengths[number] = len(ids)
        return {"tokens": tokens, "lengths": lengths, "ranks": ranks, "margin": np.array(ranking.margin, np.float32)}


def load_rankings(
    paths: Paths,
    tokenizer: Tokenizer,
    context: int,
    responses: int | None,
    section: str = "reward",
    ties: Literal["drop", "half"] = "drop",
) -> RankingRows:
    """Reads rankings {"prompt", "responses", "ranks"} and pairs {"prompt", "chosen", "rejected"}, either with "margin".

    A prompt is a string or a list of messages. The responses may be whole conversations, which begin with the prompt;
    where that is not given, it is the messages that all begin with. Rows are as wide as the longest needs, and have as
    many responses. Raises UserError with file and line where ranks and responses do not match, nothing is preferred
    (unless ties count: "half"), there are more than `responses`, where that is given, or one does not fit the context
    with its prompt; `section` is the config section that the message points to.
    """
    rankings = [_ranking(record, tokenizer, context, responses, section, ties) for record in read_jsonl(paths)]
    if not rankings:
        raise UserError(f"{paths}: no rankings; each line is one JSON object")
    return _rows(rankings, context)


def load_split(
    data: Rankings,
    resolve: Callable[[str | tuple[str, ...]], list[str]],
    tokenizer: Tokenizer,
    context: int,
    responses: int,
    section: str = "reward",
    ties: Literal["drop", "half"] = "drop",
) -> tuple[RankingRows, RankingRows | None]:
    """Reads the training and the held-out rankings of a config section; `resolve` completes its paths.

    Raises UserError as `load_rankings` and `check_split` do, and where a share of the prompts is to be held out of a
    file that has but one.
    """
    rows = load_rankings(resolve(data.path), tokenizer, context, responses, section, ties)
    if data.eval_path is not None:
        test = load_rankings(resolve(data.eval_path), tokenizer, context, responses, section, ties)
        check_split(rows, test)
        return rows, test
    if data.val_fraction == 0:
        return rows, None
    held = held_prompts([ranking.prompt for ranking in rows.rankings], data.val_fraction)
    if not held:
        raise UserError(
            f"{section}.data.val_fraction is {data.val_fraction}, and all rankings are of one prompt, which cannot "
            "stand on both sides; set it to 0"
        )
    sides = [[r for r in rows.rankings if (r.prompt in held) == side] for side in (False, True)]
    return _rows(sides[0], context), _rows(sides[1], context)


def held_prompts(prompts: Sequence[str], fraction: float) -> set[str]:
    """The prompts whose hash falls in the fraction, at least one and not all; none where there is but one prompt."""
    hashes = {prompt: hashlib.sha256(prompt.encode()).digest()[:8] for prompt in prompts}
    order = sorted(hashes, key=hashes.__getitem__)
    below = sum(int.from_bytes(hashes[prompt], "big") < fraction * 2**64 for prompt in order)
    return set(order[: min(max(below, 1), len(order) - 1)])


def _rows(rankings: Sequence[Ranking], context: int) -> RankingRows:
    longest = max(len(ids) for ranking in rankings for ids in ranking.ids)
    width = min(-(-longest // WIDTH) * WIDTH, context)
    return RankingRows(rankings, width, max(len(ranking.ranks) for ranking in rankings))


def check_split(train: RankingRows, held_out: RankingRows) -> None:
    """Raises UserError where a prompt stands in both: its other responses would tell the answers."""
    seen = {ranking.prompt: ranking.where for ranking in train.rankings}
    shared = [ranking for ranking in held_out.rankings if ranking.prompt in seen]
    if shared:
        raise UserError(
            f"{shared[0].where}: its prompt is also at {seen[shared[0].prompt]}; {len(shared)} of "
            f"{len(held_out)} held-out rankings have prompts of the training file; keep all rankings of a prompt on "
            "one side, or the measured accuracy will be too high"
        )


def _ranking(record: Record, tokenizer: Tokenizer, context: int, most: int | None, section: str, ties: str) -> Ranking:
    prompt, replies, ranks = _parts(record)
    if len(set(ranks)) == 1 and ties == "drop":
        or_else = ", or set reward.ties=half" if section == "reward" else ""
        raise UserError(f"{record.where}: all ranks are equal, so no response is preferred; drop the line{or_else}")
    if most is not None and len(replies) > most:
        raise UserError(
            f"{record.where}: {len(replies)} responses, {section}.responses is {most}; raise it or drop some"
        )
    rendered, spans = [], []
    spoken = any(message["role"] == "assistant" for message in prompt)
    asked = render_record(record, tokenizer, prompt)[0] if spoken else []
    for number, reply in enumerate(replies):
        ids, mask = render_record(record, tokenizer, [*prompt, *reply])
        if len(ids) > context:
            raise UserError(
                f"{record.where}: response {number + 1} and its prompt take {len(ids)} tokens, {section}.context is "
                f"{context}; raise {section}.context or drop the line"
            )
        shared = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(asked, ids, strict=False)))
        rendered.append(np.array(ids, np.int32))
        spans.append(np.array([0] * shared + mask[shared:], np.uint8))
    key = json.dumps([[message["role"], message["content"]] for message in prompt], ensure_ascii=False)
    kind = next((found for name in SOURCES if isinstance(found := record.value.get(name), str)), None)
    return Ranking(record.where, key, tuple(rendered), tuple(spans), tuple(ranks), kind, _margin(record))


def _margin(record: Record) -> float:
    margin = record.value.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f'{record.where}: "margin" is {margin!r:.40}, expected a number')
    return float(margin)


def _parts(record: Record) -> tuple[list[Message], list[list[Message]], list[int]]:
    """The prompt; the responses, each as the messages that follow it; their ranks."""
    value = record.value
    if "chosen" in value and "rejected" in value:
        names, replies, ranks = ('"chosen"', '"rejected"'), [value["chosen"], value["rejected"]], [1, 2]
    elif "responses" in value and "ranks" in value:
        replies, ranks = value["responses"], value["ranks"]
        if not isinstance(replies, list) or len(replies) < 2:
            raise UserError(f'{record.where}: "responses" is {replies!r:.40}, expected a list of at least two')
        names = tuple(f'"responses"[{number}]' for number in range(len(replies)))
    else:
        found = ", ".join(f'"{key}"' for key in value)
        raise UserError(
            f'{record.where}: needs "responses" and "ranks", or "chosen" and "rejected"; the record has {found}'
        )
    _check_ranks(record, ranks, len(replies))
    if "prompt" not in value and any(isinstance(reply, str) for reply in replies):
        record.text("prompt")  # raises, with the keys that are there
    said = [
        as_messages(reply, f"{record.where}: {name}", "assistant") for name, reply in zip(names, replies, strict=True)
    ]
    shared, shortest = _shared(said), min(map(len, said))
    if "prompt" in value:
        prompt = messages_under(record, "prompt")
        whole = len(prompt) < shortest and _shared([prompt, *said]) == len(prompt)
        return prompt, [messages[len(prompt) :] for messages in said] if whole else said, ranks
    if not shared or shortest == shared:
        what = "no message in common" if not shared else "nothing behind the messages that all have in common"
        raise UserError(
            f'{record.where}: there is no "prompt", and the responses have {what}; give the prompt, or whole '
            "conversations that begin alike and end differently"
        )
    return said[0][:shared], [messages[shared:] for messages in said], ranks


def _shared(conversations: Sequence[Sequence[Message]]) -> int:
    """How many messages all conversations begin with."""
    pairs = [[(message["role"], message["content"]) for message in messages] for messages in conversations]
    return next((at for at, turns in enumerate(zip(*pairs, strict=False)) if len(set(turns)) > 1), min(map(len, pairs)))


def _check_ranks(record: Record, ranks: Any, count: int) -> None:
    if not isinstance(ranks, list) or any(type(rank) is not int or rank < 1 for rank in ranks):
        raise UserError(
            f'{record.where}: "ranks" is {ranks!r:.60}, expected whole numbers from 1, the best (equal ranks are ties)'
        )
    if len(ranks) != count:
        raise UserError(
            f'{record.where}: "ranks" has {len(ranks)} entries for {count} responses; give each response one rank, '
            "1 the best"
        )
