"""What the command line asks of a finished run: the options of `jaxgpt sample` and `jaxgpt chat`, which begin with
dashes, and the settings of the verbs that work on folders (eval, import, export), written key=value as those of config
files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator

from jaxgpt.config.check import build, shown
from jaxgpt.config.describe import default
from jaxgpt.config.fields import sections, settings, words
from jaxgpt.config.load import COMMAND_LINE, ConfigError
from jaxgpt.config.schema import Count, MeshConfig, NonNegative, Positive, Section, Seed, Whole
from jaxgpt.config.tree import Node, merge, parse, plant
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


def _listed(value: Any) -> Any:
    """One text as the texts between its commas."""
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_listed)]


def _numbers(value: Any) -> Any:
    """A number, or the numbers between a text's commas, in order and each once."""
    parts = _listed(value) if isinstance(value, str) else value if isinstance(value, list | tuple) else (value,)
    return tuple(sorted({TypeAdapter(Count).validate_python(part) for part in parts}))


Counts = Annotated[tuple[Count, ...], BeforeValidator(_numbers)]


class Measures(Section):
    """What `jaxgpt eval RUN_FOLDER` measures, and how."""

    tasks: Names = ()
    """lm-eval tasks or groups by name, or YAML task files of your own, with commas between them."""
    text: Names = ()
    """Files or patterns (.txt, .jsonl, packed or not) to give the perplexity and bits per byte of, each by itself."""
    rankings: Names = ()
    """Files of rankings to give a reward model's accuracy on, by "subset", "kind" or "source" of the records."""
    against: Names = ()
    """Models to compare responses with: runs, stages, checkpoints or hf:FOLDER; judge says which one is better."""
    best_of: Counts = ()
    """Numbers of responses to choose the best from by proxy: how judge's score rises with them, and pass@k."""
    frontier: Names = ()
    """Models whose KL from this one and scores are measured: stages (with all their checkpoints), runs, or patterns."""
    field: str = "text"
    """text: key of the text in JSONL records."""
    limit: Count | None = None
    """Examples of each task, documents of each text file, rankings of each file, and prompts, at most."""
    few_shot: Whole | None = None
    """tasks: solved examples before each question; unset means the task's own number."""
    chat: bool = False
    """tasks: put questions through the model's chat template."""
    prompts: Names = ()
    """JSONL files of prompts to respond to, for against, best_of and frontier."""
    judge: str | None = None
    """Who says what a response is worth: module:function, the run or folder of a reward model, hf:FOLDER, or the
    address of an OpenAI-compatible server, http://127.0.0.1:8000/v1, which compares two and gives no scores."""
    judge_model: str | None = None
    """Model that the server is asked for; unset means its only one."""
    judge_key: str | None = None
    """Environment variable that holds the server's key; unset means it needs none."""
    judge_timeout: Positive = 60.0
    """Seconds that the server has for a reply."""
    judge_parallel: Count = 4
    """Questions to the server at a time."""
    proxy: str | None = None
    """Reward model, or module:function, that best_of chooses by and that frontier shows beside judge."""
    samples: Count | None = None
    """Responses to each prompt from which best_of is estimated; unset means the largest of its numbers."""
    grade: Literal["exact", "number"] = "exact"
    """pass@k: what makes an answer right, the same text or the same final number, as in the reward of that type."""
    temperature: NonNegative = 1.0
    """Sampling temperature of the responses."""
    max_tokens: Count = 128
    """Longest response, in tokens."""
    seed: Seed = 0
    """Seed of the responses."""
    batch: Count = 8
    """Rows in one forward pass, over all devices."""
    stage: str | None = None
    """Stage of the run to use; unset means its last finished language model, and for rankings its reward model."""
    out: str | None = None
    """Folder that the results are written to; unset means evaluate/ of the run."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices."""

    @model_validator(mode="after")
    def _something(self) -> Measures:
        if not (self.tasks or self.text or self.rankings or self.responds):
            raise ValueError(
                "nothing to measure: set tasks=arc_easy, tasks=my_task.yaml or text=file.txt, or for a reward model "
                "rankings=file.jsonl; or with prompts=file.jsonl against=OTHER_RUN, best_of=1,2,4,8 or frontier=STAGE"
            )
        if not self.tasks and (self.chat or self.few_shot is not None):
            raise ValueError("chat and few_shot are for tasks, and there are none")
        for name, users in FOR.items():
            if getattr(self, name) not in (None, ()) and not any(getattr(self, user) for user in users):
                raise ValueError(f"{name} is for {', '.join(users)}, and there is none")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Measures:
        if self.responds and not self.prompts:
            raise ValueError(f"prompts must be set, JSONL files to respond to, for {', '.join(self.responds)}")
        if self.against and self.judge is None:
            raise ValueError("judge must be set for against: module:function, a reward model, or a server's address")
        if self.best_of and self.asks_server:
            raise ValueError("judge is a server, which gives no scores; best_of needs a function or a reward model")
        if not self.asks_server and (self.judge_model, self.judge_key) != (None, None):
            raise ValueError("judge_model and judge_key are for a server, and judge is none")
        if self.samples is not None and self.samples < max(self.best_of, default=0):
            raise ValueError(f"samples is {self.samples}, and best_of goes up to {max(self.best_of)}")
        if self.frontier and self.temperature == 0:
            raise ValueError("temperature is 0, and frontier measures the KL between distributions; raise it above 0")
        return self

    @property
    def responds(self) -> tuple[str, ...]:
        """The measures that let models respond to prompts."""
        return tuple(name for name in ("against", "best_of", "frontier") if getattr(self, name))

    @property
    def asks_server(self) -> bool:
        """Whether the judge is reached over HTTP."""
        return self.judge is not None and self.judge.startswith(("http://", "https://"))


