"""What a verb would find out hours later, told at once: settings that do not fit each other, data that is not there.

Looks for files, reads none. Nothing here needs jax.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator

from jaxgpt.config.fields import set_by
from jaxgpt.config.load import ConfigError, Loaded
from jaxgpt.config.schema import Config, Conversations, PpoConfig, PretrainConfig, Rankings, RolloutConfig
from jaxgpt.data.records import expand
from jaxgpt.data.templates import BUILT_IN
from jaxgpt.data.worlds import world_files
from jaxgpt.errors import UserError, nearest
from jaxgpt.places import in_bucket, place
from jaxgpt.runs import RANDOM, STAGES, before_study, demonstrations, parents, reads_text, resolved, run_folder

Paths = str | tuple[str, ...]
DATA = {
    "sft": "a JSONL file of conversations",
    "reward": "a JSONL file of rankings",
    "dpo": "a JSONL file of rankings",
    **dict.fromkeys(("ppo", "grpo", "rloo", "rejection"), "a JSONL file of prompts"),
    "evaluate": "a JSONL file of held-out prompts",
}
"""What the sections that read files of their own expect under `data.path`."""


def check_ready(verb: str, loaded: Loaded) -> None:
    """Raises ConfigError with all that speaks against a verb; `config` is told what holds for any verb."""
    config = loaded.config
    studies = config.overopt is not None and verb in ("config", "overopt")
    every = verb in ("run", "config", "doctor")
    asked = before_study(config) if verb == "overopt" else STAGES if every else (verb,)
    stages = [name for name in STAGES if name in asked and getattr(config, name) is not None]
    evaluates = config.evaluate is not None and verb in ("run", "config", "doctor", "eval")
    sections = [*stages, "evaluate"] if evaluates else stages
    problems = [*_contexts(loaded, sections), *_best(loaded, stages), *_normalized(loaded, stages)]
    problems += [*_adapters(loaded, stages), *(_study(loaded) if studies else ())]
    sections = [*sections, "overopt"] if studies else sections
    if verb in ("run", "doctor") and not stages:
        problems.append(f"there is nothing to {verb}: the config has none of the sections {', '.join(STAGES)}")
    trains = bool(stages) or verb in ("tokenizer", "overopt")
    if verb != "config":
        problems += _unset(loaded, sections)
        problems += _missing(loaded, _needed(config, sections, trains), verb != "eval")
        if trains and not _learned(config) and "pretrain" not in stages:
            problems.append(
                "tokenizer.path_text: must be set, files to learn a tokenizer from; or data.path, or for one that "
                "is there, tokenizer.path"
            )
    if problems:
        raise ConfigError(problems)


def _named(loaded: Loaded, setting: str) -> str:
    """A setting with where it was set: "sft.steps (set by run.yaml:3)"."""
    origin = loaded.origins.get(setting, "default")
    return f"{setting} (default)" if origin == "default" else f"{setting}{set_by(origin)}"


def _contexts(loaded: Loaded, sections: list[str]) -> Iterator[str]:
    """Rows longer than the model's context."""
    config, limit = loaded.config, loaded.config.model.context
    context = f"model.context, which is {limit}{_named(loaded, 'model.context').removeprefix('model.context')}"
    for name in sections:
        section = getattr(config, name)
        if isinstance(section, RolloutConfig):
            settings = (f"{name}.prompt_length", f"{name}.response_length")
            if isinstance(section, PpoConfig) and section.ptx is not None and section.ptx.context > limit:
                what = _named(loaded, "ppo.ptx.context")
                yield f"{what}: found {section.ptx.context}, expected at most {context}"
        else:
            settings = ("evaluate.max_tokens",) if name == "evaluate" else (f"{name}.context",)
        length = sum(getattr(getattr(config, name), setting.partition(".")[2]) for setting in settings)
        what = " + ".join(_named(loaded, setting) for setting in settings)
        if name == "evaluate" and length >= limit:
            yield f"{what}: found {length}, expected less than {context}: prompts need room"
        elif length > limit:
            yield f"{what}: found {length}, expected at most {context}"


def _best(loaded: Loaded, stages: list[str]) -> Iterator[str]:
    """Stages that are to hand on their best parameters, and never measure any."""
    config = loaded.config
    for name in stages:
        section = getattr(config, name)
        if section.best == "last":
            continue
        what = f"{_named(loaded, f'{name}.best')}: found 'best', and"
        if isinstance(section, RolloutConfig):
            if section.gold is None:
                yield f"{what} {name} measures nothing on held-out data; set {name}.gold, or use last"
        elif name == "pretrain" and config.data.val_fraction == 0:
            yield f"{what} there is no held-out text; raise data.val_fraction above 0, or use last"
        elif name != "pretrain" and section.data is not None and not _measured(section.data):
            share = " or val_fraction" if isinstance(section.data, Rankings) else ""
            yield f"{what} there is no held-out data; set {name}.data.eval_path{share}, or use last"


def _measured(data: Conversations | Rankings) -> bool:
    return data.measured if isinstance(data, Rankings) else data.eval_path is not None


def _normalized(loaded: Loaded, stages: list[str]) -> Iterator[str]:
    """A reward model whose scores are to be normalized over what there is not."""
    config = loaded.config
    if config.reward is None or "reward" not in stages:
        return
    what = f"{_named(loaded, 'reward.normalize')}: found {config.reward.normalize}, and"
    if config.reward.normalize == "policy" and parents(config, "reward")["start"] == RANDOM:
        yield f"{what} there is no policy to sample from: the parameters start at random; set reward.init"
    if config.reward.normalize == "demonstrations" and demonstrations(config) is None:
        yield f"{what} there are none; set reward.demonstrations.path, a JSONL file of conversations, or sft.data.path"


