"""The examination: for every stage of a config its data, some rows, and its numbers at the first step.

Prepares data and tokenizer where they are missing, as any verb does, and writes nothing else into the run's folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator

import jax
from rich.console import Console

from jaxgpt.config.schema import Config, DpoConfig, RewardConfig, RolloutConfig, SftConfig, StageConfig
from jaxgpt.data.prompts import PromptRows, load_prompts
from jaxgpt.data.rankings import load_rankings
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.doctor import common, counts, language, rollout, rows, scores
from jaxgpt.doctor.check import Check, near, none_of, show
from jaxgpt.doctor.trial import Trial, TrialRun, begin, small
from jaxgpt.errors import UserError
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import scalar_model
from jaxgpt.pipeline import MAKE, Pipeline
from jaxgpt.runs import STAGES, is_finished, reads_text, resolved, run_folder

SHOWN = 2
"""Rows of a file that are shown."""


def examine(config: Config, console: Console | None = None) -> int:
    """Prints rows, counts and checks of every stage that the config has; 0 where all hold, else 1.

    Raises UserError for what no stage could begin with: a parent that is named and not there, settings that do not fit.
    """
    console = console or Console()
    console.soft_wrap = not console.is_terminal  # a file or pipe gets one line a check
    asked = [name for name in STAGES if getattr(config, name) is not None]
    pipeline = Pipeline(config, console)
    pipeline.check(asked)
    console.print(f"Data and tokenizer are made in {run_folder(config)} where missing.", highlight=False, markup=False)
    pipeline.prepare()
    tokenizer = pipeline.tokenizer()
    if any(reads_text(config, name) for name in asked):
        pipeline.tokens(tokenizer)
    mesh, book = make_mesh(config.mesh), _Book(console)
    with jax.set_mesh(mesh):
        run = TrialRun.open(config, tokenizer, mesh)
        missing = {name: run.missing(name) for name in asked}
        rows.legend(console)
        if asked != ["pretrain"]:
            book.title("template", tokenizer.template_name)
            book.write([counts.template_writes_one_bos(tokenizer)])
        for name in asked:
            lacking = ", ".join(missing[name])
            book.title(name, f"{lacking} not trained yet: new parameters stand for it" * bool(lacking))
            section: StageConfig = getattr(config, name)
            if book.write(_data(run, name, section, console)):
                book.write(_numbers(run, name, section))
    return book.close()


class _Book:
    """What was checked so far."""

    def __init__(self, console: Console):
        self._console, self._asked, self._failed = console, 0, list[str]()
        self._part = ""

    def title(self, name: str, remark: str) -> None:
        """A new part."""
        self._part = name
        self._console.print()
        self._console.print(f"{name}  {f'({remark})' * bool(remark)}".rstrip(), style="bold", highlight=False)

    def write(self, checks: Iterable[Check]) -> bool:
        """Prints checks as they come; whether the stage could be made, which a UserError says it could not."""
        try:
            for check in checks:
                self._one(check)
        except UserError as error:
            self._one(none_of("the stage cannot begin", 1, str(error)))
            return False
        return True

    def _one(self, check: Check) -> None:
        show(self._console, check)
        self._asked += check.holds is not None
        if check.holds is False:
            self._failed.append(f"{self._part}: {check.name}")

    def close(self) -> int:
        """Prints the sum; the exit code."""
        self._console.print()
        if not self._failed:
            self._console.print(f"All {self._asked} checks hold.", style="bold green", highlight=False)
            return 0
        self._console.print(f"{len(self._failed)} of {self._asked} checks fail:", style="bold red", highlight=False)
        for name in self._failed:
            self._console.print(f"  {name}", highlight=False, markup=False)
        return 1


def _data(run: TrialRun, name: str, section: StageConfig, console: Console) -> Iterator[Check]:
    """Rows and counts of a stage's files."""
    tokenizer = run.tokenizer
    if reads_text(run.config, name):
        yield from _text(run)
    if isinstance(section, SftConfig):
        assert section.data is not None
        fields = (section.data.prompt_field, section.data.completion_field)
        found, bad = counts.read_conversations(run.paths(section.data.path), tokenizer, fields)
        held_out = [] if section.data.eval_path is None else run.paths(section.data.eval_path)
        others, more = counts.read_conversations(held_out, tokenizer, fields) if held_out else ([], [])
        for one in found[:SHOWN]:
            rows.show(console, one.where, rows.runs(tokenizer, one.ids, one.mask))
        yield from counts.count_conversations(found, [*bad, *more], others, tokenizer, section.context)
    elif isinstance(section, RewardConfig | DpoConfig):
        yield from _ranked(run, name, section, console)
    elif isinstance(section, RolloutConfig):
        assert section.data is not None
        prompts = load_prompts(run.paths(section.data.path), tokenizer, counts.NO_LIMIT)
        for where, ids in list(zip(prompts.wheres, prompts.prompts, strict=True))[:SHOWN]:
            rows.show(console, where, rows.runs(tokenizer, ids, [0] * len(ids)))
        yield from counts.count_prompts(
            prompts, _evaluated(run.config, tokenizer), tokenizer, section.prompt_length, name
        )


