"""The study of over-optimisation: labels of a gold score, proxies of it, best-of-n and PPO against each of them
(Gao et al. 2022, arXiv 2210.10760).

Reads and writes the folder `overopt` of a run: prompts.jsonl, held_out.jsonl, samples of the policy in labels/ and
samples/, proxies/<name>/ (an ordinary run with the stages reward and ppo) and results.json. What is there is not made
again.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgpt.advantages import missing_eos
from jaxgpt.api import load
from jaxgpt.config.schema import (
    Config,
    DataConfig,
    FunctionReward,
    GoldConfig,
    ModelReward,
    OveroptConfig,
    Prompts,
    ProxyConfig,
    Rankings,
    TokenizerConfig,
)
from jaxgpt.data.labels import noisy_rankings
from jaxgpt.data.prompts import load_prompts
from jaxgpt.data.records import read_jsonl
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.evaluate.answers import rewards
from jaxgpt.evaluate.best_of import best_of_results
from jaxgpt.evaluate.laws import Form, fit
from jaxgpt.evaluate.replies import Asked, Replies, Sampling, load_language, read_prompts, reply
from jaxgpt.graders import load_scorer
from jaxgpt.mesh import make_mesh
from jaxgpt.pipeline import Pipeline
from jaxgpt.places import write_whole
from jaxgpt.recorded import Inputs, same_inputs, short_hash
from jaxgpt.report import write_report
from jaxgpt.report.collect import read_run
from jaxgpt.runs import RANDOM, STAGES, before_study, is_foreign, resolved, result_folder, run_folder
from jaxgpt.stages.run import Run

FOLDER = "overopt"
LABELLED, HELD_OUT = 1, 2
"""Streams of the policy's samples."""
RANKED = 32
"""Samples of a held-out prompt that make up held-out rankings, at most."""
Lines = list[dict[str, Any]]
"""Records of prompts with "responses" to each, their "tokens" behind the "prompt_tokens", whether they "ended", and
their "gold" scores."""