def _adapters(loaded: Loaded, stages: list[str]) -> Iterator[str]:
    """Adapters that the model has no place for, or that stand on nothing."""
    config, c = loaded.config, loaded.config.model
    heads, groups = c.attention.heads * c.head_dim, c.kv_heads * c.head_dim
    outputs = {"q": heads, "k": groups, "v": groups, "o": heads, "up": c.hidden, "down": c.hidden}
    outputs |= {"gate": c.hidden} if c.gated else {}
    for name in stages:
        section = getattr(config, name)
        if isinstance(section, PretrainConfig) or section.lora is None:
            continue
        rank, targets = section.lora.rank, section.lora.targets
        missing = [target for target in targets if target not in outputs]
        if missing:
            yield (
                f"{_named(loaded, f'{name}.lora.targets')}: found 'gate', and a feed-forward of type {c.mlp.type} has "
                f"none; expected some of {', '.join(outputs)}"
            )
        sizes = {target: (c.width, outputs[target]) for target in targets if target in outputs}
        small = min(sizes, key=lambda target: min(sizes[target]), default=None)
        if small is not None and rank > min(sizes[small]):
            a, b = sizes[small]
            yield (
                f"{_named(loaded, f'{name}.lora.rank')}: found {rank}, and the matrix of {small} is {a} by {b}; "
                f"expected at most {min(a, b)}"
            )
        if parents(config, name)["start"] == RANDOM:
            yield (
                f"{name}.lora: there is no trained model to adapt; set {name}.init, or train "
                f"whole with {name}.lora=null"
            )


def _study(loaded: Loaded) -> Iterator[str]:
    """Proxies whose sizes do not fit each other, and rows of the study that are too long, or too short."""
    config, limit = loaded.config, loaded.config.model.context
    study = config.overopt
    assert study is not None
    for name, proxy in study.proxies.items():
        try:
            proxy.model(config.model)
        except ValueError as error:
            yield f"overopt.proxies.{name}: {error}, its own or the policy's"
    episode = study.ppo.prompt_length + study.ppo.response_length
    what = f"{_named(loaded, 'overopt.ppo.prompt_length')} + {_named(loaded, 'overopt.ppo.response_length')}"
    context, row = study.reward.context, _named(loaded, "overopt.reward.context")
    if episode > limit:
        yield f"{what}: found {episode}, expected at most model.context, which is {limit}"
    if context > limit:
        yield f"{row}: found {context}, expected at most model.context, which is {limit}"
    elif context <= episode:
        yield f"{row}: found {context}, expected more than {what}, {episode}: room for a prompt, a response and its end"


def _unset(loaded: Loaded, sections: list[str]) -> Iterator[str]:
    """Sections without their data."""
    for name in sections:
        if reads_text(loaded.config, name) and not loaded.config.data.named:
            yield f"data.path: must be set, files of text for {name} (or data.sources for a mixture)"
        if name != "pretrain" and getattr(loaded.config, name).data is None:
            origin = loaded.origins.get(f"{name}.data", "default")
            place = "" if origin == "default" else set_by(origin, "unset by")
            yield f"{name}.data.path{place}: must be set, {DATA[name]}"


def _learned(config: Config) -> bool:
    """Whether there is a tokenizer, or text to learn one from."""
    return config.tokenizer.path is not None or config.tokenizer.path_text is not None or bool(config.data.named)


def _needed(config: Config, sections: list[str], tokenizer: bool) -> dict[str, Paths]:
    """The files that are read, by the setting that names them."""
    t, needed = config.tokenizer, dict[str, Paths | None]()
    if tokenizer:
        needed["tokenizer.path"] = t.path
        needed["tokenizer.path_text"] = t.path_text if t.path is None else None
        needed["tokenizer.template"] = t.template if t.template not in BUILT_IN else None
    if any(reads_text(config, name) for name in sections) or (tokenizer and t.path is None and t.path_text is None):
        alone = config.data.path is not None
        needed |= {
            "data.path" if alone else f"data.sources.{name}.path": source.path
            for name, source in config.data.named.items()
        }
    for name in sections:
        for part in ("data", "exact", "demonstrations"):
            files = getattr(getattr(config, name), part, None)
            for key in ("path", "eval_path"):
                needed[f"{name}.{part}.{key}"] = getattr(files, key, None)
        section = getattr(config, name)
        if isinstance(section, RolloutConfig) and (gold := section.gold) is not None:
            needed[f"{name}.gold.data.path"] = gold.data.path
    shown = demonstrations(config) if "reward" in sections else None
    if shown is not None and config.sft is not None and shown is config.sft.data:
        needed["sft.data.path"] = shown.path
    return {setting: given for setting, given in needed.items() if given is not None}


def _missing(loaded: Loaded, needed: dict[str, Paths], prepares: bool) -> Iterator[str]:
    """Files that are not there, and that `prepare` will not make."""
    config = loaded.config
    names = world_files(config.prepare) if prepares and config.prepare is not None else ()
    made = [str(run_folder(config) / "data" / name) for name in names]
    for setting, given in needed.items():
        for path in resolved(config, given):
            if fnmatch.filter(made, path if in_bucket(path) else os.path.normpath(path)):
                continue
            if setting == "tokenizer.path" and place(path).is_dir():
                continue
            try:
                expand(path)
            except UserError as error:
                told = str(error)
                hint = "" if "Did you mean" in told else nearest(path, made)
                yield f"{_named(loaded, setting)}: {told.removesuffix('.') + '.' + hint if hint else told}"
