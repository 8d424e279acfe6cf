"""A run in the terminal: a text continued as it is decoded, and a conversation.

Reads standard input; writes standard output, and notes to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from jaxgpt.api import Generation, Model, keep_compiled, load
from jaxgpt.config.options import SamplingOptions
from jaxgpt.errors import UserError, nearest
from jaxgpt.evaluate.answers import few_shot_prompt
from jaxgpt.runs import find_stage, finished

ROOM = 4
"""A conversation leaves at least one part in this many of the context to the answer."""
PLAIN_STOP = "\n"
"""Where a base model's answer ends: the conversation is given to it as one line a question."""
COMMANDS = {
    "/reset": "forget the conversation",
    "/stage NAME": "talk to another stage: base, sft or ppo; without a name, list them",
    "/system TEXT": "set the system message; without a text, remove it",
    "/help": "this list",
    "/exit": "leave, as does the end of input",
}
_UNSEEN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def sample(run: Path, text: str, options: SamplingOptions) -> int:
    """Prints a text and its continuation as it is decoded; on a terminal the text is dim.

    The continuation ends at the model's context where that comes before options.max_tokens. Raises UserError where
    the text leaves it no room.
    """
    keep_compiled()
    _readable()
    model = _language_model(run, options.stage)
    ids = model.encode(text)
    room = model.config.context - len(ids)
    if room < 1:
        raise UserError(
            f"the text has {len(ids)} tokens, and the model's context is {model.config.context}; shorten it"
        )
    limited = dataclasses.replace(options, max_tokens=min(options.max_tokens, room))
    screen = Console(highlight=False)
    screen.out(_visible(text), style="dim", end="") if screen.is_terminal else print(text, end="", flush=True)
    try:
        ended = _stream(model, ids, limited, _Growing(_write).show).ended
    finally:
        print(flush=True)
    if not ended and room < options.max_tokens:
        _note(f"ended at the model's context of {model.config.context} tokens")
    return 0


def chat(run: Path, options: SamplingOptions) -> int:
    """Answers line by line until the end of input; lines that begin with "/" are commands (COMMANDS).

    On a terminal answers appear as they are decoded, and Ctrl-C ends an answer. Elsewhere each answer is one line.
    """
    keep_compiled()
    _readable()
    live = sys.stdin.isatty() and sys.stdout.isatty()
    if live:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() its history and editing keys)
    talk = Chat(run, options, live)
    if live:
        _note(f"{talk.model.folder}: /help lists the commands")
    while (line := _read(f"{talk.stage}> " if live else None)) is not None:
        line = line.strip()
        try:
            if line.startswith("/"):
                if not talk.command(line):
                    return 0
            elif line:
                talk.say(line)
        except UserError as error:
            _note(str(error))
    return 0


@dataclasses.dataclass
class Turn:
    """A message of the user and the answer to it."""

    user: str
    answer: str = ""


