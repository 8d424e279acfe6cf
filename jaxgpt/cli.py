"""The command line, and the one place that reads it: words to a checked config, then the verb.

What a verb does is imported after its config is right, so that a mistake is answered before jax is even loaded.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxgpt.config.describe import describe, explain, json_schema, show_help
from jaxgpt.config.fields import annotations, filled
from jaxgpt.config.load import Loaded, load
from jaxgpt.config.options import (
    Export,
    Import,
    Measures,
    SamplingOptions,
    describe_options,
    describe_settings,
    parse_options,
    parse_settings,
)
from jaxgpt.config.planned import Planned
from jaxgpt.config.schema import Config, Section
from jaxgpt.errors import UserError, nearest
from jaxgpt.interop.foreign import Foreign, beginnings
from jaxgpt.launch import find_start
from jaxgpt.places import place
from jaxgpt.ready import check_ready
from jaxgpt.runs import FOREIGN, find_adapters, find_stage, is_foreign

ALWAYS = ("name", "runs", "seed")
STAGE = (*ALWAYS, "mesh", "hosts", "tokenizer", "model")
ALL = tuple(Config.model_fields)
CONFIG_USAGE = "FILE.yaml [group=name] [key.path=value ...]"


@dataclass(frozen=True)
class Verb:
    """A verb: what it takes, what it does, and the settings it reads."""

    usage: str
    doc: str
    call: Callable[[str, list[str]], int]
    reads: tuple[str, ...] = ()
    needs: str | None = None
    """The section it cannot do without."""
    of_folder: type[Section] | None = None
    """The settings it takes where it is given a folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line and returns its exit code: 2 for a mistake of the user, 130 where interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"jaxgpt: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"jaxgpt: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 2


def _dispatch(words: list[str]) -> int:
    first, rest = (words[0], words[1:]) if words else ("--help", [])
    if first in ("-h", "--help", "help"):
        if first == "help" and rest:
            return _dispatch([rest[0], "--help"])
        show_help(_overview())
        return 0
    if first == "--version":
        from importlib.metadata import version

        print(f"jaxgpt {version('jaxgpt')}")
        return 0
    verb = VERBS.get(first)
    if verb is None and Path(first).suffix in (".yaml", ".yml"):
        raise UserError(f"'{first}': a file, expected a verb before it: jaxgpt run {' '.join(words)}")
    if verb is None:
        raise UserError(f"'{first}': no such verb.{nearest(first, VERBS)} Verbs: {', '.join(VERBS)}")
    if any(word in ("-h", "--help") for word in rest[: rest.index("--") if "--" in rest else None]):
        show_help(_verb_help(first, verb))
        return 0
    return verb.call(first, rest)


def _pipeline(name: str, words: list[str]) -> int:
    """A verb that works from a config file."""
    loaded = _load(name, words)
    needs = VERBS[name].needs
    if needs is not None and getattr(loaded.config, needs) is None:
        defaults = filled(needs, annotations(Config)[needs])
        raise UserError(f"{needs}: not set in {words[0]}; add the section '{needs}:', or {defaults} for its defaults")
    check_ready(name, loaded)
    start = find_start(os.environ)
    from jaxgpt.verbs import run_verb

    return run_verb(name, loaded.config, start)


def _doctor(name: str, words: list[str]) -> int:
    """Checks of all that a file describes; 1 where one fails."""
    loaded = _load(name, words)
    check_ready(name, loaded)
    from jaxgpt.api import keep_compiled
    from jaxgpt.doctor import examine

    keep_compiled()
    return examine(loaded.config)


def _plan(name: str, words: list[str]) -> int:
    """What a file's stages take, 1 where one does not fit; or how a budget is best spent."""
    if words and words[0].startswith("--"):
        from jaxgpt.plan.scaling import scale

        return scale(words, _folder)
    words = ["compile=true" if word == "--compile" else word for word in words]
    own = [word for word in words[1:] if word.partition("=")[0] in Planned.model_fields]
    loaded = _load(name, [word for word in words if word not in own])
    options = parse_settings(Planned, own)
    check_ready("config", loaded)
    from jaxgpt.plan.verb import plan, with_vocabulary

    found, target, code = plan(Path(words[0]), loaded.config, options)
    if not options.compile:
        return code
    # this process is to compile for TPUs, not to look for any
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    from jaxgpt.aot.verb import compile_stages

    return compile_stages(with_vocabulary(loaded.config), found, target) or code


def _report(name: str, words: list[str]) -> int:
    """The report of a run folder, or of the run a file describes."""
    if _names_a_config(words):
        return _pipeline(name, words)
    run = _folder(words[0])
    if len(words) > 1:
        raise UserError(f"'{words[1]}': a run folder takes no settings; its own are in {run / 'config.yaml'}")
    from jaxgpt.report import write_report

    print(write_report(run))
    return 0


