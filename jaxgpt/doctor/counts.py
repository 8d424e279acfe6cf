"""Counts over a stage's data: what is learned, cut, doubled, unknown or told twice.

Reads files. Nothing here needs jax.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from jaxgpt.data.chat import Message, render_text
from jaxgpt.data.conversations import messages_of, render_record
from jaxgpt.data.prompts import PromptRows
from jaxgpt.data.rankings import Ranking
from jaxgpt.data.records import Paths, read_jsonl
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.doctor.check import Check, none_of
from jaxgpt.errors import UserError

CUT = 0.05
"""Share of the conversations that may be cut at the context."""
UNKNOWN = 1e-3
"""Share of the tokens that may be unknown."""
NO_LIMIT = 1 << 30
"""A context that cuts nothing."""


@dataclass(frozen=True)
class Conversation:
    """A rendered conversation, whole."""

    where: str
    messages: Sequence[Message]
    ids: np.ndarray
    mask: np.ndarray

    @property
    def prompt(self) -> str:
        """What stands before the first answer."""
        return key_of([m for m in self.messages if m["role"] != "assistant"][:2])


def key_of(messages: Sequence[Message]) -> str:
    """Messages as something to compare."""
    return json.dumps([[message["role"], message["content"]] for message in messages], ensure_ascii=False)


def read_conversations(paths: Paths, tokenizer: Tokenizer, fields: tuple[str, str]) -> tuple[list[Conversation], list]:
    """Reads conversations, and what speaks against the records that are none."""
    found, bad = [], []
    for record in read_jsonl(paths):
        try:
            messages = messages_of(record, *fields)
            ids, mask = render_record(record, tokenizer, messages)
        except UserError as error:
            bad.append(str(error))
            continue
        found.append(Conversation(record.where, messages, np.array(ids), np.array(mask)))
    return found, bad


def count_conversations(
    rows: Sequence[Conversation],
    bad: Sequence[str],
    held_out: Sequence[Conversation],
    tokenizer: Tokenizer,
    context: int,
) -> list[Check]:
    """What is in conversations of `sft.context` = `context`."""
    tokens, trained = sum(len(r.ids) for r in rows), sum(int(r.mask.sum()) for r in rows)
    share = f"{trained / max(tokens, 1):.0%} of {tokens:,} tokens trained"
    empty = [r.where for r in rows if not r.mask[1 : context + 1].any()]
    lost = [len(r.ids) - context - 1 for r in rows if len(r.ids) > context + 1]
    open_ended = [r.where for r in rows if _trained_ends(r, tokenizer) < _answers(r)]
    twice = {r.prompt for r in rows} & {r.prompt for r in held_out}
    return [
        Check("conversations", f"{len(rows):,}", change=share),
        none_of("records that are no conversations", len(bad), f"mend or drop them; the first: {''.join(bad[:1])}"),
        none_of(
            "rows with nothing to learn", len(empty),
            f"{_first(empty)}no token within sft.context={context} is the assistant's: raise sft.context, shorten the "
            "prompts, or mend the template's generation block",
        ),
        Check(
            "rows cut at the context", f"{len(lost):,}{_most(lost)}", f"at most {CUT:.0%}",
            len(lost) <= CUT * len(rows),
            f"raise sft.context (now {context}, the longest needs {context + max(lost, default=0)}) or shorten the "
            "rows: what is cut never learns to end",
        ),
        none_of(
            "rows with an end not trained", len(open_ended),
            f"{_first(open_ended)}put the end token inside the template's generation block (template "
            f"{tokenizer.template_name}): a model that never learns to end talks up to the limit",
        ),
        round_trip(rows, tokenizer),
        *_tokens([r.ids for r in rows], [r.where for r in rows], tokenizer),
        Check("prompts also held out", f"{len(twice):,}", change="the held-out loss is too good" * bool(twice)),
    ]  # fmt: skip


def count_rankings(
    rows: Sequence[Ranking], held_out: Sequence[Ranking], tokenizer: Tokenizer, context: int, section: str
) -> list[Check]:
    """What is in rankings."""
    pairs = [(a, b) for r in rows for a, b in combinations(range(len(r.ranks)), 2)]
    ties = sum(r.ranks[a] == r.ranks[b] for r in rows for a, b in combinations(range(len(r.ranks)), 2))
    longest = [max(map(len, r.ids)) for r in rows]
    long = [length - context for length in longest if length > context]
    same = [r.where for r in rows if _contradicts(r)]
    empty = [r.where for r in rows if not all(span[1:].any() for span in r.spans)]
    prompts = {r.prompt for r in rows}
    twice = [r.where for r in held_out if r.prompt in prompts]
    alone = len(rows) - len(prompts)
    return [
        Check("rankings", f"{len(rows):,}", change=f"{len(pairs):,} pairs"),
        Check("tied pairs", f"{ties:,} of {len(pairs):,}"),
        none_of(
            "rankings beyond the context", len(long),
            f"raise {section}.context to {max(longest, default=0)}, or drop the longer ones", _most(long),
        ),
        none_of(
            "responses without a trained token", len(empty),
            f"{_first(empty)}mend the template's generation block, or drop empty responses",
        ),
        none_of(
            "equal responses, different ranks", len(same),
            f"{_first(same)}the same text cannot be better than itself: give both one rank, or drop one",
        ),
        *_tokens([ids for r in rows for ids in r.ids], [r.where for r in rows for _ in r.ids], tokenizer),
        Check("rankings of a prompt seen before", f"{alone:,}"),
        none_of(
            "held-out prompts also trained on", len(twice),
            f"{_first(twice)}keep all rankings of a prompt on one side",
        ),
    ]  # fmt: skip


def count_prompts(
    rows: PromptRows, held_out: PromptRows | None, tokenizer: Tokenizer, length: int, section: str
) -> list[Check]:
    """What is in prompts of at most `length` tokens."""
    sizes = [len(prompt) for prompt in rows.prompts]
    long = [size - length for size in sizes if size > length]
    first = [where for where, size in zip(rows.wheres, sizes, strict=True) if size > length]
    counted = Counter(prompt.tobytes() for prompt in rows.prompts)
    checks = [
        Check("prompts", f"{len(rows):,}", change=f"{np.mean(sizes):.1f} tokens on average, at most {max(sizes)}"),
        none_of(
            "prompts too long", len(long),
            f"{_first(first)}raise {section}.prompt_length (now {length}) to {max(sizes)}, or shorten them; a prompt "
            "is never cut",
            _most(long),
        ),
        *_tokens(rows.prompts, rows.wheres, tokenizer),
        Check("prompts told again", f"{len(rows) - len(counted):,}"),
    ]  # fmt: skip
    if held_out is not None:
        twice = sum(prompt.tobytes() in counted for prompt in held_out.prompts)
        remark = "the evaluation knows these from training" * bool(twice)
        checks.append(Check("prompts also in evaluate.data", f"{twice:,} of {len(held_out):,}", change=remark))
    return checks


def template_writes_one_bos(tokenizer: Tokenizer) -> Check:
    """How often the template writes BOS in a conversation of two turns; rows keep one of several in front."""
    name = "BOS that the template writes"
    if tokenizer.bos is None or tokenizer.bos in tokenizer.ends:
        return Check(name, "the tokenizer has none of its own")
    piece = next(piece for piece, number in tokenizer.control.items() if number == tokenizer.bos)
    talk = [{"role": role, "content": "A"} for role in ("user", "assistant", "user", "assistant")]
    found = render_text(tokenizer, talk).count(piece)
    return Check(
        name, str(found), "exactly 1", found == 1,
        f"write {{{{ bos_token }}}} once, before the loop over messages, in template {tokenizer.template_name}",
    )  # fmt: skip


def round_trip(rows: Sequence[Conversation], tokenizer: Tokenizer, most: int = 256) -> Check:
    """Whether the trained tokens, as text, are what the assistant says: without white space, in Unicode's NFKC."""
    lost = []
    for row in rows[:most]:
        said = "".join(message["content"] for message in row.messages if message["role"] == "assistant")
        if _bare(tokenizer.decode(row.ids[row.mask > 0].tolist())) != _bare(said):
            lost.append(row.where)
    return none_of(
        "answers that are not the trained text", len(lost),
        f"{_first(lost)}the template's generation block must hold the assistant's content and end token, no more and "
        "no less; where it does, the tokenizer loses characters (tokenizer.byte_fallback=true)",
    )  # fmt: skip


