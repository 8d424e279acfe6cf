"""The schema for people and for editors: the settings a verb reads, and a JSON schema."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from jaxgpt.config import fields
from jaxgpt.config.fields import Setting
from jaxgpt.config.load import Loaded, lines
from jaxgpt.config.schema import Config
from jaxgpt.config.tree import scalar


def describe(names: Iterable[str]) -> list[str]:
    """Two lines for every setting below the top-level fields `names`: path, default and type; then its meaning."""
    text: list[str] = []
    wanted = set(names)
    for setting in fields.settings(Config):
        if setting.path.partition(".")[0] not in wanted:
            continue
        text += _section(setting) if fields.sections(setting.annotation) else _value(setting)
    return text


def _section(setting: Setting) -> list[str]:
    """A heading; where only one section can stand, its own line of documentation is added."""
    choices = fields.sections(setting.annotation)
    docs = [setting.info.description or ""]
    if len(choices) == 1:
        own = choices[0].__doc__ or ""
        docs = [own] if docs[0].rstrip(".").lower() in own.lower() else [*docs, own]
    if setting.info.default is None:
        whole = not any(info.is_required() for choice in choices for info in choice.model_fields.values())
        how = f"; {fields.filled(setting.path, setting.annotation)} takes the defaults" if whole else ""
        docs.append(f"Absent unless set{how}.")
    return ["", setting.path, f"    {' '.join(' '.join(doc.split()) for doc in docs if doc)}"]


def _value(setting: Setting) -> list[str]:
    doc = " ".join((setting.info.description or "").split())
    if setting.only == f"type={setting.info.default}":
        return [f"  {setting.path}: {setting.info.default}", f"      {doc}"]
    only = f"  [{setting.only}]" if setting.only else ""
    return [f"  {setting.path}{default(setting.info)}  ({fields.words(setting.annotation)}){only}", f"      {doc}"]


def default(info: FieldInfo) -> str:
    """ " = 300", or that it must be set."""
    value = info.default
    if value is PydanticUndefined:
        return " must be set"
    return f" = {scalar(to_jsonable_python(value))}"


def explain(loaded: Loaded) -> str:
    """The resolved config as YAML, with the source of every value as a comment."""
    rows = lines(loaded.config.model_dump(mode="json"))
    width = min(60, max(len(line) for line, _ in rows))
    return "".join(f"{line:<{width}}  # {loaded.origins[path]}\n" if path else f"{line}\n" for line, path in rows)


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of a config file, with `base:` and groups, for editors."""
    schema = Config.model_json_schema()
    for name, section in schema["properties"].items():
        choices = fields.sections(fields.annotations(Config)[name])
        for choice in choices:
            schema["$defs"][choice.__name__]["properties"]["base"] = _base("Name of a group file to start from.")
        if choices:
            group = {"type": "string", "description": f"Name of a file in the folder {name}/ beside this one."}
            kept = {key: section[key] for key in ("default", "description", "title") if key in section}
            own = section.get("anyOf") or [{key: value for key, value in section.items() if key not in kept}]
            schema["properties"][name] = {"anyOf": [*own, group], **kept}
    schema["properties"]["base"] = _base("Another YAML file, relative to this one, whose settings this one changes.")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _base(description: str) -> dict[str, str]:
    return {"type": "string", "title": "Base", "description": description}


def show_help(lines: list[str]) -> None:
    """Prints help: headings bold and meanings dim on a terminal, plain elsewhere."""
    if not sys.stdout.isatty():
        print("\n".join(lines))
        return
    from rich.console import Console
    from rich.text import Text

    styles = {0: "bold", 6: "dim"}
    for line in lines:
        Console().print(Text(line, style=styles.get(len(line) - len(line.lstrip()), "")), soft_wrap=True)
