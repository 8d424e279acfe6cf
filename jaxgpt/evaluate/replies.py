"""Prompts that models are compared on, and what a model says to them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxgpt.data.chat import Message, render
from jaxgpt.data.prompts import prompt_messages
from jaxgpt.data.records import Record, read_jsonl
from jaxgpt.errors import UserError

if TYPE_CHECKING:
    from jaxgpt.api import Model
    from jaxgpt.evaluate.answers import Answers


@dataclass(frozen=True)
class Asked:
    """Prompts, M of them, as any model may be asked them."""

    records: Sequence[dict[str, Any]]
    messages: Sequence[Sequence[Message]]
    wheres: Sequence[str]
    """ "file:line" of each."""

    def __len__(self) -> int:
        return len(self.records)

    def times(self, count: int) -> Asked:
        """Each prompt `count` times, one after the other."""

        def repeated(values: Sequence[Any]) -> list[Any]:
            return [value for value in values for _ in range(count)]

        return Asked(repeated(self.records), repeated(self.messages), repeated(self.wheres))

    def taken(self, count: int) -> Asked:
        """The first `count` prompts; beyond the last they begin again."""
        rows = [row % len(self) for row in range(count)]
        return Asked(*([values[row] for row in rows] for values in (self.records, self.messages, self.wheres)))


def read_prompts(paths: Sequence[str], limit: int | None = None) -> Asked:
    """Reads {"prompt"} or {"messages"}, at most `limit`. Raises UserError with file and line for what is no prompt."""
    records: list[Record] = list(itertools.islice(read_jsonl(paths), limit))
    if not records:
        raise UserError(f"prompts: {', '.join(paths)} has none; each line is one JSON object")
    messages = [prompt_messages(record) for record in records]
    return Asked([record.value for record in records], messages, [record.where for record in records])


@dataclass(frozen=True)
class Sampling:
    """How models respond."""

    max_tokens: int
    temperature: float
    batch: int
    seed: int


@dataclass(frozen=True)
class Replies:
    """A model's responses, one to each prompt."""

    model: Model
    answers: Answers
    texts: list[str]
    """As a reader sees them."""

    @property
    def lengths(self) -> np.ndarray:
        """Characters of each response, [M]."""
        return np.array([len(text) for text in self.texts])

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of each response, its end included, [M]."""
        return np.array([len(response.tokens) for response in self.answers.responses])

    @property
    def ended(self) -> np.ndarray:
        """Whether each response came to its end within max_tokens, [M] bool."""
        return np.array([response.ended for response in self.answers.responses])


def reply(model: Model, asked: Asked, sampling: Sampling, stream: int) -> Replies:
    """A model's responses to prompts in its own chat template; responses of two streams are independent.

    Raises UserError for a reward model, and for a prompt that leaves no room for a response.
    """
    from jaxgpt.evaluate.answers import answer

    room = model.config.context - sampling.max_tokens
    prompts = []
    for messages, where in zip(asked.messages, asked.wheres, strict=True):
        try:
            prompt = render(model.tokenizer, messages, add_generation_prompt=True)[0]
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        if len(prompt) > room:
            raise UserError(
                f"{where}: {len(prompt)} tokens, and max_tokens {sampling.max_tokens} leaves {max(room, 0)} of the "
                f"context {model.config.context} of {model.folder}; lower max_tokens or shorten the prompt"
            )
        prompts.append(prompt)
    seed = int(np.random.SeedSequence([sampling.seed, stream]).generate_state(1)[0])
    answers = answer(model, prompts, sampling.max_tokens, sampling.temperature, sampling.batch, seed)
    return Replies(model, answers, [model.answer(response.text) for response in answers.responses])


def load_language(folder: Path, mesh: Any) -> Model:
    """Loads a model that can respond. Raises UserError for a reward model."""
    from jaxgpt.api import load

    model = load(folder, mesh=mesh)
    if model.kind != "language":
        raise UserError(f"{folder} holds a reward model, which says nothing; name a language model")
    return model