def _eval(name: str, words: list[str]) -> int:
    """One model of a run folder on tasks, texts and against others, or all of what a file describes."""
    if _names_a_config(words):
        return _pipeline(name, words)
    run, wanted = _folder(words[0]), parse_settings(Measures, words[1:])
    from jaxgpt.evaluate.measure import check, measure

    key = None if wanted.judge_key is None else os.environ.get(wanted.judge_key)
    alignment = check(run, wanted, shlex.join([name, *words]), key)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # lm-eval would fork beside jax's threads for standard errors
    return measure(run, wanted, alignment)


def _import(name: str, words: list[str]) -> int:
    """A Hugging Face folder as a run."""
    if not words or "=" in words[0]:
        raise UserError(f"import: no folder; usage: jaxgpt import {VERBS[name].usage}")
    folder, wanted = Path(words[0].removeprefix(FOREIGN)), parse_settings(Import, words[1:])
    Foreign.describe(folder)  # before jax is loaded
    from jaxgpt.exchange import import_folder

    return import_folder(folder, wanted)


def _export(name: str, words: list[str]) -> int:
    """A finished model as a Hugging Face folder."""
    if len(words) < 2 or "=" in words[0] or "=" in words[1]:
        raise UserError(f"export: expected a run and a folder to write; usage: jaxgpt export {VERBS[name].usage}")
    run, folder, wanted = _folder(words[0]), Path(words[1]).expanduser(), parse_settings(Export, words[2:])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; name another folder, or remove it")
    (find_adapters if wanted.adapters else find_stage)(run, wanted.stage)
    from jaxgpt.exchange import export, export_adapters

    return (export_adapters if wanted.adapters else export)(run, folder, wanted)


def _names_a_config(words: list[str]) -> bool:
    """Whether a verb that also takes a run folder was given a file, or nothing."""
    return not words or "=" in words[0] or Path(words[0]).suffix in (".yaml", ".yml")


def _config(name: str, words: list[str]) -> int:
    """The resolved config with the source of every value, or the schema."""
    if "--schema" in words:
        import json

        print(json.dumps(json_schema(), indent=2))
        return 0
    loaded = _load(name, words)
    check_ready(name, loaded)
    print(explain(loaded), end="")
    return 0


def _sample(name: str, words: list[str]) -> int:
    """Completes one text."""
    run, texts, options = _run_and_options(name, words)
    if len(texts) != 1:
        raise UserError(f"sample: found {len(texts)} texts, expected one: jaxgpt sample {run} 'Once upon a time'")
    from jaxgpt.terminal import sample

    return sample(run, texts[0], options)


def _chat(name: str, words: list[str]) -> int:
    """Talks to a run."""
    run, texts, options = _run_and_options(name, words)
    if texts:
        raise UserError(f"'{texts[0]}': chat takes a run folder alone; for one text there is jaxgpt sample")
    from jaxgpt.terminal import chat

    return chat(run, options)


def _load(name: str, words: list[str]) -> Loaded:
    if not words or ("=" in words[0] and not Path(words[0]).exists()):
        found = f"'{words[0]}' where the file belongs" if words else "no file"
        known = ", ".join(str(path) for path in sorted(Path("configs").glob("*.yaml")))
        raise UserError(
            f"{name}: found {found}; usage: jaxgpt {name} {VERBS[name].usage}{known and f'. Files: {known}'}"
        )
    if words[0].startswith("-"):
        raise UserError(f"{words[0]}: no such option of {name}; usage: jaxgpt {name} {VERBS[name].usage}")
    return load(Path(words[0]), words[1:], beginnings)


def _run_and_options(name: str, words: list[str]) -> tuple[Path, list[str], SamplingOptions]:
    plain, options = parse_options(words)
    if not plain:
        raise UserError(f"{name}: no run folder; usage: jaxgpt {name} {VERBS[name].usage}")
    return _folder(plain[0]), plain[1:], options


def _folder(word: str) -> Path:
    """Looks for the folder of a run, or a Hugging Face folder. Raises UserError with the nearest one."""
    if is_foreign(word):
        Foreign.describe(word)
        return Path(word)
    path = place(word)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{word}: a file, expected the folder of a run, such as runs/meadow")
    places = {str(found): found for place in (path.parent, Path("runs")) for found in place.glob("*/")}
    guess = nearest(word, places) or nearest(str(Path("runs") / word), places)
    raise UserError(f"{word}: no such folder.{guess or ' Expected the folder of a run, such as runs/meadow'}")