def _bare(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _answers(row: Conversation) -> int:
    return sum(message["role"] == "assistant" for message in row.messages)


def _trained_ends(row: Conversation, tokenizer: Tokenizer) -> int:
    return int(np.sum(np.isin(row.ids, tokenizer.ends) & (row.mask > 0)))


def _contradicts(ranking: Ranking) -> bool:
    known: dict[bytes, int] = {}
    pairs = zip((ids.tobytes() for ids in ranking.ids), ranking.ranks, strict=True)
    return any(known.setdefault(text, rank) != rank for text, rank in pairs)


def _tokens(rows: Sequence[np.ndarray], wheres: Sequence[str], tokenizer: Tokenizer) -> list[Check]:
    """BOS and unknown tokens of rendered rows."""
    checks = []
    if tokenizer.bos is not None and tokenizer.bos not in tokenizer.ends:
        wrong = [w for ids, w in zip(rows, wheres, strict=True) if np.sum(np.asarray(ids) == tokenizer.bos) != 1]
        checks.append(
            none_of(
                "rows without exactly one BOS", len(wrong),
                f"{_first(wrong)}write {{{{ bos_token }}}} once, before the loop over messages, in template "
                f"{tokenizer.template_name}",
            )
        )  # fmt: skip
    if tokenizer.unk is not None:
        unknown = sum(int(np.sum(np.asarray(ids) == tokenizer.unk)) for ids in rows)
        total = sum(len(ids) for ids in rows)
        checks.append(
            Check(
                "unknown tokens", f"{unknown:,} of {total:,}", f"at most {UNKNOWN:.1%}", unknown <= UNKNOWN * total,
                "set tokenizer.byte_fallback=true, or take a tokenizer that knows these characters",
            )
        )  # fmt: skip
    return checks


def _first(wheres: Sequence[str]) -> str:
    return f"the first is {wheres[0]}; " if wheres else ""


def _most(lost: Sequence[int]) -> str:
    return f", by up to {max(lost)} tokens" if lost else ""
