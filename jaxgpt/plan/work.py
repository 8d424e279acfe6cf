"""What a stage does: its models, and the programs that are run with them, how large and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from jaxgpt.config.schema import (
    Config,
    DpoConfig,
    GrpoConfig,
    LoraConfig,
    ModelConfig,
    ModelReward,
    PpoConfig,
    PretrainConfig,
    RejectionConfig,
    RewardConfig,
    RolloutConfig,
    StageConfig,
    SupervisedConfig,
)
from jaxgpt.plan.weights import Kind, Weight, weights


@dataclass(frozen=True)
class Model:
    """A model of a stage."""

    role: str
    config: ModelConfig
    vocab: int
    kind: Kind = "language"
    trained: bool = True
    lora: LoraConfig | None = None
    kept: int = 4
    """Bytes of an element of the matrices that are not trained."""
    averaged: bool = False
    """Whether an average of its parameters is kept beside them."""
    head_only: bool = False
    """Whether it is a head on another model's trunk."""

    @cached_property
    def weights(self) -> list[Weight]:
        """Its parameters."""
        found = weights(self.config, self.vocab, self.kind, self.lora)
        return [weight for weight in found if weight.part == "head"] if self.head_only else found

    @cached_property
    def learned(self) -> list[Weight]:
        """Those that are trained."""
        if not self.trained:
            return []
        head = ("adapters", "head") if self.kind == "scalar" else ("adapters",)
        return [weight for weight in self.weights if self.lora is None or weight.part in head]


@dataclass(frozen=True)
class Rows:
    """Rows that a model reads at a time."""

    role: str
    rows: int
    """Over all devices."""
    tokens: int
    """In each, padding included."""
    predicted: int = 0
    """Positions of each whose next token is predicted."""


@dataclass(frozen=True)
class Program:
    """A compiled program of a stage."""

    name: str
    """update; of DPO also reference; of stages over rollouts also sample, measure (policy, critic, reference) and score
    (reward models): the names of `jaxgpt.aot.programs`."""
    kind: Literal["train", "score", "generate"]
    reads: tuple[Rows, ...]
    """Of one part of a batch, or of one chunk of a rollout."""
    parts: int = 1
    """Parts that are read one after the other in it."""
    times: int | None = None
    """How often it runs in the stage; None where that is not known."""
    new: int = 0
    """generate: tokens drawn behind a prompt."""


@dataclass(frozen=True)
class Work:
    """All of a stage."""

    name: str
    models: Mapping[str, Model]
    programs: tuple[Program, ...]
    tokens: int | None
    """That are trained on, padding included; None where that is not known."""
    updates: int | None
    notes: tuple[str, ...] = ()


