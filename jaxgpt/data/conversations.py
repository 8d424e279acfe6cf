"""Conversations to learn from: rendered, checked, and packed into rows that any step can look up."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgpt.data.chat import Message, render
from jaxgpt.data.records import Paths, Record, read_jsonl
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError, nearest

BLOCK = 4096
"""Conversations that are packed together; a row never mixes two blocks."""
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "system": "system",
}
"""Roles of those who speak in ShareGPT conversations."""


@dataclass(frozen=True, slots=True)
class Example:
    """One rendered conversation: `ids` [n] int32, `mask` [n] uint8 (1 where the token is trained), `cut` at its end."""

    ids: np.ndarray
    mask: np.ndarray
    cut: bool = False


def load_conversations(
    paths: Paths,
    tokenizer: Tokenizer,
    context: int,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    setting: str = "sft.context",
) -> list[Example]:
    """Reads conversations: records with "messages", with ShareGPT's "conversations", or with a prompt and a completion
    under the given keys.

    What the assistant says before the first human turn of a ShareGPT conversation is left out, as FastChat does.
    One that takes more than `context` + 1 tokens (the last is only ever a target) loses its end. Raises UserError with
    file and line where nothing would be trained: no assistant turn, or none within the context (`setting` names it).
    """
    examples = []
    for record in read_jsonl(paths):
        messages = messages_of(record, prompt_field, completion_field)
        if not any(message["role"] == "assistant" for message in messages):
            raise UserError(
                f"{record.where}: no assistant turn, so nothing can be learned; "
                'add a message {"role": "assistant", "content": ...} or drop the line'
            )
        ids, mask = render_record(record, tokenizer, messages)
        if not any(mask[1:]):
            raise UserError(f"{record.where}: the chat template marks no token as the assistant's")
        if not any(mask[1 : context + 1]):
            raise UserError(
                f"{record.where}: {mask.index(1, 1)} tokens come before the first answer, {setting} is {context}: "
                f"nothing is left to learn; raise {setting} or shorten the prompt"
            )
        kept = slice(context + 1)
        examples.append(Example(np.array(ids[kept], np.int32), np.array(mask[kept], np.uint8), len(ids) > context + 1))
    if not examples:
        raise UserError(f"{_named(paths)}: no conversations; each line is one JSON object")
    return examples


def load_demonstrations(
    paths: Paths,
    tokenizer: Tokenizer,
    context: int,
    prompt_field: str = "prompt",
    completion_field: str = "completion",
    setting: str = "reward.context",
) -> tuple[list[np.ndarray], int]:
    """Reads the conversations of `load_conversations` up to the end of the assistant's last turn, each [n] int32.

    One of more than `context` tokens (`setting` names the limit) is left out: its response would have no end. Returns
    the others and how many were left out. Raises UserError where none is left or has an assistant turn.
    """
    kept, long = [], 0
    for record in read_jsonl(paths):
        messages = messages_of(record, prompt_field, completion_field)
        ends = [at for at, message in enumerate(messages, start=1) if message["role"] == "assistant"]
        if ends:
            ids, _ = render_record(record, tokenizer, messages[: ends[-1]])
            if len(ids) <= context:
                kept.append(np.array(ids, np.int32))
            else:
                long += 1
    if not kept:
        why = (
            f"all {long} have more than {setting}={context} tokens; raise it" if long else "none has an assistant turn"
        )
        raise UserError(f"{_named(paths)}: no demonstrations: {why}")
    return kept, long


class PackedConversations:
    """Rows of several conversations each: best-fit decreasing inside blocks of examples, the same for the same input.

    `rows[i]` is a dict of [context] arrays, all int32 but `mask`, which is float32: tokens; targets (the next token of
    the same conversation); mask (1 where the target is trained); segments (1, 2, … by conversation, 0 padding);
    positions (from 0 in each conversation). Padding is 0 everywhere.
    """

    def __init__(self, examples: Sequence[Example], context: int, block: int = BLOCK):
        self.context = context
        self.count = len(examples)
        """Conversations in all."""
        lengths = np.array([len(example.ids) for example in examples], np.int64)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])
        self._ids = np.concatenate([example.ids for example in examples])
        self._mask = np.concatenate([example.mask for example in examples])
        self.members: list[list[int]] = []
        for start in range(0, len(examples), block):
            slots = (lengths[start : start + block] - 1).tolist()
            self.members += [[start + index for index in row] for row in best_fit(slots, context)]
        self.efficiency = float((lengths - 1).sum() / (len(self.members) * context))
        """Share of the rows' positions that hold a token."""
        self.cut = sum(example.cut for example in examples)
        """Conversations that lost their end."""

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        names = ("tokens", "targets", "segments", "positions")
        out = {name: np.zeros(self.context, np.int32) for name in names} | {"mask": np.zeros(self.context, np.float32)}
        at = 0
        for segment, example in enumerate(self.members[row], start=1):
            start, stop = self._starts[example], self._starts[example + 1]
            place = slice(at, at := at + int(stop - start) - 1)
            out["tokens"][place] = self._ids[start : stop - 1]
            out["targets"][place] = self._ids[start + 1 : stop]
            out["mask"][place] = self._mask[start + 1 : stop]
            out["segments"][place] = segment
            out["positions"][place] = np.arange(stop - start - 1)
        return out


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs items into as few rows of `capacity` as it can: longest first, each into the fullest row with room.

    Returns the items' indices by row; every length is from 1 to `capacity`.
    """
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free places -> rows with just as many
    sizes: list[int] = []  # the keys of room, sorted
    for item in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        found = bisect_left(sizes, lengths[item])
        if found < len(sizes):
            free = sizes[found]
            row = room[free].pop()
            if not room[free]:
                del room[free], sizes[found]
        else:
            free, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        if left := free - lengths[item]:
            if left not in room:
                room[left] = []
                insort(sizes, left)
            room[left].append(row)
    return rows


def messages_under(record: Record, key: str, role: str = "user") -> list[Message]:
    """The messages under `key`: a list of them, or a string that is one message of `role`."""
    value = record.value[key]
    return as_messages(value, f'{record.where}: "{key}"', role)


def as_messages(value: Any, where: str, role: str) -> list[Message]:
    """A string as one message of `role`, or a list of messages as it is; UserError, beginning with `where`, else."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise UserError(f'{where} is {value!r:.40}, expected a string or a list of {{"role", "content"}}')
    check_messages(value, where)
    return value


