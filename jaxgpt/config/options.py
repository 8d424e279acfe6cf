"""How text is sampled from a finished run: the options of `jaxgpt sample` and `jaxgpt chat`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from jaxgpt.config.check import shown
from jaxgpt.config.fields import words
from jaxgpt.config.load import ConfigError
from jaxgpt.config.schema import Count, NonNegative, Whole
from jaxgpt.errors import nearest

Probability = Annotated[float, Field(gt=0.0, le=1.0)]


@dataclass(frozen=True)
class SamplingOptions:
    """Settings of the sampler; None means unset."""

    temperature: NonNegative = 1.0
    top_k: Count | None = None
    top_p: Probability | None = None
    max_tokens: Count = 128
    seed: Whole = 0
    stop: tuple[str, ...] = ()
    stage: str | None = None


MEANINGS = {
    "temperature": "Divides the logits; 0 always takes the likeliest token.",
    "top_k": "Sample among this many likeliest tokens.",
    "top_p": "Sample among the fewest tokens that have this probability together.",
    "max_tokens": "Longest response, in tokens.",
    "seed": "Seed of the sampling; the same seed gives the same text.",
    "stop": "End before this text; may be given several times.",
    "stage": "Stage of the run to use; unset means its last finished one.",
}


def parse_options(argv: Sequence[str]) -> tuple[list[str], SamplingOptions]:
    """The plain words and the options (`--top-k 5` or `--top-k=5`) of a command line; after `--` all words are plain.

    Raises ConfigError with every mistake at once.
    """
    hints = get_type_hints(SamplingOptions, include_extras=True)
    plain: list[str] = []
    given: dict[str, Any] = {}
    problems: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word == "--":
            plain += rest
            continue
        if not word.startswith("--"):
            plain.append(word)
            continue
        flag, equals, text = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name not in hints:
            known = [option(field) for field in hints]
            problems.append(f"{flag}: no such option.{nearest(flag, known)} Options: {', '.join(known)}")
            continue
        value = text if equals else next(rest, None)
        try:
            if value is None:
                problems.append(f"{flag}: nothing after it, expected {kind(name)}")
            elif name == "stop":
                given[name] = (*given.get(name, ()), value)
            else:
                given[name] = TypeAdapter(hints[name]).validate_python(value)
        except ValidationError:
            problems.append(f"{flag}: found {shown(value)}, expected {kind(name)}")
    if problems:
        raise ConfigError(problems)
    return plain, SamplingOptions(**given)


def describe_options() -> list[str]:
    """Two lines for every option: its default and type; then its meaning."""
    text = []
    for name, meaning in MEANINGS.items():
        value = getattr(SamplingOptions(), name)
        unset = value is None or value == ()
        text += [f"  {option(name)} = {'unset' if unset else value}  ({kind(name)})", f"      {meaning}"]
    return text


def option(name: str) -> str:
    """The option of a field: "--top-k"."""
    return "--" + name.replace("_", "-")


def kind(name: str) -> str:
    """What follows the option of a field."""
    return "text" if name == "stop" else words(get_type_hints(SamplingOptions, include_extras=True)[name], null=False)
