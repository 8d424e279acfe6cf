"""All evaluations of a run's finished stages, gathered for evaluate/results.json.

Reads the run's folder and the clock.
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from jaxgpt.api import Model, load
from jaxgpt.config.schema import Config, EvaluateConfig, MeshConfig
from jaxgpt.data.chat import render
from jaxgpt.data.prompts import PromptRows, load_prompts
from jaxgpt.data.rankings import load_split
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluate.answers import (
    Answers,
    answer,
    asked_by_kind,
    exact_by_kind,
    few_shot_prompt,
    gold_scores,
    kl_from,
    mean_by_kind,
    rewards,
    win_rate,
)
from jaxgpt.evaluate.rewards import reward_report, score_pairs
from jaxgpt.graders import GRADES, check_record, grader, load_scorer
from jaxgpt.runs import ALIGNED, STAGES, is_finished, resolved


class Asked(NamedTuple):
    """The prompts of an evaluation."""

    scored: PromptRows
    """Those whose responses are scored."""
    exact: PromptRows
    """Those whose responses are compared with an answer."""


def read_prompts(config: Config, evaluate: EvaluateConfig, tokenizer: Tokenizer, context: int) -> Asked:
    """Reads the prompt files. Raises UserError naming the record, or sample, that leaves no room for a response."""
    room, limit = context - evaluate.max_tokens, "model.context - evaluate.max_tokens"

    def rows(path: str | tuple[str, ...]) -> PromptRows:
        return load_prompts(resolved(config, path), tokenizer, room, limit)

    assert evaluate.data is not None
    for number, sample in enumerate(evaluate.samples):
        asked = render(tokenizer, [{"role": "user", "content": sample}], add_generation_prompt=True)[0]
        shots = few_shot_prompt(evaluate.few_shot, sample) if evaluate.few_shot else ""
        length = max(len(asked), len(tokenizer.prefix) + len(tokenizer.encode(shots)))
        if length > room:
            how = "with evaluate.few_shot before it, " if length > len(asked) else ""
            raise UserError(f"evaluate.samples[{number}]: {how}{length} tokens, {limit} is {room}; shorten it")
    scored = rows(evaluate.data.path)
    exact = scored if evaluate.exact is None else rows(evaluate.exact.path)
    for where, record in zip(exact.wheres, exact.records, strict=True):
        if record.get("answer") is not None:
            check_record(GRADES[evaluate.grade], "evaluate.grade", where, record)
    return Asked(scored, exact)


class Suite:
    """The evaluations of one run."""

    def __init__(self, folder: Path, config: Config, evaluate: EvaluateConfig, mesh: MeshConfig, console: Console):
        self.folder, self.config, self.c, self.console = folder, config, evaluate, console
        self.models = {name: load(folder / name, mesh=mesh) for name in STAGES if is_finished(folder / name)}
        if not self.models:
            raise UserError(f"{folder}: no stage is finished, so there is nothing to evaluate; train one first")
        model = next(iter(self.models.values()))
        self.asked, self.exact = read_prompts(config, evaluate, model.tokenizer, model.config.context)
        self.right = grader(GRADES[evaluate.grade], "evaluate.grade")
        self.scorer = load_scorer(evaluate.scorer, "evaluate.scorer") if evaluate.scorer is not None else None

    def run(self) -> dict[str, Any]:
        """Everything, as JSON."""
        began = time.monotonic()
        results: dict[str, Any] = {"prompts": len(self.asked), "exact_prompts": asked_by_kind(self.exact.records)}
        results["stages"] = {}
        if "pretrain" in self.models:
            results["base_chat_exact"] = self._exact(self.models["pretrain"])
            if self.c.few_shot:
                results["stages"]["base"] = {"exact": self._few_shot_exact(self.models["pretrain"])}
        gold: dict[str, np.ndarray] = {}
        for name in self._assistants():
            self.console.print(f"evaluate {name}", highlight=False)
            results["stages"][name], gold[name] = self._assistant(name)
            if name != "sft" and "sft" in gold and self.scorer is not None:
                results["stages"][name]["win_rate_vs_sft"] = win_rate(gold[name], gold["sft"])
        if "reward" in self.models and self.config.reward is not None:
            results["reward"] = self._reward(self.models["reward"])
        results["samples"] = self._samples()
        return results | {"seconds": round(time.monotonic() - began, 2)}

    def _assistants(self) -> list[str]:
        """The SFT model, and what came of it."""
        return [name for name in ("sft", *ALIGNED) if name in self.models]

    def _exact(self, model: Model) -> dict[str, float]:
        answers = answer(model, self.exact.prompts, self.c.max_tokens, 0.0, self.c.batch, 0)
        return exact_by_kind(self.exact.records, answers.responses, self.right)

    def _few_shot_exact(self, model: Model) -> dict[str, float]:
        """The base model asked in the form of a document: the first sentence of its continuation counts."""
        records = [r for r in self.exact.records if r.get("answer") is not None and isinstance(r.get("prompt"), str)]
        prompts = [few_shot_prompt(self.c.few_shot, record["prompt"]) for record in records]
        responses = []
        for at in range(0, len(prompts), self.c.batch):
            part = prompts[at : at + self.c.batch]
            responses += model.generate(part, self.c.max_tokens, 0.0, stop=("Question:", "\n"))
        return exact_by_kind(records, responses, self.right)

    def _assistant(self, name: str) -> tuple[dict[str, Any], np.ndarray]:
        model, c = self.models[name], self.c
        found: dict[str, Any] = {"exact": self._exact(model)}
        answers = answer(model, self.asked.prompts, c.max_tokens, c.temperature, c.batch, self.config.seed + 1)
        scores = np.zeros(len(self.asked))
        if self.scorer is not None:
            scores = gold_scores(self.scorer, self.asked.records, answers.responses)
            found["gold"] = float(np.mean(scores))
            found["gold_by_kind"] = mean_by_kind(self.asked.records, scores)
        if "reward" in self.models:
            found["reward"] = float(np.mean(rewards(self.models["reward"], answers, c.batch)))
        found["eos_rate"] = float(np.mean([response.ended for response in answers.responses]))
        found["length"] = float(np.mean([len(response.tokens) for response in answers.responses]))
        if name != "sft" and "sft" in self.models:
            found["kl"] = self._kl(answers)
        return found, scores

    def _kl(self, answers: Answers) -> float:
        return kl_from(self.models["sft"], answers, self.c.temperature, self.c.batch)

    def _reward(self, model: Model) -> dict[str, Any]:
        c = self.config.reward
        if c is None or c.data is None or not c.data.measured:
            return {}
        resolve = functools.partial(resolved, self.config)
        _, rows = load_split(c.data, resolve, model.tokenizer, c.context, c.responses, "reward", c.ties)
        assert rows is not None
        return reward_report(score_pairs(model, rows, self.c.batch), model.gain)

    def _samples(self) -> list[dict[str, str]]:
        prompts, c = list(self.c.samples), self.c
        if not prompts:
            return []
        columns: dict[str, list[str]] = {"prompt": prompts}
        base = self.models.get("pretrain")
        if base is not None:
            columns["base"] = [r.text for r in base.generate(prompts, c.max_tokens, c.temperature, 0)]
            if c.few_shot:
                asked = [few_shot_prompt(c.few_shot, prompt) for prompt in prompts]
                found = base.generate(asked, c.max_tokens, 0.0, stop=("Question:", "\n"))
                columns["base_few_shot"] = [r.text for r in found]
        talks = [[{"role": "user", "content": prompt}] for prompt in prompts]
        for name in self._assistants():
            columns[name] = self.models[name].chat(talks, c.max_tokens, 0.0)
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
