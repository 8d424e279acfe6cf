"""A study of over-optimisation, small: what it leaves, that it goes on where it was, and that its numbers are right."""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_run import CONFIG, load_once, make_run

from jaxgpt.config.schema import Config, MeshConfig, ModelConfig, ProxyConfig
from jaxgpt.errors import UserError
from jaxgpt.evaluate.formulas import best_of_n
from jaxgpt.evaluate.laws import fit
from jaxgpt.overopt import Study
from jaxgpt.pipeline import Pipeline
from jaxgpt.train.loop import Preempted

ASKED = ["What is the cat?", "Tell me a story.", "One day", "Is it black?", "What is the dog?", "Tell me!"]
CALLS: list[str] = []
"""Responses that the gold scorer was asked about; the test that stops a study looks at their number."""
STOP_AT: list[int] = []


def gold(record: dict[str, Any], response: str) -> float:
    """Letters of the first word that is asked for, less half the length."""
    CALLS.append(response)
    if STOP_AT and len(CALLS) == STOP_AT[0]:
        os.kill(os.getpid(), signal.SIGTERM)
    return response.count("a") - len(response) / 16


def settings(tmp_path: Path, **changes: Any) -> Config:
    run = make_run(tmp_path / "tiny")
    for name, asked in (("asked", ASKED[:4]), ("held_out", ASKED[4:])):
        lines = [{"prompt": text, "kind": "asked"} for text in asked] + [{"prompt": "No", "kind": "other"}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    optimizer = {"lr": 3e-3, "warmup": 0.0, "schedule": "constant"}
    study = {
        "policy": str(run / "sft"),
        "gold": {"type": "function", "function": "test_overopt:gold"},
        "kinds": ["asked"],
        "data": {"path": str(tmp_path / "asked.jsonl"), "eval_path": str(tmp_path / "held_out.jsonl")},
        "prompts": 8,
        "responses": 3,
        "proxies": {
            "little": {"width": 16, "heads": 2, "labels": 6, "noise": 0.5},
            "big": {"labels": 9},
        },
        "best_of": [1, 2, 4, 8],
        "samples": 8,
        "eval_samples": 2,
        "batch": 8,
        "reward": {"batch": 2, "context": 48, "optimizer": optimizer},
        "ppo": {
            "prompt_length": 24,
            "response_length": 8,
            "iterations": 3,
            "episodes": 4,
            "batch": 4,
            "epochs": 1,
            "eval_every": 1,
            "checkpoint": {"every": 1},
            "kl": {"coef": 0.0},
            "optimizer": optimizer,
        },
    }
    return Config(
        name="study",
        runs=str(tmp_path),
        mesh=MeshConfig(data=1, fsdp=1, tensor=1),
        tokenizer={"path": str(run / "tokenizer")},
        model=CONFIG,
        overopt={**study, **changes},
    )


def studied(config: Config) -> str:
    """Does the study; what it said."""
    console = Console(file=io.StringIO(), width=200)
    Study(config, Pipeline(config, console)).run()
    return console.file.getvalue()


def results(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.runs) / "study/overopt/results.json").read_text())


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    made = settings(tmp_path_factory.mktemp("study"))
    studied(made)
    return made


@pytest.fixture(scope="module")
def home(config: Config) -> Path:
    return Path(config.runs) / "study/overopt"


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_proxy_is_an_ordinary_run(home):
    for name, width in (("little", 16), ("big", 32)):
        for stage in ("reward", "ppo"):
            assert (home / "proxies" / name / stage / "done.json").is_file()
        assert load_once(home / "proxies" / name / "reward").config.width == width
        assert load_once(home / "proxies" / name / "ppo").config == CONFIG


def test_labels_are_the_policys_own_responses_ranked_by_gold(home):
    samples = records(home / "labels/samples.jsonl")
    assert [line["prompt"] for line in samples] == (ASKED[:4] * 3)[:9]
    assert all(line["gold"] == [gold({}, text) for text in line["responses"]] for line in samples)
    big = records(home / "proxies/big/rankings.jsonl")
    known = {tuple(line["responses"]): line["gold"] for line in samples}
    assert 0 < len(big) <= 9
    for line in big:
        scores = known[tuple(line["responses"])]
        assert np.all(np.sign(np.subtract.outer(scores, scores)) == -np.sign(np.subtract.outer(*[line["ranks"]] * 2)))
    assert [line["responses"] for line in records(home / "proxies/little/rankings.jsonl")] == [
        line["responses"] for line in samples[:6]
    ]