def check_messages(messages: Sequence[Any], where: str) -> None:
    """Raises UserError, beginning with `where`, for a message that is not {"role", "content"}, both strings."""
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise UserError(f'{where}[{number}] is {message!r:.40}, expected an object {{"role", "content"}}')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                near = nearest(key, message) if key not in message else ""
                raise UserError(f'{where}[{number}]: "{key}" is {message.get(key)!r:.40}, expected a string.{near}')


def render_record(
    record: Record, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """`chat.render` of messages that came from `record`, whose place is put before what the template refuses."""
    try:
        return render(tokenizer, messages, add_generation_prompt)
    except UserError as error:
        raise UserError(f"{record.where}: {error}") from error


def messages_of(record: Record, prompt_field: str = "prompt", completion_field: str = "completion") -> list[Message]:
    """The messages of a conversation in any of the forms of `load_conversations`; UserError where it has none."""
    if "messages" in record.value:
        return messages_under(record, "messages")
    if "conversations" in record.value:
        return _sharegpt(record)
    for key in (prompt_field, completion_field):
        if key not in record.value:
            found = ", ".join(f'"{name}"' for name in record.value) or "no keys"
            raise UserError(
                f'{record.where}: needs "messages", "conversations", or "{prompt_field}" and "{completion_field}"; it '
                f"has {found}; other keys are named by prompt_field and completion_field.{nearest(key, record.value)}"
            )
    return [*messages_under(record, prompt_field), *messages_under(record, completion_field, "assistant")]


def _sharegpt(record: Record) -> list[Message]:
    """The messages under "conversations": {"from", "value"}, from the first human turn on, the system's before it."""
    turns, where = record.value["conversations"], f'{record.where}: "conversations"'
    if not isinstance(turns, list):
        raise UserError(f'{where} is {turns!r:.40}, expected a list of {{"from", "value"}}')
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise UserError(f'{where}[{number}] is {turn!r:.40}, expected an object {{"from", "value"}}')
        for key in ("from", "value"):
            if not isinstance(turn.get(key), str):
                near = nearest(key, turn) if key not in turn else ""
                raise UserError(f'{where}[{number}]: "{key}" is {turn.get(key)!r:.40}, expected a string.{near}')
        speaker = turn["from"]
        if speaker not in SPEAKERS:
            known = ", ".join(SPEAKERS)
            near = nearest(speaker, SPEAKERS)
            raise UserError(f'{where}[{number}]: "from" is {speaker!r:.40}, expected one of {known}.{near}')
        messages.append({"role": SPEAKERS[speaker], "content": turn["value"]})
    first = next((at for at, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise UserError(f"{where} has no turn of a human, so there is nothing to answer; drop the record")
    return [message for message in messages[:first] if message["role"] == "system"] + messages[first:]


def _named(paths: Paths) -> str:
    return str(paths) if not isinstance(paths, Sequence) or isinstance(paths, str) else ", ".join(map(str, paths))
