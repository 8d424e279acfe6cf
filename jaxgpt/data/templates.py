"""The chat templates that come with the package, and reading others from files."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

from jaxgpt.errors import UserError, nearest
from jaxgpt.places import place

ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
"""The control pieces that the template `roles` writes."""

_ROLES = """\
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

_VICUNA = """\
{{ bos_token }}
{%- if messages and messages[0].role == 'system' %}
{{- messages[0].content + ' ' }}
{%- set turns = messages[1:] %}
{%- else %}
{{- 'A chat between a curious user and an artificial intelligence assistant. ' }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- set turns = messages %}
{%- endif %}
{%- for message in turns %}
{%- if message.role == 'user' %}
{{- 'USER: ' + message.content + ' ' }}
{%- elif message.role == 'assistant' %}
{{- 'ASSISTANT:' }}
{%- generation %}
{{- ' ' + message.content + eos_token }}
{%- endgeneration %}
{%- else %}
{{- raise_exception('role is ' + message.role|tojson + ', expected user or assistant (system only at the start)') }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'ASSISTANT:' }}
{%- endif %}
"""

BUILT_IN = {"roles": _ROLES, "vicuna": _VICUNA}
"""By name. `roles` marks speakers by control pieces; `vicuna` is the plain text of FastChat's Vicuna 1.1."""


def default_template(control: Container[str]) -> tuple[str, str]:
    """(text, name) of the built-in template that suits a tokenizer with these control pieces."""
    name = "roles" if all(piece in control for piece in ROLES.values()) else "vicuna"
    return BUILT_IN[name], name


def read_template(given: str | Path) -> tuple[str, str]:
    """(text, name) of a built-in template, or of a file. Raises UserError where it is neither."""
    if given in BUILT_IN:
        return BUILT_IN[str(given)], str(given)
    path = place(given).expanduser()
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        names = ", ".join(BUILT_IN)
        raise UserError(
            f"chat template {path} does not exist; expected a file or one of {names}."
            f"{nearest(path.name, [*BUILT_IN, *beside])}"
        )
    try:
        return path.read_bytes().decode("utf-8-sig"), str(given)
    except UnicodeDecodeError as error:
        raise UserError(f"chat template {path}: not UTF-8 at byte {error.start}") from error
