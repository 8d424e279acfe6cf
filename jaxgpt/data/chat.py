"""Conversations to token ids, through one Jinja template that also says which tokens are trained.

The template language is that of Hugging Face chat templates: `{% generation %} ... {% endgeneration %}` surrounds what
the assistant says, and the same file serves there after export.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxgpt.data.templates import BUILT_IN
from jaxgpt.errors import UserError

if TYPE_CHECKING:
    from jaxgpt.data.tokenizer import Tokenizer

Message = Mapping[str, Any]


class _Generation(Extension):
    """The `generation` block: puts the marks of the render around its text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.ContextReference()]
        return nodes.CallBlock(self.call_method("_marked", marks), [], [], body).set_lineno(line)

    @staticmethod
    def _marked(context: jinja2.runtime.Context, caller: Any) -> str:
        opened, closed = context["generation_marks"]
        return opened + caller() + closed


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.lru_cache(maxsize=16)
def _compiled(template: str, name: str) -> jinja2.Template:
    """The template with the settings that Hugging Face uses."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"chat template {name}, line {error.lineno}: {error.message}") from error


def check_template(template: str, name: str) -> None:
    """Raises UserError where the template is not Jinja."""
    _compiled(template, name)


def valid_text(text: str) -> str:
    """The text with the halves of surrogate pairs, which are no characters, made whole or U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of a conversation: 1 on what the assistant says and the token that ends it, else 0.

    Text between two control pieces is tokenized in one go, as transformers does, and a token is trained where any of
    its characters is. Control pieces, BOS among them, come from the template alone, and several BOS in front become
    one: the same characters in a message are plain text. With `add_generation_prompt` the ids end where the
    assistant is to speak. Raises UserError where the template refuses the messages.
    """
    speaks = any(message.get("role") == "assistant" for message in messages)
    if speaks and not add_generation_prompt and not _marks(tokenizer.template):
        raise UserError(
            f"chat template {tokenizer.template_name}: has no {{% generation %}} ... {{% endgeneration %}} block, so "
            "nothing tells which tokens are trained; put one around the assistant's content and end token, or set "
            f"tokenizer.template to {' or '.join(BUILT_IN)}"
        )
    ids: list[int] = []
    mask: list[int] = []
    runs = _trimmed(_runs(tokenizer, messages, add_generation_prompt), tokenizer.engine.trims)
    for control, stretch in itertools.groupby(runs, key=lambda run: run.control):
        parts = list(stretch)
        if control:
            ids += [tokenizer.control[run.text] for run in parts]
            mask += [run.trained for run in parts]
            continue
        text = "".join(run.text for run in parts)
        if len({run.trained for run in parts}) == 1:
            new = tokenizer.encode(text)
            mask += [parts[0].trained] * len(new)
        else:
            new, starts = tokenizer.encode_spans(text)
            mask += _overlapping(starts, parts)
        ids += new
    start = next((at for at, token in enumerate(ids) if token != tokenizer.bos), len(ids))
    return ids[max(start - 1, 0) :], mask[max(start - 1, 0) :]


def render_text(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as the template writes it, control pieces by name."""
    return "".join(run.text for run in _runs(tokenizer, messages, add_generation_prompt))


def answer_lead(tokenizer: Tokenizer) -> str:
    """What the template writes between where the assistant is to speak and its words: a space, or mostly nothing."""
    ask = [{"role": "user", "content": "Q"}]
    try:
        prompt = render_text(tokenizer, ask, add_generation_prompt=True)
        whole = render_text(tokenizer, [*ask, {"role": "assistant", "content": "A"}])
    except UserError:  # a template for conversations of another kind
        return ""
    lead, found, _ = whole[len(prompt) :].partition("A")
    return lead if whole.startswith(prompt) and found and not lead.strip(" ") else ""


class _Run(NamedTuple):
    """Characters of a rendered conversation: one control piece, or plain text."""

    control: bool
    trained: int
    text: str


def _runs(tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> Iterator[_Run]:
    """The rendered conversation in order, no run empty."""
    guard, opened, closed = _unused(messages)
    controls = re.compile("|".join(re.escape(piece) for piece in sorted(tokenizer.control, key=len, reverse=True)))
    try:
        text = _compiled(tokenizer.template, tokenizer.template_name).render(
            messages=_guarded(messages, guard, controls, tuple(tokenizer.control)),
            tools=None,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            generation_marks=(opened, closed),
            **tokenizer.engine.names,
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"chat template {tokenizer.template_name}: {error or type(error).__name__}") from error
    trained = 0
    for part in re.split(f"({opened}|{closed})", text):
        if part in (opened, closed):
            trained = int(part == opened)
            continue
        for number, piece in enumerate(re.split(f"({controls.pattern})", part)):
            plain = piece if number % 2 else piece.replace(guard, "")
            if plain:
                yield _Run(bool(number % 2), trained, plain)


def _trimmed(runs: Iterable[_Run], trims: Mapping[str, tuple[bool, bool]]) -> list[_Run]:
    """The runs without the white space that control pieces take with them, by (before, after); no run empty."""
    kept = list(runs)
    for side, order, strip in ((0, -1, str.rstrip), (1, 1, str.lstrip)) if trims else ():
        taking = False
        for at in range(len(kept))[::order]:
            if kept[at].control:
                taking = trims.get(kept[at].text, (False, False))[side]
            elif taking:
                kept[at] = kept[at]._replace(text=strip(kept[at].text))
                taking = not kept[at].text
    return [run for run in kept if run.text]


def _overlapping(starts: Sequence[int], runs: Sequence[_Run]) -> list[int]:
    """1 for every token that has a trained character; `starts` are those of the runs' text."""
    trained = np.repeat([run.trained for run in runs], [len(run.text) for run in runs])
    before = np.concatenate([[0], np.cumsum(trained)])
    ends = np.append(starts, len(trained))[np.searchsorted(starts, starts, side="right")]
    return (before[ends] > before[starts]).astype(int).tolist()


def _guarded(value: Any, guard: str, controls: re.Pattern[str], pieces: tuple[str, ...]) -> Any:
    """The messages with `guard` inside every control piece, and at an end that the template could complete to one.

    The template sees the rest of each text as it is, so that filters such as trim do what they do elsewhere.
    """
    if isinstance(value, str):
        text = controls.sub(lambda match: match[0][0] + guard + match[0][1:], valid_text(value))
        begins, ends = _partial(pieces)
        return (guard if text.startswith(ends) else "") + text + (guard if text.endswith(begins) else "")
    if isinstance(value, Mapping):
        return {key: _guarded(part, guard, controls, pieces) for key, part in value.items()}
    if isinstance(value, Sequence):
        return [_guarded(part, guard, controls, pieces) for part in value]
    return value


@functools.lru_cache(maxsize=16)
def _partial(pieces: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """All proper beginnings and all proper ends of the pieces."""
    cuts = [(piece, n) for piece in pieces for n in range(1, len(piece))]
    return tuple({piece[:n] for piece, n in cuts}), tuple({piece[-n:] for piece, n in cuts})


def _unused(messages: Sequence[Message]) -> list[str]:
    """Three private-use characters that stand nowhere in the messages."""
    used = set("".join(_characters(messages)))
    return list(itertools.islice((c for c in map(chr, range(0xE000, 0xF900)) if c not in used), 3))


def _characters(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _characters(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _characters(part)


@functools.lru_cache(maxsize=16)
def _marks(template: str) -> bool:
    return re.search(r"\{%[-+]?\s*generation\b", template) is not None
