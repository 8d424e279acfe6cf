"""Our side of the comparison with TRL: one tiny LLaMA, its data, and our stages on them, step by step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml
from tiny_run import random_params

from jaxgpt.config.options import Export
from jaxgpt.config.schema import AttentionConfig, Config, MeshConfig, ModelConfig, TokenizerConfig
from jaxgpt.data.chat import render
from jaxgpt.data.mixture import single
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.exchange import export
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import language_model
from jaxgpt.models.net import Params
from jaxgpt.pipeline import MAKE
from jaxgpt.stages import sft
from jaxgpt.stages.run import Run
from jaxgpt.train.checkpoint import save_params
from jaxgpt.train.loop import Stage
from jaxgpt.train.state import initial_state
from jaxgpt.train.step import make_step

STEPS, UPDATES = 20, 4
CONTEXT = 96
PROMPT, RESPONSE, GROUP = 32, 12, 4
TEMPERATURE = 0.9
LIKELY_END = 2.0
"""What the end token has more of it: some responses end, and some do not."""
VOCAB = 64
COMMON = 2.0
"""What all tokens share in one dimension and the padding token is against, so that it is never sampled: transformers
learns nothing of that token where it is read, and TRL's PPO takes it for the end."""
MODEL = ModelConfig(vocab=VOCAB, width=32, layers=2, context=128, attention=AttentionConfig(heads=4, kv_heads=2))
"""The vocabulary is the tokenizer's: rows that only fill an embedding up are not exported, and would count here."""
OPTIMIZER = {"lr": 1e-3, "schedule": "linear", "warmup": 0.0, "final": 1 / STEPS, "weight_decay": 0.1}
"""The last rate is 1/20 of the first: so falls TRL's, whose line ends at 0 one step later."""
STEADY = {**OPTIMIZER, "schedule": "constant"}
PRESET = yaml.safe_load((Path(__file__).parents[2] / "configs/ppo/trl.yaml").read_text())
PPO_OPTIMIZER = {**PRESET["optimizer"], **STEADY}
DISCOUNT = 0.99
"""In place of the preset's 1, so that it counts."""
GRADED = [{"type": "function", "function": "trl_reward:score"}]
WORDS = ("a", "the", "cat", "dog", "owl", "moon", "hat", "saw", "met", "has", "eats", "red", "old", "and", "is", "so")
Record = dict[str, Any]


def said(rng: Random, low: int, high: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(low, high))) + "."


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversations(tokenizer: Tokenizer, count: int) -> list[Record]:
    """Talks of one to three turns, so long that any two of them fit a row and no three do."""
    rng, found = Random(0), []
    while len(found) < count:
        talk = [turn("system", said(rng, 2, 4))] if rng.random() < 0.3 else []
        for _ in range(rng.randrange(1, 4)):
            talk += [turn("user", said(rng, 2, 9)), turn("assistant", said(rng, 1, 16))]
        if CONTEXT // 3 < len(render(tokenizer, talk)[0]) - 1 <= CONTEXT // 2:
            found.append({"messages": talk})
    return found


def pairs(count: int) -> list[Record]:
    """Preferences; every third prompt has an answer of the assistant's in it."""
    rng, found = Random(1), []
    for number in range(count):
        prompt = [turn("user", said(rng, 2, 9))]
        if number % 3 == 0:
            prompt += [turn("assistant", said(rng, 1, 9)), turn("user", said(rng, 2, 9))]
        chosen, rejected = ([turn("assistant", said(rng, 1, 16))] for _ in range(2))
        found.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def prompts(count: int) -> list[Record]:
    rng = Random(2)
    return [{"prompt": [turn("user", f"{said(rng, 1, 5)} {number}")]} for number in range(count)]


class Learned(NamedTuple):
    """The first steps of a stage."""

    reports: list[dict[str, float]]
    """The figures of every update."""
    batch: dict[str, np.ndarray]
    """What the first update learned from."""
    figures: dict[str, float]
    """Of what was drawn for it: of the rollout, where there is one."""


