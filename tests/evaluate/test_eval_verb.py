"""`jaxgpt eval RUN_FOLDER` as a user runs it: a process of its own, tables and files, and mistakes in words."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from local_tasks import CHOICES, write_tasks
from tiny_run import load_once, make_run

from jaxgpt.cli import main

NEEDS_LM_EVAL = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
TEXT = "One day the cat met a dog.\n" * 5


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("eval_verb")
    make_run(home / "runs" / "tiny")
    write_tasks(home / "tasks")
    (home / "book.txt").write_text(TEXT)
    (home / "more.jsonl").write_text('{"text": "It is black."}\n{"text": "Tell me."}\n{"text": "A story."}\n')
    (home / "empty.txt").write_text("")
    ranked = [{"prompt": "What is the cat?", "chosen": "It is black.", "rejected": f"A {n} dog."} for n in range(4)]
    ranked[2] = {"prompt": "Tell me.", "responses": ["One.", "Two.", "Three."], "ranks": [2, 1, 3]}
    ranked = [{**record, "subset": "ab"[n % 2]} for n, record in enumerate(ranked)]
    (home / "judged").mkdir()
    (home / "judged" / "ranked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in ranked))
    return home


def jaxgpt(home: Path, *words: str, command: tuple[str, ...] = ("-m", "jaxgpt")) -> subprocess.CompletedProcess[str]:
    settings = {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "HF_HOME": str(home / "hf"), "OMP_NUM_THREADS": "1"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))
    command = [sys.executable, *command, "eval", *words]
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)


def written(home: Path, name: str) -> dict:
    return json.loads((home / "runs/tiny/evaluate" / f"{name}.json").read_text())


def test_texts_are_measured_each_by_itself(home):
    found = jaxgpt(home, "runs/tiny", "text=book.txt,*.jsonl", "batch=3", "limit=2")
    assert found.returncode == 0, found.stderr
    assert "perplexity" in found.stdout and "bits per byte" in found.stdout
    book, more = written(home, "sft-book.txt"), written(home, "sft-more.jsonl")
    assert book["bytes"] == len(TEXT) and book["documents"] == 1 and book["model"] == "runs/tiny/sft"
    assert more["documents"] == 2 and more["bytes"] == len("It is black.Tell me.")
    model = load_once(home / "runs/tiny/sft")
    assert book["tokens"] == len(model.encode(TEXT)) - 1
    assert book["bits_per_byte"] == pytest.approx(book["nats"] / math.log(2) / len(TEXT))
    assert not list((home / "runs/tiny/evaluate").glob("*.part"))


def test_a_reward_model_is_measured_on_rankings_by_subset(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["eval", "runs/tiny", "rankings=judged/ranked.jsonl", "batch=3"]) == 0
    shown = capsys.readouterr().out
    assert "runs/tiny/reward" in shown and "mean of subsets" in shown and "best response on top" in shown
    found = written(home, "reward-ranked.jsonl")
    model = load_once(home / "runs/tiny/reward")
    talks = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        for prompt, responses in (
            ("What is the cat?", ["It is black.", "A 0 dog.", "A 1 dog.", "A 3 dog."]),
            ("Tell me.", ["One.", "Two.", "Three."]),
        )
        for response in responses
    ]
    black, zero, one, three, first, second, third = model.score(talks)
    a, b = [black > zero, second > first, second > third, first > third], [black > one, black > three]
    assert found["subsets"]["a"]["accuracy"] == pytest.approx(np.mean(a)) and found["subsets"]["b"]["pairs"] == 2
    assert found["mean"] == pytest.approx((np.mean(a) + np.mean(b)) / 2)
    assert found["accuracy"] == pytest.approx(np.mean(a + b)) and found["pairs"] == 6
    best = np.mean([black > zero, black > one, second > max(first, third), black > three])
    assert found["best"] == pytest.approx(best)
    assert main(["eval", "runs/tiny", "rankings=judged/ranked.jsonl", "limit=2"]) == 0
    assert written(home, "reward-ranked.jsonl")["pairs"] == 2


@NEEDS_LM_EVAL
def test_local_tasks_are_measured_offline(home):
    tasks = "tasks/choice.yaml,tasks/generation.yaml,tasks/rolling.yaml"
    found = jaxgpt(home, "runs/tiny/pretrain", f"tasks={tasks}", "limit=3", "text=book.txt")
    assert found.returncode == 0, found.stderr
    assert "local_choice" in found.stdout and "exact_match" in found.stdout and "bits_per_byte" in found.stdout
    choice = written(home, "pretrain-local_choice")
    assert choice["samples"] == {"original": len(CHOICES), "effective": 3} and choice["few_shot"] == 0
    assert choice["metrics"]["acc,none"] in (0.0, 1 / 3, 2 / 3, 1.0) and choice["lm_eval"]
    assert written(home, "pretrain-local_rolling")["metrics"]["word_perplexity,none"] > 1
    assert written(home, "pretrain-book.txt")["tokens"] > 0


@NEEDS_LM_EVAL
def test_an_unknown_task_is_answered_with_the_nearest_before_a_model_is_loaded(home):
    found = jaxgpt(home, "runs/tiny", "tasks=arc_esy")
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert "jaxgpt: 'arc_esy': lm-eval has no such task. Did you mean 'arc_easy'?" in found.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["runs/tiny"], "nothing to measure: set tasks=arc_easy, tasks=my_task.yaml or text=file.txt, or for a rew"),
        (
            ["runs/tiny", "rankings=judged/rankd.jsonl"],
            "judged/rankd.jsonl does not exist. Did you mean 'ranked.jsonl'?",
        ),
        (
            ["runs/tiny", "txt=book.txt"],
            "txt (set by 'txt=book.txt'): no such field. Did you mean 'text'? Fields: tasks",
        ),
        (["runs/tiny", "text=book.txt", "limit=0"], "limit (set by 'limit=0'): found 0, expected a whole number, 1 or"),
        (["runs/tiny", "text=book.txt", "--batch", "3"], "'--batch': expected key=value, as in 'limit=100'"),
        (["runs/tiny", "text=book.txt", "chat=true"], "chat and few_shot are for tasks, and there are none"),
        (["runs/tiny", "text=bok.txt"], "bok.txt does not exist. Did you mean 'book.txt'?"),
        (
            ["runs/tiny", "tasks=tasks/choise.yaml"],
            "tasks: tasks/choise.yaml does not exist. Did you mean 'tasks/choice",
        ),
        (
            ["runs/tiny", "text=book.txt", "stage=stf"],
            "'stf': no such stage. Did you mean 'sft'? Finished there: pretrain, sft, reward",
        ),
        (
            ["runs/tiny/sft", "text=book.txt", "stage=ppo"],
            "runs/tiny: stage ppo is not finished. Finished there: pretrain, sft, reward",
        ),
        (["runs/tyni", "text=book.txt"], "runs/tyni: no such folder. Did you mean 'runs/tiny'?"),
        (["text=book.txt"], "eval: found 'text=book.txt' where the file belongs; usage: jaxgpt eval RUN_FOLDER tasks="),
    ],
)
def test_mistakes_are_answered_in_words(home, words, said, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["eval", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err


@pytest.mark.parametrize("word", ["batch=none", "text=bok.txt", "stage=stf"])
def test_mistakes_are_answered_at_once_and_without_jax(home, word):
    code = (
        "import sys, time; t = time.process_time(); from jaxgpt.cli import main; c = main(sys.argv[1:]); "
        "print('jax' in sys.modules, time.process_time() - t); sys.exit(c)"
    )
    began = time.monotonic()
    found = jaxgpt(home, "runs/tiny", "text=book.txt", word, command=("-c", code))
    loaded, seconds = found.stdout.split()
    assert found.returncode == 2 and loaded == "False" and float(seconds) < 1.0, found.stderr
    assert time.monotonic() - began < 20


def test_without_lm_eval_its_extra_is_named(home, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else real(name))
    monkeypatch.chdir(home)
    assert main(["eval", "runs/tiny", "tasks=arc_easy", "limit=5"]) == 2
    said = (
        "tasks need lm-eval, which is not installed: uv run --extra eval jaxgpt eval runs/tiny tasks=arc_easy limit=5"
    )
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=reward"], "holds a reward model"),
        (["text=empty.txt"], "empty.txt: there is no text in it"),
        (
            ["stage=sft", "text=", "rankings=judged/ranked.jsonl"],
            "holds a language model; rankings needs a reward model",
        ),
    ],
)
def test_what_only_the_model_can_tell_is_told_too(home, words, said, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = set((home / "runs/tiny").rglob("*"))
    assert (
        main(["eval", "runs/tiny", "mesh.fsdp=1", *(["text=book.txt"] if "text" not in words[0] else []), *words]) == 2
    )
    assert said in capsys.readouterr().err
    assert {path for path in (home / "runs/tiny").rglob("*") if path.suffix == ".part"} <= before