def _overview() -> list[str]:
    return [
        "jaxgpt trains a ChatGPT-like assistant from raw text: pretraining, fine-tuning, a reward model, PPO.",
        "",
        "jaxgpt VERB FILE.yaml [group=name] [key.path=value ...]",
        "",
        *[f"  {name:<10} {verb.doc}" for name, verb in VERBS.items()],
        "",
        "jaxgpt VERB --help lists every setting that the verb reads. jaxgpt --version",
    ]


def _verb_help(name: str, verb: Verb) -> list[str]:
    head = [f"jaxgpt {name} {verb.usage}", "", f"    {verb.doc}"]
    if verb.of_folder is not None:
        title = "Settings with RUN_FOLDER" if verb.reads and name != "plan" else "Settings of its own"
        head += ["", f"{title}, as key = default (type)", *describe_settings(verb.of_folder)]
        if not verb.reads:
            return head
        head += ["", "With FILE.yaml"]
    if not verb.reads:
        return [*head, "", "Options", *describe_options()]
    return [
        *head,
        "    key.path=value changes one setting of the file, in YAML: sft.steps=1e3, mesh.data=auto, sft=null.",
        "    group=name takes a whole section from a file: model=llama-7b reads configs/model/llama-7b.yaml.",
        "",
        "Settings, as path = default (type)",
        *describe(verb.reads),
    ]


VERBS = {
    "run": Verb(CONFIG_USAGE, "All that the file describes, data to report; goes on where it was.", _pipeline, ALL),
    "prepare": Verb(CONFIG_USAGE, "Make the run's data files.", _pipeline, (*ALWAYS, "prepare"), "prepare"),
    "tokenizer": Verb(CONFIG_USAGE, "Train the tokenizer.", _pipeline, (*ALWAYS, "data", "tokenizer")),
    "pretrain": Verb(CONFIG_USAGE, "Stage 1: predict text.", _pipeline, (*STAGE, "data", "pretrain"), "pretrain"),
    "sft": Verb(CONFIG_USAGE, "Stage 2: learn from conversations.", _pipeline, (*STAGE, "sft"), "sft"),
    "reward": Verb(CONFIG_USAGE, "Stage 3: a reward model from rankings.", _pipeline, (*STAGE, "reward"), "reward"),
    "ppo": Verb(CONFIG_USAGE, "Stage 4: PPO against the reward model.", _pipeline, (*STAGE, "data", "ppo"), "ppo"),
    "dpo": Verb(CONFIG_USAGE, "Direct preference optimization on rankings.", _pipeline, (*STAGE, "dpo"), "dpo"),
    "grpo": Verb(CONFIG_USAGE, "Group-relative policy optimization: no critic.", _pipeline, (*STAGE, "grpo"), "grpo"),
    "rloo": Verb(CONFIG_USAGE, "REINFORCE with leave-one-out baselines.", _pipeline, (*STAGE, "rloo"), "rloo"),
    "rejection": Verb(
        CONFIG_USAGE, "Fine-tuning on the best of n responses.", _pipeline, (*STAGE, "rejection"), "rejection"
    ),
    "doctor": Verb(CONFIG_USAGE, "Checks on the file's models and data before anything is trained.", _doctor, ALL),
    "plan": Verb(
        f"{CONFIG_USAGE} [target=v5p:4x4x8] [--compile] | --chinchilla budget=1e21 | --isoflop RUN_FOLDER ...",
        "What training takes: parameters, FLOPs, bytes per chip, meshes, days, cost.",
        _plan,
        ALL,
        of_folder=Planned,
    ),
    "eval": Verb(
        f"RUN_FOLDER tasks=NAME,... text=FILE,... rankings=FILE,... against=RUN,... best_of=N,... frontier=STAGE,... "
        f"| {CONFIG_USAGE}",
        "Measure a model on tasks, texts, rankings and against others, or the run as its file says.",
        _eval,
        (*STAGE, "evaluate"),
        "evaluate",
        Measures,
    ),
    "overopt": Verb(
        CONFIG_USAGE,
        "Study of over-optimisation: proxies of a gold score, best-of-n and PPO against them.",
        _pipeline,
        (*STAGE, "overopt"),
        "overopt",
    ),
    "report": Verb(f"RUN_FOLDER | {CONFIG_USAGE}", "One HTML page about a run.", _report, ALWAYS),
    "sample": Verb('RUN_FOLDER "TEXT" [options]', "Complete a text.", _sample),
    "chat": Verb("RUN_FOLDER [options]", "Talk to a model in the terminal.", _chat),
    "import": Verb(
        "HF_FOLDER [out=RUN_FOLDER] [key=value ...]", "A Hugging Face folder as a run.", _import, of_folder=Import
    ),
    "export": Verb(
        "RUN_FOLDER HF_FOLDER [key=value ...]", "A model as a Hugging Face folder.", _export, of_folder=Export
    ),
    "config": Verb(f"{CONFIG_USAGE} | --schema", "Print the settings and where each was set.", _config, ALL),
}
