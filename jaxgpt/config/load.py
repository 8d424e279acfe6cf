"""From a file and `key.path=value` words to the config: `base:`, groups, overrides, and where each value came from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxgpt.config import fields, tree
from jaxgpt.config.check import build, shown
from jaxgpt.config.schema import Config
from jaxgpt.config.tree import Node, merge
from jaxgpt.errors import UserError

COMMAND_LINE = "command line "
Sections = Mapping[str, Mapping[str, Any]]
"""Settings of whole sections: {"model": {...}, "tokenizer": {...}}."""


class ConfigError(UserError):
    """Everything that is wrong with the settings, one line each in `problems`."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(dict.fromkeys(problems))
        lines = (f"{len(self.problems)} mistakes in the settings:", *self.problems)
        super().__init__(self.problems[0] if len(self.problems) == 1 else "\n  ".join(lines))


@dataclass(frozen=True)
class Loaded:
    """The config, and by path where each of its values was set: "configs/meadow.yaml:12", "command line
    'sft.steps=10'" or "default"."""

    config: Config
    origins: dict[str, str]


def load(
    verb_file: Path, overrides: Sequence[str] = (), beginnings: Callable[[str], Sections | None] = lambda init: None
) -> Loaded:
    """Reads the file, what it inherits from and the groups it names, and lays the overrides on top.

    `beginnings` reads the sections `model` and `tokenizer` of what a stage's `init` names outside the run; they hold
    where the file has none. Raises ConfigError with every problem at once.
    """
    problems: list[str] = []
    path = _short(verb_file)
    words = [word for word in overrides if _is_override(word)]
    root = _layers(path, "", (), Config, problems) or Node({}, "")
    groups, keys = _overrides(words, path.parent, problems)
    whole = merge(merge(root, groups, Config), keys, Config)
    whole = _begun(whole, beginnings, problems)
    complete = not problems
    problems += [_no_override(word) for word in overrides if word not in words]
    config = build(Config, whole, "", problems, complete)
    if problems or not isinstance(config, Config):
        raise ConfigError(problems)
    leaves = flat(config.model_dump())
    return Loaded(config, {".".join(keys): _origin(whole, keys, value) for keys, value in leaves.items()})


def dump(config: Config) -> str:
    """The resolved config as YAML that `load` reads back to the same config."""
    return "".join(f"{line}\n" for line, _ in lines(config.model_dump(mode="json")))


