"""Prompts to respond to, left-padded so that every response begins at the same place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgpt.data.chat import Message
from jaxgpt.data.conversations import messages_under, render_record
from jaxgpt.data.records import Paths, Record, read_jsonl
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError


class PromptRows:
    """Prompts as rows: `rows[i]` is {"tokens": [P], "segments": [P], "row": i}, int32; segments are 0 on padding.

    `records` are the JSON records, and `wheres` their places ("file:line"), in the same order.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], records: Sequence[Record], length: int, pad: int):
        self.prompts = [np.array(prompt, np.int32) for prompt in prompts]
        self.records: list[dict[str, Any]] = [record.value for record in records]
        self.wheres = [record.where for record in records]
        self.length = length
        self.pad = pad

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        prompt = self.prompts[row]
        tokens = np.full(self.length, self.pad, np.int32)
        segments = np.zeros(self.length, np.int32)
        tokens[self.length - len(prompt) :] = prompt
        segments[self.length - len(prompt) :] = 1
        return {"tokens": tokens, "segments": segments, "row": np.int32(row)}


def load_prompts(
    paths: Paths, tokenizer: Tokenizer, prompt_length: int, setting: str = "ppo.prompt_length"
) -> PromptRows:
    """Reads prompts, {"prompt"} or {"messages"}, rendered up to where the assistant is to speak.

    Raises UserError with file and line for one of more than `prompt_length` tokens (a prompt is never cut; `setting`
    names the limit) and for one that ends with an assistant turn.
    """
    prompts, records = [], []
    for record in read_jsonl(paths):
        ids = _rendered(record, tokenizer)
        if len(ids) > prompt_length:
            raise UserError(
                f"{record.where}: prompt has {len(ids)} tokens, {setting} is {prompt_length}; raise {setting} or "
                "shorten the prompt"
            )
        prompts.append(ids)
        records.append(record)
    if not prompts:
        raise UserError(f"{paths}: no prompts; each line is one JSON object")
    return PromptRows(prompts, records, prompt_length, tokenizer.pad)


def prompt_messages(record: Record) -> list[Message]:
    """The messages of a prompt, {"prompt"} or {"messages"}, up to where the assistant is to speak.

    Raises UserError with file and line where there are none, or the assistant has spoken last.
    """
    key = "messages" if "messages" in record.value and "prompt" not in record.value else "prompt"
    if key not in record.value:
        record.text("prompt")  # raises, with the keys that are there
    messages = messages_under(record, key)
    if messages[-1]["role"] == "assistant":
        raise UserError(
            f"{record.where}: the prompt ends with an assistant turn, so there is nothing to answer; drop it"
        )
    return messages


def _rendered(record: Record, tokenizer: Tokenizer) -> list[int]:
    return render_record(record, tokenizer, prompt_messages(record), add_generation_prompt=True)[0]
