"""Conversations to token ids, through one Jinja template that also says which tokens are trained.

The template language is that of Hugging Face chat templates: `{% generation %} ... {% endgeneration %}` surrounds what
the assistant says, and the same file serves there after export.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from jaxgpt.errors import UserError

if TYPE_CHECKING:
    from jaxgpt.data.tokenizer import Tokenizer

Message = Mapping[str, Any]

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}

BUILT_IN = """\
{{ bos_token }}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|assistant|>' }}
{%- generation %}
{{- message.content + eos_token }}
{%- endgeneration %}
{%- elif message.role == 'system' or message.role == 'user' %}
{{- '<|' + message.role + '|>' + message.content }}
{%- else %}
{{- raise_exception('role is ' + message.role|tojson + ', expected system, user or assistant') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


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


def render(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids and loss mask of a conversation: 1 on what the assistant says and the token that ends it, else 0.

    There is exactly one BOS, in front. Control pieces come from the template alone: the same characters in a message
    are plain text. With `add_generation_prompt` the ids end where the assistant is to speak. Raises UserError where
    the template refuses the messages.
    """
    speaks = any(message.get("role") == "assistant" for message in messages)
    if speaks and not add_generation_prompt and not _marks(tokenizer.template):
        raise UserError(
            f"chat template {tokenizer.template_name}: has no {{% generation %}} ... {{% endgeneration %}} block, so "
            "nothing tells which tokens are trained; put one around the assistant's content and end token"
        )
    guard, opened, closed = _unused(messages)
    controls = re.compile("|".join(re.escape(piece) for piece in sorted(tokenizer.control, key=len, reverse=True)))
    names = {i: piece for piece, i in tokenizer.control.items()}
    try:
        text = _compiled(tokenizer.template, tokenizer.template_name).render(
            messages=_guarded(messages, guard, controls, tuple(tokenizer.control)),
            bos_token=names[tokenizer.bos],
            eos_token=names[tokenizer.eos],
            add_generation_prompt=add_generation_prompt,
            generation_marks=(opened, closed),
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise UserError(f"chat template {tokenizer.template_name}: {error or type(error).__name__}") from error
    ids: list[int] = []
    mask: list[int] = []
    for (control, trained), run in itertools.groupby(_runs(text, controls, opened, closed), key=lambda part: part[:2]):
        pieces = [part[2] for part in run]
        new = (
            [tokenizer.control[p] for p in pieces] if control else tokenizer.encode("".join(pieces).replace(guard, ""))
        )
        ids += new
        mask += [trained] * len(new)
    start = next((at for at, token in enumerate(ids) if token != tokenizer.bos), len(ids))
    return [tokenizer.bos, *ids[start:]], [0, *mask[start:]]


def _runs(text: str, controls: re.Pattern[str], opened: str, closed: str) -> Iterator[tuple[bool, int, str]]:
    """The rendered text as (is control, is trained, characters), in order."""
    trained = 0
    for part in re.split(f"({opened}|{closed})", text):
        if part in (opened, closed):
            trained = int(part == opened)
            continue
        at = 0
        for match in controls.finditer(part):
            if match.start() > at:
                yield False, trained, part[at : match.start()]
            yield True, trained, match[0]
            at = match.end()
        if at < len(part):
            yield False, trained, part[at:]


def _guarded(value: Any, guard: str, controls: re.Pattern[str], pieces: tuple[str, ...]) -> Any:
    """The messages with `guard` inside every control piece, and at an end that the template could complete to one.

    The template sees the rest of each text as it is, so that filters such as trim do what they do elsewhere.
    """
    if isinstance(value, str):
        text = controls.sub(lambda match: match[0][0] + guard + match[0][1:], value)
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
