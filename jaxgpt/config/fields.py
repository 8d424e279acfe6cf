"""What the schema says of a setting, in plain words; messages, help and merging all read it from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from jaxgpt.config.schema import Section

NAMES = {str: "text", bool: "true or false", NoneType: "null"}


@dataclass(frozen=True)
class Setting:
    """One field of the schema: its path ("sft.steps"), annotation and pydantic description."""

    path: str
    annotation: Any
    info: FieldInfo
    only: str = ""  # the variant it belongs to, such as "type=rope"


@cache
def annotations(section: type[Section]) -> dict[str, Any]:
    """The full annotation of every field of `section`, in the order of the schema."""
    hints = get_type_hints(section, include_extras=True)
    return {name: hints[name] for name in section.model_fields}


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, one element where there is none."""
    origin, bare = get_origin(annotation), annotation
    if origin is Annotated:
        bare = get_args(annotation)[0]
        origin = get_origin(bare)
    if origin is Union or origin is UnionType:
        return tuple(part for member in get_args(bare) for part in alternatives(member))
    return (annotation,)


def takes_text(annotation: Any) -> bool:
    """Whether text is a value of it."""
    bare = (get_args(part)[0] if get_origin(part) is Annotated else part for part in alternatives(annotation))
    return str in bare


def sections(annotation: Any) -> tuple[type[Section], ...]:
    """The sections an annotation allows: none for a plain value, several for variants told apart by `type`."""
    return tuple(part for part in alternatives(annotation) if isinstance(part, type) and issubclass(part, Section))


def entry(annotation: Any) -> Any:
    """The annotation of the entries of a table with free names (dict[str, X]), else None."""
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def item(annotation: Any) -> Any:
    """The annotation of the items of a list of any length (tuple[X, ...]), else None."""
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    inside = get_args(bare) if get_origin(bare) is tuple else ()
    return inside[0] if inside[-1:] == (Ellipsis,) else None


def nullable(annotation: Any) -> bool:
    """Whether null is a value of it."""
    return NoneType in alternatives(annotation)


def tag(section: type[Section]) -> str:
    """The `type` that names a variant."""
    return section.model_fields["type"].default


def variant(annotation: Any, info: FieldInfo, named: Any) -> type[Section] | None:
    """The section that `type: named` chooses, or the default one where `named` is None; None for an unknown name."""
    choices = sections(annotation)
    if len(choices) == 1:
        return choices[0]
    if named is None and isinstance(info.default, Section):
        return type(info.default)
    return next((choice for choice in choices if tag(choice) == named), None)


def filled(path: str, annotation: Any) -> str:
    """The override that sets a section to its defaults: "sft={}", or with variants "prepare.type=meadow"."""
    choices = sections(annotation)
    return f"{path}={{}}" if len(choices) == 1 else f"{path}.type={tag(choices[0])}"


def settings(section: type[Section], prefix: str = "", only: str = "") -> Iterator[Setting]:
    """Every field below `section`: plain values first, then the sections, each before its parts."""
    named = sorted(annotations(section).items(), key=lambda one: bool(sections(one[1]) or entry(one[1])))
    for name, annotation in named:
        path = f"{prefix}{name}"
        yield Setting(path, annotation, section.model_fields[name], only)
        places = ((annotation, f"{path}."), (entry(annotation), f"{path}.NAME."), (item(annotation), f"{path}[N]."))
        for inner, below in places:
            choices = sections(inner)
            for choice in choices:
                yield from settings(choice, below, f"type={tag(choice)}" if len(choices) > 1 else only)


def words(annotation: Any, null: bool = True) -> str:
    """What a value must be: "a whole number, 1 or more, or null"; null can be left out."""
    parts = tuple(part for part in alternatives(annotation) if null or part is not NoneType)
    variants = sections(annotation)
    if len(variants) > 1:
        said = [f"a section whose type is {either([tag(choice) for choice in variants])}"]
        said += [_one(part) for part in parts if part not in variants]
    else:
        said = [_one(part) for part in parts]
    return ", or ".join(said) if any("," in word for word in said) else " or ".join(said)


def either(choices: list[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def literals(part: Any) -> tuple[str, ...]:
    """The words that one member of a union allows."""
    return tuple(str(choice) for choice in get_args(part)) if get_origin(part) is Literal else ()


def set_by(origin: str, how: str = "set by") -> str:
    """ " (set by configs/a.yaml:3)" or " (set by 'sft.steps=10')", for messages."""
    return f" ({how} {origin.removeprefix('command line ')})" if origin else ""


def _one(part: Any) -> str:
    bare, bounds = part, []
    if get_origin(part) is Annotated:
        bare, *extras = get_args(part)
        bounds = [bound for extra in extras if isinstance(extra, FieldInfo) for bound in extra.metadata]
    if bare in (int, float):
        return ("a whole number" if bare is int else "a number") + _range(bounds)
    if bare is str and any(hasattr(bound, "pattern") for bound in bounds):
        return "text that can name a folder, without /"
    if bare in NAMES:
        return NAMES[bare]
    if isinstance(bare, type) and issubclass(bare, Section):
        return f"a section with {', '.join(annotations(bare))}"
    inside = get_args(bare)
    if get_origin(bare) is Literal:
        return either([str(choice) for choice in inside])
    if get_origin(bare) is dict:
        return "a table of names, each with " + words(inside[1]).removeprefix("a section with ")
    if get_origin(bare) is tuple and inside[-1] is Ellipsis:
        return "a list of texts" if inside[0] is str else f"a list, each item {words(inside[0])}"
    if get_origin(bare) is tuple:
        return f"a list of {len(inside)}: {', '.join(words(item) for item in inside)}"
    return str(bare)


def _range(bounds: list[Any]) -> str:
    def tightest(name: str, choose: Any) -> Any:
        return choose((getattr(bound, name) for bound in bounds if hasattr(bound, name)), default=None)

    at_least, above = tightest("ge", max), tightest("gt", max)
    at_most, below = tightest("le", min), tightest("lt", min)
    start = None if at_least is None else f"{at_least:g}"
    if start is not None and at_most is not None:
        return f" from {start} to {at_most:g}"
    if start is not None and below is not None:
        return f" from {start} to below {below:g}"
    if start is not None:
        return f", {start} or more"
    if above is not None:
        return f" above {above:g}" + (f", at most {at_most:g}" if at_most is not None else "")
    return ""