FOR = {
    "prompts": ("against", "best_of", "frontier"),
    "judge": ("against", "best_of", "frontier"),
    "proxy": ("best_of", "frontier"),
    "samples": ("best_of",),
}
"""What settings of Measures are for."""


class Import(Section):
    """How `jaxgpt import FOLDER` takes a Hugging Face folder in."""

    out: str | None = None
    """Folder of the run it becomes; unset means runs/ and the folder's name."""
    tokenizer: str | None = None
    """Tokenizer file or folder, for a folder without one; unset means the folder's own."""
    template: str | None = None
    """Chat template: a Jinja file, or roles or vicuna; unset means the folder's own."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices the parameters are read onto."""


class Export(Section):
    """How `jaxgpt export RUN FOLDER` writes a Hugging Face folder."""

    stage: str | None = None
    """Stage of the run to write; unset means its last finished language model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the files; float32 is exact."""
    shard_gb: Positive = 5.0
    """Largest file of weights, in units of 1e9 bytes."""
    adapters: bool = False
    """Write the stage's LoRA adapters alone, in PEFT's format, for the model that the stage began with."""
    mesh: MeshConfig = MeshConfig()
    """Layout of the devices the parameters are loaded onto."""


Settings = TypeVar("Settings", bound=Section)


def parse_settings(section: type[Settings], argv: Sequence[str]) -> Settings:
    """The settings key=value of a verb that works on a folder. Raises ConfigError with every mistake at once."""
    problems: list[str] = []
    root = Node({}, COMMAND_LINE)
    for word in argv:
        path, equals, text = word.partition("=")
        if not equals or word.startswith("-"):
            problems.append(f"'{word}': expected key=value, as in 'limit=100'")
            continue
        try:
            node = plant(parse(text), f"{COMMAND_LINE}'{word}'")
        except ValueError as error:
            problems.append(f"{path} (set by '{word}'): not valid YAML: {error}")
            continue
        for part in reversed(path.strip().split(".")):
            node = Node({part: node}, node.origin)
        root = merge(root, node)
    made = build(section, root, "", problems, complete=not problems)
    if problems or not isinstance(made, section):
        raise ConfigError(problems)
    return made


def describe_settings(section: type[Section]) -> list[str]:
    """Two lines for every setting of such a verb: its default and type; then its meaning."""
    text = []
    for setting in settings(section):
        if not sections(setting.annotation):
            doc = " ".join((setting.info.description or "").split())
            text += [f"  {setting.path}{default(setting.info)}  ({words(setting.annotation)})", f"      {doc}"]
    return text