@dataclasses.dataclass(frozen=True)
class Duel:
    """A proxy and the policy that is optimised against it: two stages of one run, with models of two sizes."""

    proxy: ProxyConfig
    reward: Pipeline
    ppo: Pipeline

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises UserError for work that could not be gone on with."""
        for pipeline, name in ((self.reward, "reward"), (self.ppo, "ppo")):
            pipeline.check([name])
            pipeline.check_recorded([name], tokenizer)


class Study:
    """The parts of a study, each made only where it is not there yet."""

    def __init__(self, config: Config, pipeline: Pipeline):
        assert config.overopt is not None
        self.config, self.pipeline, self.console = config, pipeline, pipeline.console
        self.c: OveroptConfig = config.overopt
        self.home = run_folder(config) / FOLDER
        self.policy = self._path(self.c.policy)

    def run(self) -> None:
        """All of it. Raises UserError for what would stop it later, before anything is trained."""
        if jax.process_count() > 1:
            raise UserError("overopt runs on one host; start it on one alone")
        if isinstance(self.c.gold, FunctionReward):
            load_scorer(self.c.gold.function, "overopt.gold.function")
        self.pipeline.prepare()
        tokenizer = self.pipeline.tokenizer()
        asked, held_out = self._prompts(tokenizer)
        duels = {name: self._duel(name, proxy) for name, proxy in self.c.proxies.items()}
        for duel in duels.values():
            Run.open(duel.reward.config, tokenizer, make_mesh(self.config.mesh))
        self.pipeline.stages(before_study(self.config))
        self._label(asked)
        samples = self._sample(held_out)
        for duel in duels.values():
            duel.check(tokenizer)
        found = {name: self._proxy(name, duel, samples) for name, duel in duels.items()}
        results = {"policy": self.c.policy, "prompts": len(samples), "proxies": found}
        write_whole(self.home / "results.json", json.dumps(results, indent=1) + "\n")
        self.console.print(f"report  {write_report(self.pipeline.folder)}", highlight=False)

    def _path(self, name: str) -> str:
        """A model of the config, named so that it is found from a proxy's run as well."""
        return str(self.pipeline.folder / name) if name in STAGES else resolved(self.config, name)[0]

    def _folder(self, path: str, kind: str = "language") -> Path:
        """Where a finished model lies."""
        return Path(path) if is_foreign(path) else result_folder(self.config, path, kind)

    def _prompts(self, tokenizer: Tokenizer) -> tuple[Asked, Asked]:
        """Writes the prompts that are used to files of their own, and reads them: those of training, and held-out."""
        kinds, found = self.c.kinds, []
        given = {"prompts": (self.c.data.path, None), "held_out": (self.c.data.eval_path, self.c.prompts)}
        for name, (paths, most) in given.items():
            records = [record.value for record in read_jsonl(resolved(self.config, paths))]
            kept = [record for record in records if not kinds or record.get("kind") in kinds]
            if not kept:
                known = ", ".join(sorted({str(record.get("kind")) for record in records}))
                raise UserError(f"overopt.kinds: {paths} has no prompt of kind {' or '.join(kinds)}; there are {known}")
            file = self.home / f"{name}.jsonl"
            _write_jsonl(file, kept[:most])
            load_prompts(file, tokenizer, self.c.ppo.prompt_length, "overopt.ppo.prompt_length")  # told of long ones
            found.append(read_prompts([str(file)]))
        return found[0], found[1]

    def _answered(self, name: str, asked: Asked, file: str, each: int, stream: int) -> Lines:
        """Samples of the policy, `each` for every prompt, with their gold scores; kept in a folder of that name."""
        c, book = self.c, self.home / name
        models = c.gold.folders if isinstance(c.gold, ModelReward) else ()
        inputs: Inputs = {
            "seed": self.config.seed,
            "policy": self.pipeline.mark(self.policy),
            "gold": c.gold.model_dump(mode="json"),
            "gold_models": [self.pipeline.mark(self._path(model), "scalar") for model in models],
            "file": short_hash([str(self.home / file)]),
            "prompts": len(asked),
            "each": each,
            "temperature": c.ppo.temperature,
            "response_length": c.ppo.response_length,
            "batch": c.batch,
        }
        if not same_inputs(book, inputs):
            (book / "inputs.json").unlink(missing_ok=True)
            with self.pipeline.part(f"overopt {name}"):
                _write_jsonl(book / "samples.jsonl", self._ask(asked, each, stream))
            write_whole(book / "inputs.json", json.dumps(inputs, indent=1) + "\n")
        return [record.value for record in read_jsonl(book / "samples.jsonl")]

    def _ask(self, asked: Asked, each: int, stream: int) -> Lines:
        c, repeated = self.c, asked.times(each)
        model = load_language(self._folder(self.policy), self.config.mesh)
        # a batch has one row more, of the longest prompt
        sampling = Sampling(c.ppo.response_length, c.ppo.temperature, max(c.batch - 1, 1), self.config.seed)
        replies = reply(model, repeated, sampling, stream)
        gold = self._gold(repeated, replies)
        lines = []
        for number, record in enumerate(asked.records):
            part = slice(number * each, (number + 1) * each)
            responses = replies.answers.responses[part]
            kept = {"responses": replies.texts[part], "gold": gold[part].tolist()}
            kept |= {"prompt_tokens": list(map(int, replies.answers.prompts[number * each]))}
            kept |= {"tokens": [one.tokens for one in responses], "ended": [one.ended for one in responses]}
            lines.append({**record, **kept})
        return lines

    def _gold(self, asked: Asked, replies: Replies) -> np.ndarray:
        """The score that counts, of a response to each prompt."""
        gold = self.c.gold
        if isinstance(gold, FunctionReward):
            scorer = load_scorer(gold.function, "overopt.gold.function")
            pairs = zip(asked.records, replies.texts, strict=True)
            return gold.weight * np.array([scorer(record, text) for record, text in pairs])
        models = [load(self._folder(self._path(name), "scalar"), mesh=self.config.mesh) for name in gold.folders]
        found = np.stack([rewards(model, replies.answers, self.c.batch) for model in models])
        return gold.weight * (found.min(axis=0) if gold.combine == "worst" else found.mean(axis=0))

    def _label(self, asked: Asked) -> None:
        """The samples that labellers rank, and each proxy's rankings of them."""
        most = max(proxy.labels for proxy in self.c.proxies.values())
        lines = self._answered("labels", asked.taken(most), "prompts.jsonl", self.c.responses, LABELLED)
        for name, proxy in self.c.proxies.items():
            ranked = noisy_rankings(lines[: proxy.labels], proxy.noise, self.config.seed)
            _write_jsonl(self.home / "proxies" / name / "rankings.jsonl", _plain(ranked))

    def _sample(self, asked: Asked) -> Lines:
        """The samples that best-of-n chooses from, and held-out rankings of some of them by the gold score alone."""
        lines, size = self._answered("samples", asked, "held_out.jsonl", self.c.samples, HELD_OUT), self.c.responses
        groups = [
            {**line, **{key: line[key][at : at + size] for key in ("responses", "gold")}}
            for line in lines
            for at in range(0, min(self.c.samples, RANKED) - size + 1, size)
        ]
        _write_jsonl(self.home / "rankings.jsonl", _plain(noisy_rankings(groups, 0.0, self.config.seed)))
        return lines

    def _duel(self, name: str, proxy: ProxyConfig) -> Duel:
        """The run of a proxy. Its model is the policy's; the reward stage has one of the proxy's size."""
        c, home = self.c, self.home / "proxies"
        start = proxy.init or (RANDOM if proxy.resized else c.policy)
        reward = {
            "init": start if start == RANDOM else self._path(start),
            "data": Rankings(path=str(home / name / "rankings.jsonl"), eval_path=str(self.home / "rankings.jsonl")),
            "responses": c.responses,
            "epochs": proxy.epochs or c.reward.epochs,
            "optimizer": c.reward.optimizer.model_copy(update={"lr": proxy.lr or c.reward.optimizer.lr}),
        }
        gold = c.gold
        if isinstance(gold, ModelReward):
            gold = gold.model_copy(update={"models": tuple(self._path(model) for model in gold.folders)})
        held_out = Prompts(path=str(self.home / "held_out.jsonl"))
        ppo = {
            "init": self.policy,
            "data": Prompts(path=str(self.home / "prompts.jsonl")),
            "rewards": (ModelReward(models="reward"),),
            "gold": GoldConfig(data=held_out, rewards=(gold,), prompts=c.prompts, responses=c.eval_samples),
        }
        config = Config(
            name=name,
            runs=str(home),
            seed=self.config.seed,
            mesh=self.config.mesh,
            data=self.config.data if c.ppo.ptx is not None else DataConfig(),
            tokenizer=TokenizerConfig(path=str(self.pipeline.folder / "tokenizer")),
            model=self.config.model,
            reward=c.reward.model_copy(update=reward),
            ppo=c.ppo.model_copy(update=ppo),
        )
        resized = config.model_copy(update={"model": proxy.model(config.model)})
        return Duel(proxy, Pipeline(resized, self.console), Pipeline(config, self.console))

    def _proxy(self, name: str, duel: Duel, samples: Lines) -> dict[str, Any]:
        """One proxy: its reward model, best-of-n and PPO against it, and what they came to."""
        self.console.print(f"overopt {name}", highlight=False)
        duel.reward.stage("reward")
        scores = self._scores(duel.reward.folder / "reward", samples)
        gold = np.array([line["gold"] for line in samples])
        start = {"proxy": float(np.mean(scores)), "gold": float(np.mean(gold))}
        bon = best_of_results(self.c.best_of, scores, gold, np.full(gold.shape, np.nan))
        duel.ppo.stage("ppo")
        found = read_run(duel.ppo.folder).stages
        kept = {"kl": "kl", "proxy": "score", "gold": "gold", "gold_error": "gold_error"}
        ppo = [{"step": 0, "kl": 0.0, **start}]
        ppo += [
            {"step": line["step"]} | {key: line["eval"][figure] for key, figure in kept.items()}
            for line in found["ppo"].evals
        ]
        return {
            "params": (found["reward"].done or {})["params"],
            "labels": duel.proxy.labels,
            "noise": duel.proxy.noise,
            "accuracy": found["reward"].measured("accuracy"),
            "start": start,
            "best_of_n": {"points": bon, "fit": _law("bon", bon, start["gold"])},
            "ppo": {"points": ppo, "fit": _law("rl", ppo, start["gold"])},
        }

    def _scores(self, proxy: Path, samples: Lines) -> np.ndarray:
        """The proxy's scores of the samples as PPO sees them, by its rule for responses that never end, [M, S]."""
        model, missing = load(proxy, mesh=self.config.mesh), self.c.ppo.missing_eos
        rows = [[*line["prompt_tokens"], *tokens] for line in samples for tokens in line["tokens"]]
        parts = range(0, len(rows), self.c.batch)
        found = np.concatenate([model.score_tokens(rows[at : at + self.c.batch]) for at in parts])
        ended = np.concatenate([line["ended"] for line in samples])
        return np.asarray(missing_eos(found, ended, missing.how, missing.value)).reshape(len(samples), -1)


def _law(form: Form, points: list[dict[str, Any]], start: float) -> dict[str, float | None] | None:
    """The law of the gold score's gain over `start`; None where there are too few points for one."""
    d = np.sqrt(np.maximum([point["kl"] for point in points], 0.0))
    if len(np.unique(d[d > 0])) < 2:
        return None
    found = fit(form, d, np.array([point["gold"] for point in points]) - start)
    return {"alpha": found.alpha, "beta": found.beta, "r2": found.r2, "peak": found.peak}


def _plain(rankings: Lines) -> Lines:
    """Without what only the study needs."""
    return [{key: line[key] for key in line if key not in ("prompt_tokens", "tokens", "ended")} for line in rankings]


def _write_jsonl(path: Path, lines: Lines) -> None:
    """Writes records whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