def lines(values: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """YAML lines of nested settings, each with the path of the value that begins on it ("" where none does)."""
    found = []
    for key, value in values.items():
        start, path = f"{'  ' * len(above)}{tree.scalar(key)}:", (*above, key)
        if isinstance(value, dict) and value:
            found += [(start, ""), *lines(value, path)]
        elif isinstance(value, list) and len(tree.scalar(value)) > 80:
            found.append((start, ".".join(path)))
            found += [(f"{'  ' * len(path)}- {tree.scalar(item)}", "") for item in value]
        else:
            found.append((f"{start} {tree.scalar(value)}", ".".join(path)))
    return found


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What changed between two dumped configs, one line each: "sft.steps: 100 -> 200"."""
    changed = []
    for key in dict.fromkeys((*old, *new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changed += [f"{key}.{line}" for line in difference(before, after)]
        elif key not in old or key not in new or tree.scalar(before) != tree.scalar(after):
            changed.append(f"{key}: {_side(old, key)} -> {_side(new, key)}")
    return changed


def flat(values: dict[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Nested settings as {(key, key, …): value}; an empty dict is a value."""
    found: dict[tuple[str, ...], Any] = {}
    for key, value in values.items():
        found |= flat(value, (*above, key)) if isinstance(value, dict) and value else {(*above, key): value}
    return found


def _side(values: dict[str, Any], key: str) -> str:
    return shown(values[key]) if key in values else "unset"


def _layers(path: Path, asked: str, chain: tuple[Path, ...], annotation: Any, problems: list[str]) -> Node | None:
    """Reads a file laid over its `base`; `asked` is where it was named, `chain` the files that inherit from it."""
    if path in chain:
        circle = " -> ".join(str(file) for file in (*chain[chain.index(path) :], path))
        problems.append(f"base (set by {asked}): the files inherit from each other in a circle: {circle}")
        return None
    node = tree.read(path, asked, problems)
    if node is None:
        return None
    own = dict(node.value)
    base = own.pop("base", None)
    if annotation is Config:
        expanded = {name: _group(name, child, path.parent, problems) for name, child in own.items()}
        own = {name: child for name, child in expanded.items() if child is not None}
    layer = replace(node, value=own)
    if base is None:
        return layer
    if not isinstance(base.value, str):
        found = shown(tree.plain(base))
        problems.append(f"base (set by {base.origin}): found {found}, expected the path of a YAML file")
        return layer
    below = _layers(Path(os.path.normpath(path.parent / base.value)), base.origin, (*chain, path), annotation, problems)
    return layer if below is None else merge(below, layer, annotation)


def _group(name: str, node: Node, folder: Path, problems: list[str]) -> Node | None:
    """Reads the file that a top-level section names (`model: llama-7b`), alone or as its `base:` beside other keys."""
    annotation = fields.annotations(Config).get(name)
    if not fields.sections(annotation):
        return node
    if isinstance(node.value, str):
        named, rest = node, None
    elif isinstance(node.value, dict) and "base" in node.value:
        named = node.value["base"]
        rest = replace(node, value={key: child for key, child in node.value.items() if key != "base"})
    else:
        return node
    places = [place / name for place in (folder, folder / "configs", folder.parent / "configs", Path("configs"))]
    path = next((file for place in places if (file := place / f"{named.value}.yaml").is_file()), None)
    if path is None:
        hint = tree.suggest(str(named.value), places)
        problems.append(
            f"{name}{fields.set_by(named.origin)}: no file {places[0] / str(named.value)}.yaml."
            f"{hint or f' A name here stands for a file; settings are written {name}.key=value.'}"
        )
        return None
    group = _layers(path, named.origin, (), annotation, problems)
    if group is None:
        return None
    group = replace(group, replaces=True)
    return group if rest is None else merge(group, rest, annotation)


def _begun(whole: Node, beginnings: Callable[[str], Sections | None], problems: list[str]) -> Node:
    """The settings laid over those of the first start outside the run, where that brings a model and a tokenizer."""
    for name, annotation in fields.annotations(Config).items():
        stage = whole.value.get(name)
        starts = any("init" in section.model_fields for section in fields.sections(annotation))
        init = stage.value.get("init") if starts and stage is not None and isinstance(stage.value, dict) else None
        if init is None or not isinstance(init.value, str):
            continue
        try:
            found = beginnings(init.value)
        except UserError as error:
            problems.append(f"{name}.init{fields.set_by(init.origin)}: {error}")
            return whole
        if found is not None:
            below = Node({key: tree.plant(dict(section), init.value) for key, section in found.items()}, init.value)
            return merge(below, _without_null(whole, found), Config)
    return whole


def _without_null(whole: Node, found: Sections) -> Node:
    """The settings without the sections that null leaves to what is found."""
    kept = {key: node for key, node in whole.value.items() if key not in found or node.value is not None}
    return replace(whole, value=kept)


def _overrides(words: Sequence[str], folder: Path, problems: list[str]) -> tuple[Node, Node]:
    """The command line as two layers: its groups, and its keys in the order they were given."""
    groups = keys = Node({}, COMMAND_LINE)
    for word in words:
        path, _, text = word.partition("=")
        parts = path.strip().split(".")
        try:
            node = tree.plant(tree.parse(text), f"{COMMAND_LINE}'{word}'")
        except ValueError as error:
            problems.append(f"{path} (set by '{word}'): not valid YAML: {error}")
            continue
        made = _group(parts[0], node, folder, problems) if len(parts) == 1 else node
        if made is None:
            continue
        for part in reversed(parts):
            made = Node({part: made}, node.origin)
        if len(parts) == 1 and isinstance(node.value, str):
            groups = merge(groups, made)
        else:
            keys = merge(keys, made)
    return groups, keys


def _is_override(word: str) -> bool:
    path, equals, _ = word.partition("=")
    return bool(equals) and not word.startswith("-") and all(part.strip() for part in path.split("."))


def _no_override(word: str) -> str:
    if word.startswith("-"):
        guess = word.lstrip("-")
        return f"'{word}': no such option" + (f". Settings have no dashes: '{guess}'" if "=" in guess else "")
    return f"'{word}': expected key.path=value, as in 'sft.steps=100'"


def _origin(root: Node, keys: tuple[str, ...], value: Any) -> str:
    """Where the value at `keys` was set; a null that only unset it leaves the default."""
    node = root
    for key in keys:
        if not isinstance(node.value, dict) or key not in node.value:
            return node.origin if node is not root and not isinstance(node.value, dict) else "default"
        node = node.value[key]
    return "default" if node.value is None and value is not None else node.origin


def _short(path: Path) -> Path:
    """The path relative to the working folder where it lies in it."""
    relative = Path(os.path.relpath(path))
    return path if relative.parts[:1] == ("..",) else relative
