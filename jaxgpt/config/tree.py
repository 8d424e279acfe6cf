"""Settings as a tree whose every node knows where it was written: reading YAML into it, laying one over another."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jaxgpt.config import fields
from jaxgpt.config.schema import Section


@dataclass(frozen=True)
class Node:
    """A value and the place it was set: "configs/meadow.yaml:12" or "command line 'sft.steps=10'"."""

    value: Any
    """dict[str, Node], or a plain value."""
    origin: str
    replaces: bool = False
    """A mapping that takes the place of what lies below, rather than changing parts of it."""


class Loader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2: 1e-3 is a number; `no`, 12:30 and 2024-01-01 are text."""


class Dumper(yaml.SafeDumper):
    """SafeDumper that quotes whatever YAML 1.1 or 1.2 would read as something else than text."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal values out in full."""
        return True


_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SCALARS = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", rf"{_NUMBER.pattern}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+.0123456789"),
]
Loader.yaml_implicit_resolvers = {"<": [("tag:yaml.org,2002:merge", re.compile(r"^(?:<<)$"))]}
for _name, _pattern, _first in _SCALARS:
    for _class in (Loader, Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: _whole(node.value))
Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, '"' if "\n" in text else None)
)


def _whole(text: str) -> int:
    return int(text, 16) if text.startswith("0x") else int(text)


def scalar(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.dump(
        value, Dumper=Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...")


def read(path: Path, asked: str, problems: list[str]) -> Node | None:
    """Reads a YAML file, named by the line `asked` or by the user; None where mistakes leave nothing to use."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 text (byte {error.start})")
        return None
    except OSError as error:
        asking = f" (base set by {asked})" if asked else ""
        absent = isinstance(error, FileNotFoundError)
        hint = suggest(path.stem, (path.parent, Path(), Path("configs"))) if absent else ""
        if (path / "config.yaml").is_file():
            hint = f" Did you mean '{path / 'config.yaml'}'?"
        problems.append(f"{path}{asking}: {(error.strerror or 'unreadable').lower()}.{hint}")
        return None
    loader = None
    try:
        loader = Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Node({}, str(path))
        if not isinstance(root, yaml.MappingNode):
            problems.append(f"{path}:{root.start_mark.line + 1}: expected lines of 'key: value', found {_kind(root)}")
            return None
        return _mapping(loader, root, path, f"{path}:1", "", problems, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "".join(text.splitlines()[mark.line : mark.line + 1])
        problems.append(f"{path}:{mark.line + 1}:{mark.column + 1}: not valid YAML: {_syntax(error, line)}")
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        problems.append(f"{path}:{number}: not valid YAML: character U+{ord(text[error.position]):04X} is not allowed")
    finally:
        if loader is not None:
            loader.dispose()
    return None


def parse(text: str) -> Any:
    """The value of an override, YAML in one line. Raises ValueError with what is wrong.

    What begins with {run} or * is a path, though YAML would read a mapping or an alias.
    """
    if text.startswith(("{run}", "*")):
        return text
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        raise ValueError(_syntax(error, text)) from error
    except yaml.YAMLError as error:
        raise ValueError("a character that YAML does not allow") from error


def plant(value: Any, origin: str) -> Node:
    """A plain value as a node, every part with the same origin."""
    if isinstance(value, dict):
        return Node({str(key): plant(child, origin) for key, child in value.items()}, origin)
    return Node(value, origin)


def plain(node: Node) -> Any:
    """The value without its origins."""
    return {key: plain(child) for key, child in node.value.items()} if isinstance(node.value, dict) else node.value


def merge(below: Node, above: Node, annotation: Any = None, default: Any = None) -> Node:
    """`above` laid over `below`, key by key. With the schema's annotation, choosing another variant (`type`) drops the
    settings of the variant below."""
    if above.replaces or not isinstance(above.value, dict):
        return above
    if not isinstance(below.value, dict):
        return Node(above.value, above.origin, replaces=True)
    choices = fields.sections(annotation)
    merged = dict(below.value)
    if len(choices) > 1 and "type" in above.value:
        known = below.value["type"].value if "type" in below.value else getattr(default, "type", None)
        merged = merged if above.value["type"].value == known else {}
    for key, child in above.value.items():
        if key not in merged:
            merged[key] = child
        else:
            merged[key] = merge(merged[key], child, *_field(choices, annotation, key))
    return Node(merged, above.origin, below.replaces)


def _field(choices: tuple[type[Section], ...], annotation: Any, key: str) -> tuple[Any, Any]:
    if len(choices) == 1 and key in choices[0].model_fields:
        return fields.annotations(choices[0])[key], choices[0].model_fields[key].default
    return fields.entry(annotation), None


def _mapping(
    loader: Loader,
    node: yaml.MappingNode,
    path: Path,
    origin: str,
    prefix: str,
    problems: list[str],
    above: tuple[yaml.Node, ...],
) -> Node:
    """The mapping with its origins; `prefix` is its own path, `above` the mappings it lies in."""
    if node in above:
        raise yaml.constructor.ConstructorError(None, None, "an alias that contains itself", node.start_mark)
    first: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, f"{_kind(key)} cannot be a key", key.start_mark)
        line = key.start_mark.line + 1
        if key.value in first and key.value != "<<":
            name = f"{prefix}{key.value}"
            problems.append(f"{path}:{line}: '{name}' is set twice, first in line {first[key.value]}; keep one")
        first.setdefault(key.value, line)
    flattened = yaml.MappingNode(node.tag, list(node.value), node.start_mark)  # the node may stand elsewhere as well
    loader.flatten_mapping(flattened)  # <<: *anchor
    children = {}
    for key, value in flattened.value:
        place, name = f"{path}:{key.start_mark.line + 1}", key.value
        if isinstance(value, yaml.MappingNode):
            children[name] = _mapping(loader, value, path, place, f"{prefix}{name}.", problems, (*above, node))
        else:
            children[name] = Node(loader.construct_object(value, deep=True), place)
    return Node(children, origin)


def _kind(node: yaml.Node) -> str:
    return {"sequence": "a list", "mapping": "a mapping"}.get(node.id, f"'{str(node.value)[:40]}'")


def _syntax(error: yaml.MarkedYAMLError, line: str) -> str:
    problem = error.problem or "unreadable"
    if re.search(r"[\s\[,]({run}|\*)", line):
        return 'text that begins with { or * needs quotes, as in "{run}/text/*.jsonl"'
    if "'\\t'" in problem:
        return "a tab; indent with spaces"
    if problem == "mapping values are not allowed here":
        return "a ':' where no key can stand; check the indentation, or quote the text"
    return f"{problem} ({error.context})" if error.context else problem


def suggest(name: str, folders: Sequence[Path]) -> str:
    """Reads the folders for the YAML file whose name is nearest to `name`; else a list of what is in them."""
    files = {file.stem: file for folder in reversed(folders) for file in sorted(folder.glob("*.yaml"))}
    if near := difflib.get_close_matches(name, files, n=1, cutoff=0.5):
        return f" Did you mean '{files[near[0]]}'?"
    return f" There are: {', '.join(str(file) for file in sorted(files.values())[:20])}." if files else ""