def _ranked(run: TrialRun, name: str, section: RewardConfig | DpoConfig, console: Console) -> Iterator[Check]:
    assert section.data is not None

    def read(given: str | tuple[str, ...] | None) -> list:
        if given is None:
            return []
        ties = section.ties if isinstance(section, RewardConfig) else "drop"
        return load_rankings(run.paths(given), run.tokenizer, counts.NO_LIMIT, None, name, ties).rankings

    found = read(section.data.path)
    for one in found[:1]:
        for rank, ids, span in sorted(zip(one.ranks, one.ids, one.spans, strict=True), key=lambda part: part[0]):
            rows.show(console, f"{one.where} rank {rank}", rows.runs(run.tokenizer, ids, span))
    yield from counts.count_rankings(found, read(section.data.eval_path), run.tokenizer, section.context, name)


def _evaluated(config: Config, tokenizer: Tokenizer) -> PromptRows | None:
    """The prompts that the models will be evaluated on."""
    if config.evaluate is None or config.evaluate.data is None:
        return None
    return load_prompts(resolved(config, config.evaluate.data.path), tokenizer, counts.NO_LIMIT)


def _text(run: TrialRun) -> Iterator[Check]:
    """What is in the token shards."""
    for name in run.config.data.named:
        index = json.loads((run.folder / "tokens" / name / "index.json").read_text())
        yield Check(
            f"unknown tokens in {name}", f"{index['unknown_tokens']:,}", "0", index["unknown_tokens"] == 0,
            "set tokenizer.byte_fallback=true",
        )  # fmt: skip


def _numbers(run: TrialRun, name: str, section: StageConfig) -> Iterator[Check]:
    """A stage's value made small, and looked at before and after its first update."""
    config = small(section, run.mesh.shape["data"] * run.mesh.shape["fsdp"])
    stage = MAKE[name](run, config)
    try:
        trial = begin(run, name, config, stage)
        figures = {} if name == "reward" else common.first_figures(trial)[0]
        yield common.finite("parameters", trial.params)
        if name == "pretrain":
            yield common.language_loss(trial, figures["nll"])
            yield from language.packing(trial)
        elif name == "sft":
            yield common.language_loss(trial, figures["nll"])
            yield from language.packing(trial)
            yield from _decoding(trial)
        elif name == "reward":
            yield common.reward_loss(trial)
            yield from _scores(trial)
        elif isinstance(config, DpoConfig):
            yield _dpo(trial, config, figures)
        else:
            yield common.finite("reference", stage.source.frozen())
            yield common.finite("reward models", stage.source.judge.params)
            yield from rollout.first_rollout(trial, figures)
            yield from scores.in_rollouts(trial)
        yield from common.still(trial)
    finally:
        stage.close()


def _decoding(trial: Trial) -> Iterator[Check]:
    """Of the finished model where there is one, else of what the stage starts from."""
    params, run = trial.stage.finish(trial.state), trial.run
    if is_finished(run.folder / trial.name):
        params = run.load_language(trial.name)
        yield common.finite(f"finished {trial.name}", params)
    yield language.decoding(trial, params, run.tokenizer.ends)


def _scores(trial: Trial) -> Iterator[Check]:
    """Of the finished reward model where there is one, else of what the stage starts from."""
    run = trial.run
    if is_finished(run.folder / trial.name):
        net, params = run.load_reward(trial.name)
        yield common.finite(f"finished {trial.name}", params)
    else:
        net, params = scalar_model(run.config.model, run.vocab, trial.config.lora), trial.params
    yield from scores.invariance(trial, net, params)


def _dpo(trial: Trial, config: DpoConfig, figures: dict[str, float]) -> Check:
    """The policy is the reference, so no response is preferred yet."""
    ipo = config.loss == "ipo"
    wanted, shown = (0.25 / config.beta**2, "1 / (4 beta^2)") if ipo else (math.log(2), "log 2")
    within = max(1.0, wanted) * (1e-5 if trial.float32 else 0.02)
    return near(
        "loss at init, nats a ranking", figures["loss/dpo" if config.sft_coef else "loss"], wanted, within,
        "reference and policy must begin as one model: set dpo.init to the model that the reference is", shown,
    )  # fmt: skip