def test_best_of_n_is_what_the_samples_and_the_finished_proxy_say(config, home):
    lines = records(home / "samples/samples.jsonl")
    assert [line["prompt"] for line in lines] == ASKED[4:] and {len(line["tokens"]) for line in lines} == {8}
    golds = np.array([line["gold"] for line in lines])
    for name, found in results(config)["proxies"].items():
        model = load_once(home / "proxies" / name / "reward")
        scores = [model.score_tokens([line["prompt_tokens"] + row for row in line["tokens"]]) for line in lines]
        scores = np.where([line["ended"] for line in lines], scores, -1.0)  # PPO's rule for responses that never end
        assert found["start"]["proxy"] == pytest.approx(np.mean(scores), abs=1e-5)
        for point in found["best_of_n"]["points"]:
            assert point["proxy"] == pytest.approx(np.mean(best_of_n(scores, scores, point["n"])), abs=1e-5)
            assert point["gold"] == pytest.approx(np.mean(best_of_n(scores, golds, point["n"])), abs=1e-5)


def test_ppo_is_measured_at_every_turn_and_the_laws_are_those_of_the_points(config):
    for found in results(config)["proxies"].values():
        points = found["ppo"]["points"]
        assert [point["step"] for point in points] == [0, 1, 2, 3]
        assert points[0]["kl"] == 0.0 and points[-1]["kl"] > 0.0
        gains = np.array([point["gold"] for point in points]) - found["start"]["gold"]
        law = fit("rl", np.sqrt(np.maximum([point["kl"] for point in points], 0.0)), gains)
        assert found["ppo"]["fit"]["alpha"] == pytest.approx(law.alpha)
        assert found["ppo"]["fit"]["r2"] == pytest.approx(law.r2)


def test_the_report_shows_each_proxy_and_law(config):
    page = (Path(config.runs) / "study/report.html").read_text()
    assert all(f"<b>{name}, {method}</b>" in page for name in ("little", "big") for method in ("best-of-n", "PPO"))
    assert page.count("over √KL from 0 to") == 4


def test_what_is_finished_is_not_made_again(config, home):
    before = {path: path.stat().st_mtime_ns for path in home.rglob("params/*")}
    found, calls = results(config), len(CALLS)
    said = studied(config)
    assert said.count("reward  finished") == 2 and said.count("ppo  finished") == 2 and len(CALLS) == calls
    assert {path: path.stat().st_mtime_ns for path in home.rglob("params/*")} == before and results(config) == found


def test_a_stopped_study_goes_on_and_ends_the_same(config, tmp_path):
    again = settings(tmp_path)
    CALLS.clear()
    STOP_AT.append(9 * 3 + 2 * 8 + 2 * 2 * 2)  # labels, samples, the first PPO's start and one measurement
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Preempted, match="ppo: stopped after step 2 of 3"):
            studied(again)
    finally:
        STOP_AT.clear()
        signal.signal(signal.SIGTERM, before)
    assert not (tmp_path / "study/overopt/proxies/little/ppo/done.json").exists()
    studied(again)
    assert results(again)["proxies"] == results(config)["proxies"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval_samples": 3}, r"ppo was made with other inputs.*\n  ppo.gold.responses: 2 -> 3"),
        ({"kinds": ["tales"]}, r"overopt.kinds: .*asked.jsonl has no prompt of kind tales; there are asked, other"),
        ({"batch": 0.5}, "batch"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(config, changes, said):
    with pytest.raises((UserError, ValueError), match=f"(?s){said}"):
        studied(settings(Path(config.runs), **changes))


def test_gold_may_be_a_reward_model(tmp_path):
    made = settings(tmp_path)
    model = {"type": "model", "models": str(tmp_path / "tiny/reward")}
    made = settings(tmp_path, gold=model, proxies={"only": {"labels": 4}})
    studied(made)
    judge = load_once(tmp_path / "tiny/reward")
    for line in records(tmp_path / "study/overopt/samples/samples.jsonl"):
        rows = [line["prompt_tokens"] + row for row in line["tokens"]]
        np.testing.assert_allclose(line["gold"], judge.score_tokens(rows), atol=1e-5)
    measured = results(made)["proxies"]["only"]["ppo"]["points"]
    assert [point["step"] for point in measured] == [0, 1, 2, 3] and all(np.isfinite(p["gold"]) for p in measured)


def test_a_proxy_is_the_policy_in_another_size():
    policy = ModelConfig(
        width=64, attention={"heads": 4, "kv_heads": 2, "head_dim": 8}, mlp={"width": 100}, norm={"type": "layernorm"}
    )
    assert ProxyConfig(labels=5).model(policy) == policy and not ProxyConfig(labels=5).resized
    assert ProxyConfig(layers=1).model(policy) == policy.model_copy(update={"layers": 1})
    narrow = ProxyConfig(width=32).model(policy)
    assert (narrow.head_dim, narrow.kv_heads, narrow.mlp.width, narrow.norm) == (8, 2, None, policy.norm)
    assert ProxyConfig(width=32, heads=2, hidden=48).model(policy).kv_heads == 2
    assert ProxyConfig(width=32, hidden=48).model(policy).hidden == 48
    with pytest.raises(ValueError, match="width 60 is not a multiple of heads 8"):
        ProxyConfig(width=60, heads=8).model(policy)
