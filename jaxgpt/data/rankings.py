"""Rankings to learn preferences from: all responses to one prompt stay together in one row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from jaxgpt.data.chat import Message
from jaxgpt.data.conversations import as_messages, messages_under, render_record
from jaxgpt.data.records import Paths, Record, read_jsonl
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError


@dataclass(frozen=True, slots=True)
class Ranking:
    """The rendered responses to one prompt, `ids` each [n] int32, and their ranks, 1 the best, equal for a tie.

    `spans`, each [n] uint8, are 1 on what the assistant says in the response and the token that ends it.
    """

    where: str
    prompt: str
    ids: tuple[np.ndarray, ...]
    spans: tuple[np.ndarray, ...]
    ranks: tuple[int, ...]
    kind: str | None


class RankingRows:
    """Rankings as rows: `rows[i]` is {"tokens": [K, context], "lengths": [K], "ranks": [K]}, all int32.

    A ranking of fewer than K responses has length 0 and rank 0 for the ones it lacks. Padding tokens are 0.
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
        return {"tokens": tokens, "lengths": lengths, "ranks": ranks}


def load_rankings(
    paths: Paths, tokenizer: Tokenizer, context: int, responses: int, section: str = "reward"
) -> RankingRows:
    """Reads rankings {"prompt", "responses", "ranks"} and pairs {"prompt", "chosen", "rejected"}.

    A prompt is a string or a list of messages. Raises UserError with file and line where ranks and responses do not
    match, nothing is preferred, there are more than `responses`, or one does not fit the context with its prompt;
    `section` is the config section that the message points to.
    """
    rankings = [_ranking(record, tokenizer, context, responses, section) for record in read_jsonl(paths)]
    if not rankings:
        raise UserError(f"{paths}: no rankings; each line is one JSON object")
    return RankingRows(rankings, context, responses)


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


def _ranking(record: Record, tokenizer: Tokenizer, context: int, most: int, section: str) -> Ranking:
    prompt = _prompt(record)
    replies, ranks = _replies(record)
    if len(replies) > most:
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
    kind = record.value.get("kind")
    key = json.dumps([[message["role"], message["content"]] for message in prompt], ensure_ascii=False)
    kind = kind if isinstance(kind, str) else None
    return Ranking(record.where, key, tuple(rendered), tuple(spans), tuple(ranks), kind)


def _prompt(record: Record) -> list[Message]:
    if "prompt" not in record.value:
        record.text("prompt")  # raises, with the keys that are there
    return messages_under(record, "prompt")


def _replies(record: Record) -> tuple[list[list[Message]], list[int]]:
    """The responses, each as the messages that follow the prompt, and their ranks."""
    value = record.value
    if "chosen" in value and "rejected" in value:
        replies, ranks = [value["chosen"], value["rejected"]], [1, 2]
    elif "responses" in value and "ranks" in value:
        replies, ranks = value["responses"], value["ranks"]
    else:
        found = ", ".join(f'"{key}"' for key in value)
        raise UserError(
            f'{record.where}: needs "responses" and "ranks", or "chosen" and "rejected"; the record has {found}'
        )
    if not isinstance(replies, list) or len(replies) < 2:
        raise UserError(f'{record.where}: "responses" is {replies!r:.40}, expected a list of at least two')
    _check_ranks(record, ranks, len(replies))
    where = f"{record.where}: a response"
    return [as_messages(reply, where, "assistant") for reply in replies], ranks


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
    if len(set(ranks)) == 1:
        raise UserError(f"{record.where}: all ranks are equal, so no response is preferred; drop the line")
