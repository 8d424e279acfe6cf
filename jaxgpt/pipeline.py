"""A run from its config: which parts are finished, which go on, and in which order.

Reads and writes the run's folder. Every part is recognised by its inputs: its settings and the fingerprints of what it
starts from.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import yaml
from rich.console import Console

from jaxgpt import hosts
from jaxgpt.config.load import ConfigError, dump
from jaxgpt.config.schema import Config, RolloutConfig, StageConfig
from jaxgpt.data.records import file_hash, read_fields, read_texts
from jaxgpt.data.templates import BUILT_IN
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.data.tokenizer_folder import tokenizer_files
from jaxgpt.data.tokens import is_current, write_tokens
from jaxgpt.data.worlds import is_current as is_current_world
from jaxgpt.data.worlds import write_world
from jaxgpt.errors import UserError
from jaxgpt.evaluate.suite import Suite, read_prompts
from jaxgpt.graders import load_scorer
from jaxgpt.interop.foreign import Foreign
from jaxgpt.mesh import check_batch, make_mesh
from jaxgpt.places import place, write_whole
from jaxgpt.recorded import changes, has_work, refuse, same_inputs, short_hash, stage_inputs
from jaxgpt.report import summary_table, write_report
from jaxgpt.runs import (
    RANDOM,
    STAGES,
    demonstrations,
    finished,
    is_finished,
    is_foreign,
    parents,
    reads_text,
    resolved,
    result_folder,
    run_folder,
)
from jaxgpt.stages import dpo, grpo, onpolicy, ppo, pretrain, rejection, reward, rloo, sft
from jaxgpt.stages.run import Run
from jaxgpt.train.loop import Stage, train

RUNTIME = ("checkpoint", "log_every", "accumulate")
"""Settings of a stage that do not change what comes out of it."""
LOAD = {"sft": sft.load, "reward": reward.load, "dpo": dpo.load} | {
    name: functools.partial(onpolicy.prompt_rows, name=name) for name in ("ppo", "grpo", "rloo", "rejection")
}
MAKE = {
    "pretrain": pretrain.stage,
    "sft": sft.stage,
    "reward": reward.stage,
    "ppo": ppo.stage,
    "dpo": dpo.stage,
    "grpo": grpo.stage,
    "rloo": rloo.stage,
    "rejection": rejection.stage,
}


class Pipeline:
    """The parts of one run."""

    def __init__(self, config: Config, console: Console):
        self.config, self.console = config, console
        self.folder = run_folder(config)

    def everything(self) -> None:
        """All parts that the config has, in order; finished ones are skipped."""
        began = time.monotonic()
        asked = [name for name in STAGES if getattr(self.config, name) is not None]
        if self.config.evaluate is not None and self.config.evaluate.scorer is not None:
            load_scorer(self.config.evaluate.scorer, "evaluate.scorer")
        self.stages(asked, evaluates=self.config.evaluate is not None)
        if self.config.evaluate is not None:
            self.evaluate()
        hosts.lead(lambda: self._report(began))

    def _report(self, began: float) -> None:
        page = write_report(self.folder)
        self.console.print(summary_table(self.folder))
        self.console.print(f"report  {page}   ({time.monotonic() - began:.0f} s)", highlight=False)

    def stages(self, names: list[str], evaluates: bool = False) -> None:
        """Stages in order, with data and tokenizer, once nothing speaks against any of them, nor against evaluating."""
        self.check(names)
        self.prepare()
        tokenizer = self.tokenizer()
        self.check_recorded(names, tokenizer)
        self.check_records(names, tokenizer, evaluates)
        for name in names:
            self.stage(name)

    def one(self, name: str) -> None:
        """One stage, with the data and the tokenizer it needs."""
        self.check([name])
        self.prepare()
        self.stage(name)

    def check(self, names: list[str]) -> None:
        """Raises ConfigError with every batch that the mesh does not divide."""
        mesh, problems = make_mesh(self.config.mesh), []
        for name in names:
            section: StageConfig = getattr(self.config, name)
            try:
                check_batch(mesh, section.batch // section.accumulate, f"{name}.batch / {name}.accumulate")
            except UserError as error:
                problems.append(str(error))
        problems += hosts.left_out(mesh)
        if problems:
            raise ConfigError(problems)

    def check_records(self, names: list[str], tokenizer: Tokenizer, evaluates: bool) -> None:
        """Reads the records of the stages still to come, so that a bad one is told before anything is trained."""
        mesh = make_mesh(self.config.mesh)
        run = Run.open(self.config, tokenizer, mesh)
        for name in names:
            if name in LOAD and not (self.folder / name / "done.json").exists():
                LOAD[name](run, getattr(self.config, name))
        if evaluates and self.config.evaluate is not None:
            read_prompts(self.config, self.config.evaluate, tokenizer, self.config.model.context)

    def check_recorded(self, names: list[str], tokenizer: Tokenizer) -> None:
        """Raises UserError for work that could not be gone on with, so that no stage before it is trained in vain."""
        refused: dict[Path, list[str]] = {}
        for name in names:
            home, starts = self.folder / name, [p for p in parents(self.config, name).values() if p in STAGES]
            if has_work(home):
                gone = [p for p in starts if self.folder / p in refused or not is_finished(self.folder / p)]
                lost = [f"{name} was made from {parent} as it was before" for parent in gone]
                if found := lost or changes(home, self._inputs(name, tokenizer)):
                    refused[home] = found
        refuse(refused)

    def prepare(self) -> None:
        """Makes the data files, where the config asks for that."""
        hosts.lead(self._prepare)

    def _prepare(self) -> None:
        made = self.config.prepare
        if made is None:
            return
        if (self.folder / "data").exists() and not is_current_world(self.folder / "data", made) and self._begun():
            raise UserError(
                f"{self.folder / 'data'} was made with other settings, and stages were trained with it; "
                f"use another name=..., or remove {self.folder}"
            )
        with self.part("prepare"):
            write_world(self.folder / "data", made)

    def _begun(self) -> bool:
        return any(has_work(self.folder / name) for name in STAGES)

    def paths(self, given: str | tuple[str, ...]) -> list[str]:
        """Paths of the config, with {run} put in."""
        return resolved(self.config, given)

    def _keep_config(self) -> None:
        """Writes the resolved config, once nothing speaks against it."""
        if not hosts.first():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "config.yaml", dump(self.config))

    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer: loaded where it is already there, copied from a file of the user's, or trained."""
        hosts.lead(self._make_tokenizer)
        return Tokenizer.load(self.folder / "tokenizer")

    def _make_tokenizer(self) -> None:
        c, home = self.config.tokenizer, self.folder / "tokenizer"
        given = None if c.path is None else place(self.paths(c.path)[0])
        template = None if c.template is None else self.paths(c.template)[0]
        if given is not None:
            inputs = {"path": file_hash(tokenizer_files(given))}
        else:
            inputs = {"settings": c.model_dump(mode="json"), "text": file_hash(self._learned_from())}
        inputs["template"] = template if template in (None, *BUILT_IN) else file_hash([template])
        if same_inputs(home, inputs):
            return
        with self.part("tokenizer"):
            if self._begun():
                raise UserError(
                    f"{home} was made from other settings or text, and stages were trained with it; "
                    f"use another name=..., or remove {self.folder}"
                )
            if given is not None:
                made = Tokenizer.load(given, template)
            else:
                made = train_tokenizer(self._texts(), c.model_copy(update={"template": template}))
            made.save(home)
            write_whole(home / "inputs.json", json.dumps(inputs, indent=1) + "\n")
            self.console.print(f"tokenizer  {made.size} pieces", highlight=False)

    def _learned_from(self) -> list[str]:
        c = self.config
        if c.tokenizer.path_text is not None:
            return self.paths(c.tokenizer.path_text)
        return [path for source in c.data.named.values() for path in self.paths(source.path)]

    def _texts(self) -> Iterator[str]:
        c = self.config
        if c.tokenizer.path_text is not None:
            yield from read_fields(self.paths(c.tokenizer.path_text), c.tokenizer.fields)
        else:
            for source in c.data.named.values():
                yield from read_texts(self.paths(source.path), source.field)

    def tokens(self, tokenizer: Tokenizer) -> None:
        """Token shards of every source of the mixture."""
        hosts.lead(lambda: self._write_tokens(tokenizer))

    def _write_tokens(self, tokenizer: Tokenizer) -> None:
        data = self.config.data
        for name, source in data.named.items():
            paths, home = self.paths(source.path), self.folder / "tokens" / name
            source_hash = file_hash(paths) + source.field
            if is_current(home, tokenizer, source_hash, data):
                continue
            with self.part(f"tokens {name}"):
                texts = read_texts(paths, source.field)
                write_tokens(texts, tokenizer, home, data.val_fraction, data.val_split, source_hash)
            unknown = json.loads((home / "index.json").read_text())["unknown_tokens"]
            if unknown:
                self.console.print(f"tokens {name}: {unknown:,} unknown tokens; set tokenizer.byte_fallback=true")

    def stage(self, name: str) -> None:
        """Trains a stage to its end, unless it is finished from the same inputs."""
        config: StageConfig = getattr(self.config, name)
        home, tokenizer = self.folder / name, self.tokenizer()
        inputs = self._inputs(name, tokenizer)
        if changed := changes(home, inputs):
            refuse({home: changed})
        if stage_inputs(home) == inputs and (home / "done.json").exists():
            self.console.print(f"{name}  finished", highlight=False)
            return
        if reads_text(self.config, name):
            self.tokens(tokenizer)
        mesh = make_mesh(self.config.mesh)
        with jax.set_mesh(mesh):
            run = Run.open(self.config, tokenizer, mesh)
            made: Stage = MAKE[name](run, config)
            hosts.lead(lambda: self._begin(home, inputs))
            meta = run.meta("scalar" if name == "reward" else "language") | run.adapted(name)
            train(made, home, config, meta, self.console)

    def _begin(self, home: Path, inputs: dict[str, Any]) -> None:
        home.mkdir(parents=True, exist_ok=True)
        write_whole(home / "config.yaml", yaml.safe_dump(inputs, sort_keys=False))
        self._keep_config()

    def _inputs(self, name: str, tokenizer: Tokenizer) -> dict[str, Any]:
        config: StageConfig = getattr(self.config, name)
        settings = {k: v for k, v in config.model_dump(mode="json").items() if k not in RUNTIME}
        inputs: dict[str, Any] = {
            "seed": self.config.seed,
            name: settings,
            "model": self.config.model.model_dump(mode="json", exclude={"scan_layers", "remat"}),
            "tokenizer": tokenizer.hash,
        }
        if reads_text(self.config, name):
            data = self.config.data
            inputs["data"] = data.model_dump(mode="json")
            inputs["text"] = {key: short_hash(self.paths(source.path)) for key, source in data.named.items()}
        if settings.get("data"):
            paths = [p for key in ("path", "eval_path") if settings["data"].get(key) for p in [settings["data"][key]]]
            inputs["files"] = [short_hash(self.paths(tuple(p) if isinstance(p, list) else p)) for p in paths]
        if name == "reward" and (shown := demonstrations(self.config)) is not None:
            inputs["demonstrations"] = short_hash(self.paths(shown.path))
        if isinstance(config, RolloutConfig) and config.gold is not None:
            inputs["files"].append(short_hash(self.paths(config.gold.data.path)))
        before = {role: parent for role, parent in parents(self.config, name).items() if parent != RANDOM}
        kinds = {role: "language" if role == "start" else "scalar" for role in before}
        inputs["parents"] = {parent: self.mark(parent, kinds[role]) for role, parent in before.items()}
        return inputs

    def mark(self, parent: str, kind: str = "language") -> str:
        """What tells a stage's starting point from another. Raises UserError where there is none yet."""
        if is_foreign(parent):
            return Foreign.describe(self.paths(parent)[0]).mark()
        done = result_folder(self.config, parent, kind) / "done.json"
        return json.loads(done.read_text(encoding="utf-8"))["fingerprint"]

    def evaluate(self) -> None:
        """Evaluates the finished stages, unless the same ones were evaluated in the same way."""
        c, home = self.config.evaluate, self.folder / "evaluate"
        if c is None:
            raise UserError("the config has no section evaluate")
        inputs = {
            "evaluate": c.model_dump(mode="json"),
            "stages": {name: self.mark(name) for name in finished(self.folder)},
        }
        inputs["files"] = [short_hash(self.paths(given.path)) for given in (c.data, c.exact) if given is not None]
        if same_inputs(home, inputs) and (home / "results.json").exists():
            self.console.print("evaluate  finished", highlight=False)
            return
        with self.part("evaluate"):
            results = Suite(self.folder, self.config, c, self.config.mesh, self.console).run()
            hosts.lead(lambda: self._keep_results(home, results, inputs))

    def _keep_results(self, home: Path, results: dict[str, Any], inputs: dict[str, Any]) -> None:
        home.mkdir(exist_ok=True)
        self._keep_config()
        write_whole(home / "results.json", json.dumps(results, indent=1) + "\n")
        write_whole(home / "inputs.json", json.dumps(inputs, indent=1) + "\n")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Tells how long a part took, and keeps that for the report."""
        began = time.monotonic()
        yield
        spent = time.monotonic() - began
        self.console.print(f"{name}  {spent:.1f} s", highlight=False)
        if not hosts.first():
            return
        book = self.folder / "parts.json"
        known = json.loads(book.read_text()) if book.exists() else {}
        write_whole(book, json.dumps(known | {name: round(known.get(name, 0.0) + spent, 2)}, indent=1) + "\n")
