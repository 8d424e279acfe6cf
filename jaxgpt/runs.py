"""Where things lie: the folder of a run, its stages' results, and what each stage starts from.

Reads folders. Nothing here needs jax.
"""

from __future__ import annotations

from pathlib import Path

from jaxgpt.config.schema import Config, Conversations, ModelReward, PpoConfig, RolloutConfig, StageConfig
from jaxgpt.errors import UserError, nearest
from jaxgpt.places import place

STAGES = ("pretrain", "sft", "reward", "ppo", "dpo", "grpo", "rloo", "rejection")
"""All stages, in the order in which a run has them."""
ALIGNED = ("ppo", "dpo", "grpo", "rloo", "rejection")
"""Those that make the SFT model better liked, each in its own way; all give a language model."""
IMPORTED = "imported"
"""The folder of a model that came from elsewhere, beside those of the stages."""
ADAPTERS = "adapters"
"""The folder of a stage that holds its adapters alone, beside params/ with the merged model."""
RANDOM = "random"
BASE = {"base": "pretrain"}
"""Another name of a stage."""
KINDS = {"language": "a language model", "scalar": "a reward model"}
"""What finished parameters can be, and how messages call it."""
FOREIGN = "hf:"
"""What the name of a Hugging Face folder begins with, where a folder of ours could stand as well."""


def run_folder(config: Config) -> Path:
    """Folder of the run."""
    return place(config.runs) / config.name


def resolved(config: Config, given: str | tuple[str, ...]) -> list[str]:
    """Paths of the config, with {run} put in."""
    folder = str(run_folder(config))
    return [path.replace("{run}", folder) for path in ([given] if isinstance(given, str) else given)]


def parents(config: Config, name: str) -> dict[str, str]:
    """What a stage starts from, by role: "start" (a stage, another run, a Hugging Face folder, or random), and for what
    learns from its own responses "reward 1", "reward 2" ..., "gold 1" ... and PPO's "critic"; all but the start are
    reward models."""
    section: StageConfig = getattr(config, name)
    before = {"pretrain": None, "sft": "pretrain", "reward": "sft"}.get(name, "sft")
    alone = name in ("sft", "reward") and getattr(config, before) is None
    found = {"start": section.init or (RANDOM if before is None or alone else before)}
    if isinstance(section, RolloutConfig):
        for role, rewards in (("reward", section.rewards), ("gold", section.gold.rewards if section.gold else ())):
            models = [model for reward in rewards if isinstance(reward, ModelReward) for model in reward.folders]
            found |= {f"{role} {number}": model for number, model in enumerate(models, start=1)}
    if isinstance(section, PpoConfig) and section.critic_init is not None:
        found["critic"] = section.critic_init
    return found


def reads_text(config: Config, name: str) -> bool:
    """Whether a stage learns from the mixture of text: pretraining, and PPO-ptx."""
    return name == "pretrain" or (name == "ppo" and config.ppo is not None and config.ppo.ptx is not None)


def demonstrations(config: Config) -> Conversations | None:
    """The conversations that set the offset of the reward model's scores, where demonstrations do."""
    if config.reward is None or config.reward.normalize != "demonstrations":
        return None
    return config.reward.demonstrations or (config.sft.data if config.sft is not None else None)


def before_study(config: Config) -> list[str]:
    """The stages of this run that a study's policy and gold score come from, in order."""
    if config.overopt is None:
        return []
    gold = config.overopt.gold
    wanted, queue = set[str](), [config.overopt.policy, *(gold.folders if isinstance(gold, ModelReward) else ())]
    while queue:
        name = queue.pop()
        if name in STAGES and name not in wanted and getattr(config, name) is not None:
            wanted.add(name)
            queue += parents(config, name).values()
    return [name for name in STAGES if name in wanted]


def is_foreign(name: str | Path) -> bool:
    """Whether a Hugging Face folder is named, rather than something of ours."""
    return str(name).startswith(FOREIGN)


def is_finished(stage: Path) -> bool:
    """Whether a folder holds a result: its parameters, and the note that they are whole."""
    return (stage / "done.json").is_file() and (stage / "params").is_dir()


def finished(run: Path) -> list[str]:
    """Names of the results of a run, in order."""
    return [name for name in (IMPORTED, *STAGES) if is_finished(run / name)]


def find_adapters(path: Path, stage: str | None = None) -> Path:
    """The folder of a finished stage that trained adapters. Raises UserError where there is none, or none has any."""
    folder = find_stage(path, stage)
    if not (folder / ADAPTERS).is_dir():
        trained = [name for name in finished(folder.parent) if (folder.parent / name / ADAPTERS).is_dir()]
        known = f"Stages with adapters: {', '.join(trained)}" if trained else f"No stage of {folder.parent} has any"
        raise UserError(f"{folder}: no adapters there, it was trained whole. {known}; leave adapters=true out")
    return folder


def find_stage(path: Path, stage: str | None = None) -> Path:
    """The folder of a finished stage: `path` itself, one named ("base" is pretrain), or the run's last language model.
    A Hugging Face folder ("hf:...") is itself.

    Raises UserError where there is none.
    """
    if is_foreign(path):
        if stage is not None:
            raise UserError(f"{path}: a Hugging Face folder holds one model; leave the stage '{stage}' out")
        return path
    if not path.is_dir():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such folder.{nearest(path.name, siblings)}")
    trained = (path / "params").is_dir()
    if stage is None and trained:
        return path
    begun = (path / "checkpoints").is_dir()
    if stage is None and begun:
        raise UserError(f"{path} is not finished; the command that began it goes on with it")
    run = path.parent if trained or begun else path
    done = finished(run)
    if stage is None:
        speaking = [name for name in done if name != "reward"] or done
        if speaking:
            return run / speaking[-1]
        if (path / "config.json").is_file():
            raise UserError(f"{path} is a Hugging Face folder: {FOREIGN}{path} reads it, or jaxgpt import {path}")
        raise UserError(f"{run}: no finished stage there; expected the folder of a run, such as runs/meadow")
    name = BASE.get(stage, stage)
    if name in done:
        return run / name
    known = f"Finished there: {', '.join(done) or 'nothing'}"
    if name not in (IMPORTED, *STAGES):
        raise UserError(f"'{stage}': no such stage.{nearest(stage, (*STAGES, *BASE, IMPORTED))} {known}")
    raise UserError(f"{run}: stage {name} is not finished. {known}")


def result_folder(config: Config, init: str, kind: str = "language") -> Path:
    """The folder of a finished stage that `init` names: a stage of this run, another run's stage, or another run, whose
    last model of that kind is taken.

    Raises UserError where that has not finished.
    """
    folder = run_folder(config) / init if init in STAGES else place(resolved(config, init)[0])
    if is_finished(folder):
        return folder
    if init in STAGES:
        raise UserError(
            f"{folder} has no finished result to start from; train that stage first (jaxgpt {init} FILE), "
            f"or set init to another run's stage folder or to {RANDOM}"
        )
    done = finished(folder)
    if done:
        return find_stage(folder, "reward" if kind == "scalar" and "reward" in done else None)
    foreign = f" It is a Hugging Face folder: init={FOREIGN}{init}" if (folder / "config.json").is_file() else ""
    raise UserError(
        f"init={init}: no finished stage there.{nearest(init, STAGES)}{foreign} Stages of this run: {', '.join(STAGES)}"
    )
