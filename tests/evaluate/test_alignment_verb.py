"""`jaxgpt eval RUN against=... best_of=... frontier=...` on tiny models: what is written is what the models say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from local_judge import LocalJudge, serving
from tiny_run import load_once, make_run

from jaxgpt.cli import main
from jaxgpt.evaluate.formulas import bon_kl

PROMPTS = [
    {"prompt": "What is the cat?", "kind": "fact", "answer": "It is black."},
    {"prompt": "Tell me a story.", "kind": "story", "answer": None},
    {"messages": [{"role": "user", "content": "a dog"}], "kind": "story"},
]
LENGTH = "length_judge:score"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("alignment")
    run = make_run(home / "runs" / "tiny")
    (run / "pretrain" / "checkpoints").mkdir()
    (home / "ask.jsonl").write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    (home / "length_judge.py").write_text("def score(record, response):\n    return len(response)\n")
    return home


@pytest.fixture
def evaluate(home, monkeypatch, capsys):
    """Runs the verb in the folder `home`; gives its exit code and what it printed."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*words: str, max_tokens: int = 6) -> tuple[int, str, str]:
        settings = [f"max_tokens={max_tokens}", "batch=4", "mesh.fsdp=1"]
        code = main(["eval", *words, *settings])
        return code, *capsys.readouterr()

    return run


def written(home: Path, name: str) -> dict:
    return json.loads((home / "runs/tiny/evaluate" / name).read_text())


def test_a_function_judges_two_models(home, evaluate):
    code, out, err = evaluate("runs/tiny/sft", "against=runs/tiny/pretrain", "prompts=ask.jsonl", f"judge={LENGTH}")
    assert code == 0, err
    assert "runs/tiny/sft against runs/tiny/pretrain, judged by length_judge:score" in out
    found = written(home, "sft-against-pretrain-by-score.json")
    lines = [
        json.loads(line)
        for line in (home / "runs/tiny/evaluate/sft-against-pretrain-by-score.jsonl").read_text().splitlines()
    ]
    assert [line.get("prompt", line.get("messages")) for line in lines] == [
        "What is the cat?",
        "Tell me a story.",
        PROMPTS[2]["messages"],
    ]
    won = {"ours": 0, "tie": 0, "theirs": 0}
    for line in lines:
        ours, theirs = len(line["ours"]), len(line["theirs"])
        assert line["scores"] == [ours, theirs]
        won["ours" if ours > theirs else "theirs" if theirs > ours else "tie"] += 1
    assert (found["wins"], found["ties"], found["losses"]) == tuple(won.values()) and found["prompts"] == 3
    assert set(found["by_kind"]) == {"fact", "story"} and found["measure"] == "win_rate"
    assert found["against"] == "runs/tiny/pretrain" and found["prompt_files"] == ["ask.jsonl"] and found["seed"] == 0
    again = evaluate("runs/tiny/sft", "against=runs/tiny/pretrain", "prompts=ask.jsonl", f"judge={LENGTH}")
    assert again[0] == 0 and written(home, "sft-against-pretrain-by-score.json") == found


def test_a_server_judges_in_both_orders(home, evaluate, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "s3cret")
    with serving(LocalJudge(lambda asked, a, b: "A" if len(a) > len(b) else "B" if len(b) > len(a) else "C")) as judge:
        words = ("runs/tiny/sft", "against=runs/tiny/pretrain", "prompts=ask.jsonl", f"judge={judge.address}")
        code, out, err = evaluate(*words, "judge_key=JUDGE_KEY", "out=told")
        assert code == 0, err
    by_server = json.loads((home / "told/sft-against-pretrain-by-tiny-judge.json").read_text())
    evaluate(*words[:3], f"judge={LENGTH}")
    by_length = written(home, "sft-against-pretrain-by-score.json")
    shared = ("wins", "ties", "losses", "by_kind", "length")
    assert {key: by_server[key] for key in shared} == {key: by_length[key] for key in shared}
    assert by_server["asked_twice"]["flipped"] == 0 and by_server["judge"] == f"tiny-judge at {judge.address}"
    assert len(judge.asked) == 2 * by_server["asked_twice"]["compared"] and judge.keys[0] == "Bearer s3cret"
    assert "asked in both orders: 0 of" in out and "s3cret" not in json.dumps(by_server) + out