class Chat:
    """A conversation with the stages of a run; their models are loaded on first use."""

    def __init__(self, run: Path, options: SamplingOptions, live: bool):
        self.run, self.options, self.live = run, options, live
        self.models: dict[Path, Model] = {}
        self.turns: list[Turn] = []
        self.system = ""
        self.said = 0
        self.enter(options.stage)

    @property
    def stage(self) -> str:
        """Name of the stage that answers."""
        return self.model.folder.name

    @property
    def base(self) -> bool:
        """Whether it is a base model, which knows documents and no conversations."""
        return self.stage == "pretrain"

    def enter(self, stage: str | None) -> None:
        """Takes another stage; the conversation goes on. Raises UserError where it is not finished or cannot speak."""
        folder = find_stage(self.run, stage)
        if folder not in self.models:
            self.models[folder] = _language_model(folder, None)
        self.model = self.models[folder]
        if self.base:
            shown = few_shot_prompt([], "...").replace("\n", " ")
            _note(f"{folder} is a base model: it continues text, so the conversation is given to it as '{shown} ...'")

    def command(self, line: str) -> bool:
        """Obeys a command; False where it ends the conversation. Raises UserError for one that does not exist."""
        name, _, text = line.partition(" ")
        text = text.strip()
        match name:
            case "/exit":
                return False
            case "/reset":
                self.turns.clear()
                _note("the conversation begins anew")
            case "/stage" if text:
                self.enter(text)
                _note(f"now {self.model.folder}")
            case "/stage":
                _note(f"now {self.stage}; finished: {', '.join(finished(self.model.folder.parent))}")
            case "/system":
                self.system = text
                _note(f"the system message is: {text}" if text else "there is no system message")
            case "/help":
                _note("\n".join(f"{name:<14}{meaning}" for name, meaning in COMMANDS.items()))
            case _:
                known = [known.split()[0] for known in COMMANDS]
                raise UserError(f"{name}: no such command.{nearest(name, known)} Commands: {', '.join(known)}")
        return True

    def say(self, message: str) -> None:
        """Answers a message. Raises UserError, and forgets the message, where it cannot be answered."""
        self.turns.append(Turn(message))
        try:
            ids = self._fitting()
            self.turns[-1].answer = self._answer(ids)
        finally:
            if not self.turns[-1].answer:
                self.turns.pop()

    def _answer(self, ids: Sequence[int]) -> str:
        o, trim = self.options, str.lstrip if self.base else self.model.answer
        growing = _Growing(_write if self.live else lambda text: None, trim)
        limited = dataclasses.replace(
            o,
            max_tokens=min(o.max_tokens, self.model.config.context - len(ids)),
            seed=o.seed + self.said,
            stop=(*o.stop, PLAIN_STOP) if self.base else o.stop,
        )
        self.said += 1
        try:
            text = _stream(self.model, ids, limited, growing.show).text
        except KeyboardInterrupt:
            if not self.live:
                raise
            text = growing.shown
        text = text.strip() if self.base else self.model.answer(text)
        print("" if self.live else " ".join(text.splitlines()), flush=True)
        return text

    def _fitting(self) -> list[int]:
        """The conversation in token ids, with room for an answer: the oldest turns are dropped where there is none."""
        context = self.model.config.context
        room = min(self.options.max_tokens, max(context // ROOM, 1))
        before = len(self.turns)
        while len(ids := self._ids()) + room > context and len(self.turns) > 1:
            del self.turns[0]
        if before > len(self.turns):
            _note(f"the context of {context} tokens is full: dropped the oldest turns ({before - len(self.turns)})")
        if len(ids) >= context:
            raise UserError(f"the message makes {len(ids)} tokens, and the model's context is {context}; shorten it")
        return ids

    def _ids(self) -> list[int]:
        if self.base:
            head = f"{self.system}\n" if self.system else ""
            past = [(turn.user, turn.answer) for turn in self.turns[:-1]]
            return self.model.encode(head + few_shot_prompt(past, self.turns[-1].user))
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns:
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
        return self.model.chat_tokens(messages[:-1])


class _Growing:
    """Shows a growing text: at each look only what is new of it."""

    def __init__(self, write: Callable[[str], None], trim: Callable[[str], str] = str):
        self._write, self._trim, self.shown = write, trim, ""

    def show(self, text: str) -> None:
        """Shows what `text` has beyond what was shown."""
        text = self._trim(text)
        new, self.shown = text[len(self.shown) :], text  # Ctrl-C may come while it is written
        self._write(new)


def _stream(model: Model, ids: Sequence[int], o: SamplingOptions, show: Callable[[str], None]) -> Generation:
    """The response to one prompt, shown as it is decoded."""
    last = None
    for (last,) in model.stream([ids], o.max_tokens, o.temperature, o.seed, o.top_k, o.top_p, o.stop):
        show(settled(last.text, o.stop))
    assert last is not None, "a stream gives at least one response"
    show(last.text)
    return last


def settled(text: str, stop: Sequence[str]) -> str:
    """The part of a text so far that no further token can change: no half character, no beginning of a stop string."""
    text = text.rstrip("\ufffd")
    tails = (n for word in stop for n in range(len(word) - 1, 0, -1) if text.endswith(word[:n]))
    return text[: len(text) - max(tails, default=0)]


def _language_model(path: Path, stage: str | None) -> Model:
    model = load(path, stage)
    if model.kind != "language":
        raise UserError(f"{model.folder} holds a reward model, which scores and does not speak; see --stage")
    return model


def _read(prompt: str | None) -> str | None:
    """The next line; None at the end of input. `prompt` is for a terminal, where Ctrl-C clears the line."""
    if prompt is None:
        return sys.stdin.readline() or None
    while True:
        try:
            return input(prompt)
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n", end="")


def _readable() -> None:
    """Characters that the terminal's encoding lacks are replaced, not errors."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _visible(text: str) -> str:
    """The text without what a terminal would obey, such as escape sequences that a model may write."""
    return text.translate(_UNSEEN)


def _write(text: str) -> None:
    sys.stdout.write(_visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def _note(text: str) -> None:
    """A remark beside the conversation."""
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(text, style="dim")
