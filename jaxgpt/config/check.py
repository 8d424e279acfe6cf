"""From a tree of settings to the typed config, with every mistake told in words."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from jaxgpt.config import fields
from jaxgpt.config.fields import set_by
from jaxgpt.config.schema import Section
from jaxgpt.config.tree import Node, plain, plant, scalar
from jaxgpt.errors import nearest

_WRONG = object()  # in the place of a section that could not be built


def build(section: type[Section], node: Node, path: str, problems: list[str], complete: bool = True) -> Section | None:
    """The section that `node` describes; mistakes go to `problems`, and then the result is None or to be thrown away.

    Not `complete` says that parts of the input could not be read: then nothing is said of settings that are absent.
    """
    values: dict[str, Any] = {}
    failed: set[str] = set()
    hints = fields.annotations(section)
    for name, child in node.value.items():
        place = f"{path}.{name}" if path else name
        if name not in hints:
            problems.append(_unknown(section, name, place, child.origin, path))
            continue
        if child.value is None and not fields.nullable(hints[name]):
            continue  # null unsets
        found: list[str] = []
        values[name] = _value(hints[name], section.model_fields[name], child, place, found, complete)
        if values[name] is _WRONG or found:
            failed.add(name)
        problems += found
    try:
        return section.model_validate({name: value for name, value in values.items() if name not in failed})
    except ValidationError as error:
        problems += _told(section, node, path, error, failed, complete)
    return None


def _value(annotation: Any, info: FieldInfo, node: Node, path: str, problems: list[str], complete: bool) -> Any:
    """Sections are built, also those in lists; a plain value is left for its section to judge."""
    inner = fields.entry(annotation)
    if inner is not None and fields.sections(inner) and isinstance(node.value, dict):
        given = {name: child for name, child in node.value.items() if child.value is not None}
        built = {
            name: _value(inner, info, child, f"{path}.{name}", problems, complete) for name, child in given.items()
        }
        return _WRONG if _WRONG in built.values() else built
    each = fields.item(annotation)
    if each is not None and fields.sections(each) and isinstance(node.value, list):
        items = [
            _value(each, info, plant(value, node.origin), f"{path}[{number}]", problems, complete)
            for number, value in enumerate(node.value)
        ]
        return _WRONG if _WRONG in items else items
    if not fields.sections(annotation) or node.value is None:
        return plain(node)
    if not isinstance(node.value, dict):
        problems.append(f"{path}{set_by(node.origin)}: found {shown(node.value)}, expected {fields.words(annotation)}")
        return _WRONG
    kind = node.value.get("type")
    section = fields.variant(annotation, info, None if kind is None else kind.value)
    if section is None:
        names = [fields.tag(choice) for choice in fields.sections(annotation)]
        problems.append(_no_variant(names, kind, node, path))
        return _WRONG
    made = build(section, node, path, problems, complete)
    return _WRONG if made is None else made


def _no_variant(names: list[str], kind: Node | None, node: Node, path: str) -> str:
    if kind is None:
        return f"{path}.type{set_by(node.origin, 'needed by')}: must be set, {fields.either(names)}"
    found = plain(kind)
    expected = f"found {shown(found)}, expected {fields.either(names)}"
    guess = nearest(found, names) if isinstance(found, str) else ""
    return f"{path}.type{set_by(kind.origin)}: {expected}{guess and f'.{guess}'}"


def _told(
    section: type[Section], node: Node, path: str, error: ValidationError, failed: set[str], complete: bool
) -> list[str]:
    """pydantic's findings on one section, once for each field and in our words."""
    told: dict[str, str] = {}
    for one in error.errors(include_url=False):
        name = str(one["loc"][0]) if one["loc"] else ""
        place = ".".join(part for part in (path, name) if part)
        if not name:
            if complete and not failed:
                told[name] = f"{place or 'config'}: {_rule(one)}{_where(str(_rule(one)), node)}"
        elif one["type"] == "missing" and len(one["loc"]) == 1:
            if complete and name not in failed:
                expected = fields.words(fields.annotations(section)[name])
                told[name] = f"{place}{set_by(node.origin, 'needed by')}: must be set, {expected}"
        elif name not in told:
            told[name] = _wrong(fields.annotations(section)[name], node.value[name], place)
    return list(told.values())


def _wrong(annotation: Any, node: Node, path: str) -> str:
    value = plain(node)
    hint = nearest(value, _names(annotation)) if isinstance(value, str) else ""
    if isinstance(value, bool | int | float) and fields.takes_text(annotation):
        by_hand = node.origin.startswith("command line")
        hint = f""" For text, write "{path}='{scalar(value)}'".""" if by_hand else " For text, put it in quotes."
    return (
        f"{path}{set_by(node.origin)}: found {shown(value)}, expected {fields.words(annotation)}{hint and f'.{hint}'}"
    )


def _names(annotation: Any) -> list[str]:
    return [name for part in fields.alternatives(annotation) for name in fields.literals(part)]


def _unknown(section: type[Section], name: str, place: str, origin: str, path: str) -> str:
    if name in section.ABSENT:
        return f"{place}{set_by(origin)}: there is no such setting: {section.ABSENT[name]}"
    names = list(fields.annotations(section))
    hint = nearest(name, names)
    deeper = [setting.path for setting in fields.settings(section, f"{path}." if path else "")]
    same = [known for known in deeper if known.rpartition(".")[2] == name]
    if same:
        hint = f" Did you mean {fields.either([repr(known) for known in same[:4]])}?"
    return f"{place}{set_by(origin)}: no such field.{hint} Fields: {', '.join(names)}"


def _rule(error: Any) -> str:
    """The text of a rule that spans fields, as the schema raises it."""
    return str(error.get("ctx", {}).get("error", error["msg"]))


def _where(rule: str, node: Node) -> str:
    """Where the settings that a rule names were set."""
    places = []
    for word in dict.fromkeys(re.findall(r"[a-z_][a-z_0-9.]*[a-z_0-9]", rule)):
        found: Any = node
        for part in word.split("."):
            found = found.value.get(part) if found is not None and isinstance(found.value, dict) else None
        if found is not None:
            places.append(f"{word} is set by {found.origin.removeprefix('command line ')}")
    return f" ({', '.join(places)})" if places else ""


def shown(value: Any) -> str:
    """A value as the user wrote it, text in quotes, long ones cut."""
    text = f"'{value}'" if isinstance(value, str) else scalar(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