def test_a_reward_model_judges_the_tokens_that_were_sampled(home, evaluate):
    code, _, err = evaluate(
        "runs/tiny/sft", "against=runs/tiny/pretrain", "prompts=ask.jsonl", "judge=runs/tiny", "seed=3"
    )
    assert code == 0, err
    lines = [
        json.loads(line)
        for line in (home / "runs/tiny/evaluate/sft-against-pretrain-by-tiny-reward.jsonl").read_text().splitlines()
    ]
    found = written(home, "sft-against-pretrain-by-tiny-reward.json")
    assert found["judge"] == "runs/tiny/reward"
    assert found["scores"]["ours"]["mean"] == pytest.approx(np.mean([line["scores"][0] for line in lines]))
    model = load_once(home / "runs/tiny/reward")
    ended = [line for line in lines if len(line["ours"]) and found["ended"]["ours"] == 1.0]
    for line in ended:  # rendered with its end, as text that has one
        talk = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
        said = model.score([[*talk, {"role": "assistant", "content": line["ours"]}]])[0]
        assert line["scores"][0] == pytest.approx(said, abs=1e-3)


def test_several_models_are_rated(home, evaluate):
    words = ("against=runs/tiny/pretrain,runs/tiny/sft", "prompts=ask.jsonl", f"judge={LENGTH}")
    code, out, err = evaluate("runs/tiny/sft", *words)
    assert code == 0, err
    found = written(home, "sft-ratings-by-score.json")
    assert found["measure"] == "ratings" and ("ratings (mean 1000" in out)
    assert found["ratings"] or found["reason"]


def test_best_of_n_is_estimated_from_the_same_responses(home, evaluate):
    words = ("best_of=1,2,4", "samples=5", "proxy=runs/tiny", f"judge={LENGTH}", "prompts=ask.jsonl")
    code, out, err = evaluate("runs/tiny/sft", *words)
    assert code == 0, err
    found = written(home, "sft-best-of-by-tiny-reward.json")
    assert [point["n"] for point in found["curve"]] == [1, 2, 4] and found["samples"] == 5
    assert [point["kl"] for point in found["curve"]] == [bon_kl(n) for n in (1, 2, 4)]
    proxy = [point["proxy"] for point in found["curve"]]
    assert proxy == sorted(proxy) and proxy[0] < proxy[-1]
    assert [one["prompts"] for one in found["pass_at_k"]] == [1, 1, 1] and "pass@n" in out


def test_pass_at_k_needs_no_proxy(home, evaluate):
    code, _, err = evaluate(
        "runs/tiny/sft", "best_of=1,2", "prompts=ask.jsonl", "limit=1", "out=told", "temperature=0.5"
    )
    assert code == 0, err
    found = json.loads((home / "told/sft-best-of.json").read_text())
    assert "proxy" not in found["curve"][0] and found["pass_at_k"][0]["by_kind"] == {
        "fact": found["pass_at_k"][0]["share"]
    }