@dataclasses.dataclass
class Ours:
    """The run, and what it exported."""

    home: Path
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    data: dict[str, list[Record]]

    @classmethod
    def make(cls, home: Path) -> Ours:
        """Writes data, a tokenizer, an SFT model, a policy that has gone on from it, a reward model; exports them."""
        run = home / "peers"
        run.mkdir(parents=True)
        rng = Random(3)
        tokenizer = train_tokenizer(
            [said(rng, 5, 20) for _ in range(400)], TokenizerConfig(vocab=VOCAB, byte_fallback=False)
        )
        tokenizer.save(run / "tokenizer")
        data = {"sft": conversations(tokenizer, 8 * STEPS), "pairs": pairs(4 * STEPS), "prompts": prompts(8)}
        for name, records in data.items():
            (run / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        ours = cls(home, Tokenizer.load(run / "tokenizer"), make_mesh(MeshConfig(data=1, fsdp=1, tensor=1)), data)
        with jax.set_mesh(ours.mesh):
            net = language_model(MODEL, ours.run().vocab)
            start = random_params(net, 0)
            embed_VD = np.array(start["backbone"]["embed_VD"])
            embed_VD[:, 0] = COMMON
            embed_VD[tokenizer.eos, 0] = COMMON + LIKELY_END
            embed_VD[tokenizer.pad, 0] = -COMMON
            start["backbone"]["embed_VD"] = jax.numpy.asarray(embed_VD)
            ours.save("sft", start)
            moved = random_params(net, 1)
            ours.save("dpo", jax.tree.map(lambda a, b: a + 0.02 * b, start, moved))
            ours.save("reward", ours.stage("reward").init())
        for stage in ("sft", "dpo", "reward"):
            export(run, home / "exported" / stage, Export(stage=stage))
        return ours

    def config(self, **changes: Record) -> Config:
        """All methods; `changes` are laid over the sections of their names."""
        rows = {"batch": 4, "steps": STEPS, "context": CONTEXT, "optimizer": OPTIMIZER}
        asked = {
            "data": {"path": "{run}/prompts.jsonl"},
            "iterations": 1,
            "episodes": 4 * GROUP,
            "batch": 4 * GROUP,
            "epochs": UPDATES,
            "prompt_length": PROMPT,
            "response_length": RESPONSE,
            "temperature": TEMPERATURE,
            "optimizer": STEADY,
        }
        sections: dict[str, Any] = {
            "sft": {**rows, "data": {"path": "{run}/sft.jsonl"}, "init": "random"},
            "reward": {**rows, "data": {"path": "{run}/pairs.jsonl"}},
            "dpo": {**rows, "data": {"path": "{run}/pairs.jsonl"}, "init": "sft"},
            "grpo": {**asked, "responses": GROUP, "missing_eos": {"how": "keep"}, "rewards": GRADED},
            "ppo": {**PRESET, **asked, "gamma": DISCOUNT, "optimizer": PPO_OPTIMIZER},
        }
        for name, values in changes.items():
            sections[name] = sections[name] | values
        return Config(name="peers", runs=str(self.home), model=MODEL, **sections)

    def run(self, **changes: Record) -> Run:
        return Run.open(self.config(**changes), self.tokenizer, self.mesh)

    def stage(self, name: str, **settings: Any) -> Stage:
        run = self.run(**{name: settings})
        return MAKE[name](run, getattr(run.config, name))

    def save(self, name: str, params: Params) -> None:
        """Parameters in the place of a trained stage."""
        folder, kind = self.home / "peers" / name, "scalar" if name == "reward" else "language"
        mark = save_params(folder / "params", params, self.run().meta(kind))
        (folder / "done.json").write_text(json.dumps({"fingerprint": mark}))

    def exported(self, name: str) -> str:
        return str(self.home / "exported" / name)

    def drawn(self, name: str) -> list[Record]:
        """The records of a stage's first steps, in the order in which it takes them."""
        if name != "sft":
            records = self.data["pairs"]
            order = single(records, 0).order
            return [records[int(order[n])] for n in range(4 * STEPS)]
        rows, _ = sft.load(self.run(), self.config().sft)
        order = single(rows, 0).order
        members = [rows.members[int(order[n])] for n in range(4 * STEPS)]
        assert {len(row) for row in members} == {2}
        return [self.data["sft"][number] for row in members for number in row]

    def learned(
        self, name: str, settings: Record | None = None, policy: str | None = None, steps: int = STEPS
    ) -> Learned:
        """The first steps of a stage.

        With `policy`, that stage's parameters are in the place of the first policy: the reference is another model.
        """
        with jax.set_mesh(self.mesh):
            stage = self.stage(name, **(settings or {}))
            state = jax.jit(lambda params: initial_state(params, stage.tx, _extras(stage)))(stage.init())
            if policy is not None:
                state = state.replace(params={**state.params, "policy": self.run().load_language(policy)})
            step, frozen, first, reports = make_step(stage.loss, stage.tx, stage.schedule), stage.frozen(), None, []
            for n in range(steps):
                drawn = stage.source(n, state)
                first = first or jax.device_get((drawn.batch, dict(drawn.metrics)))
                state, report = step(state.replace(extras=drawn.extras), drawn.batch, frozen)
                reports.append({name: float(value) for name, value in report.items()})
            stage.close()
        assert first is not None
        return Learned(reports, first[0], {name: float(value) for name, value in first[1].items()})

    def episodes(self, batch: Record) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of prompts and responses, without padding."""
        asked = [
            [int(token) for token, real in zip(tokens[:PROMPT], segments[:PROMPT], strict=True) if real]
            for tokens, segments in zip(batch["tokens"], batch["segments"], strict=True)
        ]
        lengths = batch["mask"].sum(axis=1).astype(int)
        answers = [row[PROMPT : PROMPT + n].tolist() for row, n in zip(batch["tokens"], lengths, strict=True)]
        assert not any(self.tokenizer.pad in answer for answer in answers)
        return asked, answers


def _extras(stage: Stage) -> dict[str, jax.Array]:
    return {name: jax.numpy.float32(value) for name, value in stage.extras.items()}