def vocabulary(config: Config) -> int:
    """Rows of the embeddings: as set, or as a tokenizer of the size that is asked for has them."""
    return config.model.vocab or -(-config.tokenizer.vocab // 128) * 128


def work(config: Config, name: str, rankings: int | None = None, judge: ModelConfig | None = None) -> Work:
    """What the stage of that name does.

    rankings: records of the reward stage's files, where `reward.steps` does not say how long it is.
    judge: the size of reward models and of the critic that begins as one; unset means the run's.
    """
    section: StageConfig = getattr(config, name)
    if isinstance(section, RolloutConfig):
        return _on_policy(config, name, section, judge)
    return _supervised(config, name, section, rankings, judge)


def _supervised(
    config: Config, name: str, section: StageConfig, rankings: int | None, judge: ModelConfig | None
) -> Work:
    vocab, steps, notes = vocabulary(config), getattr(section, "steps", None), ()
    assert isinstance(section, SupervisedConfig | RewardConfig)
    lora = None if isinstance(section, PretrainConfig) else section.lora
    per = section.responses if isinstance(section, RewardConfig | DpoConfig) else 1
    if isinstance(section, RewardConfig):
        policy = Model("reward", judge or config.model, judge.vocab or vocab if judge else vocab, "scalar", lora=lora)
        if steps is None and rankings is not None:
            steps = -(-rankings * section.epochs // section.batch)
        if steps is None:
            notes = ("reward.steps is not set and its files are not there: figures are of one update",)
    else:
        policy = Model("policy", config.model, vocab, lora=lora)
    predicted = 0 if policy.kind == "scalar" else section.context
    rows, parts = section.batch * per // section.accumulate, section.accumulate
    programs = [Program("update", "train", (Rows(policy.role, rows, section.context, predicted),), parts, steps)]
    models = [policy]
    if isinstance(section, DpoConfig):
        if lora is None:
            models.append(Model("reference", config.model, vocab, trained=False))
        read = Rows("policy" if lora else "reference", section.batch * per, section.context, section.context)
        programs.append(Program("reference", "score", (read,), 1, steps))
    if per > 1:
        notes = (*notes, f"every ranking is taken to have {per} responses of {section.context} tokens: the most it may")
    tokens = None if steps is None else steps * section.batch * per * section.context
    return Work(name, {model.role: model for model in models}, tuple(programs), tokens, steps, notes)


def _on_policy(config: Config, name: str, section: RolloutConfig, judge: ModelConfig | None) -> Work:
    models = {model.role: model for model in _roles(config, section, judge)}
    P, N = section.prompt_length, section.response_length
    T, size = P + N, section.rollout_batch or section.episodes
    chunks = section.iterations * (section.episodes // size)
    batch = section.batch // section.accumulate
    update = [Rows("policy", batch, T, N)]
    if "critic" in models and not models["critic"].head_only:
        update.append(Rows("critic", batch, T))
    if isinstance(section, PpoConfig) and section.ptx is not None:
        update.append(Rows("policy", section.ptx.batch // section.accumulate, section.ptx.context, section.ptx.context))
    measured = [Rows("policy", size, T, N)]
    if "critic" in models and not models["critic"].head_only:
        measured.append(Rows("critic", size, T))
    if _reference(section):
        measured.append(Rows("reference" if "reference" in models else "policy", size, T, N))
    judged = [Rows(role, size, T) for role in models if role.startswith("reward")]
    programs = [
        Program("sample", "generate", (Rows("policy", size, P),), 1, chunks, N),
        Program("measure", "score", tuple(measured), 1, chunks),
        *([Program("score", "score", tuple(judged), 1, chunks)] if judged else []),
        Program("update", "train", tuple(update), section.accumulate, section.steps),
    ]
    notes = []
    if judged and judge is None:
        notes.append("reward models are taken to be as large as the policy (judge=NAME says otherwise)")
    if isinstance(section, GrpoConfig) and section.dynamic_sampling:
        notes.append(f"one rollout is counted where up to {1 + section.dynamic_sampling} may be drawn")
    notes.append(f"every response is taken to have {N} tokens: the most it may")
    return Work(name, models, tuple(programs), section.steps * section.batch * T, section.steps, tuple(notes))


def _reference(section: RolloutConfig) -> bool:
    """Whether the policy is compared with where it began."""
    return not (isinstance(section, GrpoConfig | RejectionConfig) and section.kl.coef == 0)


def _roles(config: Config, section: RolloutConfig, judge: ModelConfig | None) -> list[Model]:
    """The models of a stage that learns from its own responses."""
    c, vocab, kept = config.model, vocabulary(config), 2 if section.frozen_dtype == "bfloat16" else 4
    other = judge or c
    rows = vocab if judge is None else judge.vocab or vocab
    averaged = isinstance(section, PpoConfig) and section.ema is not None
    models = [Model("policy", c, vocab, lora=section.lora, averaged=averaged)]
    if isinstance(section, PpoConfig):
        if section.critic == "shared":
            models.append(Model("critic", c, vocab, "scalar", head_only=True))
        else:
            models.append(Model("critic", other, rows, "scalar", lora=section.lora))
    if _reference(section) and section.lora is None:
        models.append(Model("reference", c, vocab, trained=False, kept=kept))
    judges = [folder for term in section.rewards if isinstance(term, ModelReward) for folder in term.folders]
    for number in range(len(judges)):
        role = "reward" if len(judges) == 1 else f"reward {number + 1}"
        models.append(Model(role, other, rows, "scalar", trained=False, kept=kept))
    return models