def test_the_frontier_is_measured_from_the_run(home, evaluate):
    words = (
        "frontier=runs/tiny/pretrain,runs/tiny/sft",
        "proxy=runs/tiny/reward",
        f"judge={LENGTH}",
        "prompts=ask.jsonl",
    )
    code, out, err = evaluate("runs/tiny/sft", *words)
    assert code == 0, err
    reference, other, itself = written(home, "sft-frontier-pretrain+sft.json")["points"]
    assert reference["reference"] and reference["kl"] == 0.0 and "win_rate" not in reference
    assert abs(itself["kl"]) < 1e-4 and 0 <= itself["kl_k3"] < 1e-6 and itself["label"] == "sft"
    assert other["label"] == other["group"] == "pretrain" and other["step"] == 1
    assert other["kl"] > 0.1 and other["kl_k3"] > 0.1 and 0.0 <= other["win_rate"] <= 1.0
    assert {"proxy", "gold", "interval", "tokens", "ended"} <= other.keys()
    assert "KL from runs/tiny/sft, and what it bought" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["against=runs/tiny/pretrain"], "prompts must be set, JSONL files to respond to, for against"),
        (["against=runs/tiny/pretrain", "prompts=ask.jsonl"], "judge must be set for against"),
        (["prompts=ask.jsonl", "text=ask.jsonl"], "prompts is for against, best_of, frontier, and there is none"),
        (["against=runs/tiny/stf", "prompts=ask.jsonl", f"judge={LENGTH}"], "against: runs/tiny/stf: no such folder"),
        (["against=runs/tiny", "prompts=aks.jsonl", f"judge={LENGTH}"], "aks.jsonl does not exist. Did you mean"),
        (
            ["against=runs/tiny", "prompts=bad.jsonl", f"judge={LENGTH}"],
            'bad.jsonl:2: no key "prompt"; the record has "promt',
        ),
        (["against=runs/tiny", "prompts=empty.jsonl", f"judge={LENGTH}"], "prompts: empty.jsonl has none"),
        (
            ["against=runs/tiny", "prompts=ask.jsonl", "judge=length_judge:scor"],
            "has no function scor. Did you mean 'score'",
        ),
        (
            ["against=runs/tiny", "prompts=ask.jsonl", "judge=jugde"],
            "judge: jugde: no such folder. Expected module:function",
        ),
        (
            ["against=runs/tiny", "prompts=ask.jsonl", "judge=runs/tiny/sft"],
            "judge: runs/tiny/sft holds a language model",
        ),
        (
            ["best_of=2", "prompts=ask.jsonl", "proxy=runs/tiny/pretrain"],
            "proxy: runs/tiny/pretrain holds a language model",
        ),
        (["best_of=2", "prompts=plain.jsonl"], 'plain.jsonl:1: no key "answer" here or below, so there is no pass@k'),
        (["best_of=2", "prompts=ask.jsonl", "grade=number"], 'ask.jsonl:1: "answer" is'),
        (["best_of=4", "samples=2", "prompts=ask.jsonl"], "samples is 2, and best_of goes up to 4"),
        (["best_of=4", "prompts=ask.jsonl", "judge=http://127.0.0.1:9/v1"], "judge is a server, which gives no scores"),
        (["frontier=runs/tiny/*/none", "prompts=ask.jsonl"], "frontier: no folder matches runs/tiny/*/none"),
        (
            ["frontier=runs/tiny", "prompts=ask.jsonl", "temperature=0"],
            "frontier measures the KL between distributions",
        ),
        (
            ["against=runs/tiny", "prompts=ask.jsonl", f"judge={LENGTH}", "judge_model=x"],
            "are for a server, and judge is none",
        ),
        (
            ["against=runs/tiny", "prompts=ask.jsonl", "judge=http://127.0.0.1:9/v1", "judge_key=NO_SUCH"],
            "judge_key: the environment has no variable NO_SUCH",
        ),
        (
            ["against=runs/tiny", "prompts=ask.jsonl", "judge=http://127.0.0.1:9/v1"],
            "http://127.0.0.1:9/v1 cannot be used",
        ),
        (
            ["against=runs/tiny", "prompts=ask.jsonl", f"judge={LENGTH}", "out=ask.jsonl/x"],
            "out=FOLDER names another place",
        ),
    ],
)
def test_mistakes_are_answered_in_words(home, words, said, evaluate):
    (home / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (home / "empty.jsonl").write_text("\n")
    (home / "plain.jsonl").write_text('{"prompt": "a"}\n')
    before = set((home / "runs").rglob("*"))
    code, out, err = evaluate("runs/tiny/sft", *words)
    assert code == 2 and out == "" and said in err
    assert set((home / "runs").rglob("*")) == before


@pytest.mark.parametrize(
    "words", [["judge=length_judge:scor"], ["judge=http://127.0.0.1:9/v1"], ["judge=runs/tiny/sft"]]
)
def test_mistakes_are_answered_without_jax(home, words):
    code = "import sys; from jaxgpt.cli import main; c = main(sys.argv[1:]); print('jax' in sys.modules); sys.exit(c)"
    command = [sys.executable, "-c", code, "eval", "runs/tiny/sft", "against=runs/tiny", "prompts=ask.jsonl", *words]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=120)
    assert found.returncode == 2 and found.stdout == "False\n", found.stderr


def test_a_prompt_that_leaves_no_room_is_told_by_file_and_line(evaluate):
    code, _, err = evaluate("runs/tiny/sft", "best_of=1", "prompts=ask.jsonl", max_tokens=60)
    assert code == 2 and "ask.jsonl:1: " in err and "max_tokens 60 leaves 4 of the context 64" in err
