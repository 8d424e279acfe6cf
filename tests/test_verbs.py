"""Every verb of the command line as a new user runs it: a process of its own, on one small run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxgpt.config.load import load

CONFIG = """
name: small
runs: {runs}
prepare: {{type: meadow, documents: 400, instructions: 80, rankings: 40, prompts: 40, held_out: 16}}
data:
  val_fraction: 0.05
  sources:
    commoncrawl: {{path: "{{run}}/data/text/commoncrawl.jsonl", weight: 3}}
    wikipedia: {{path: "{{run}}/data/text/wikipedia.jsonl", weight: 1}}
tokenizer:
  vocab: 512
  path_text: ["{{run}}/data/text/*.jsonl", "{{run}}/data/instructions.jsonl"]
  fields: [text, messages]
model: {{width: 16, layers: 1, context: 160, attention: {{heads: 2}}, mlp: {{width: 32}}}}
pretrain: {{steps: 4, batch: 8, context: 32, eval_every: 2, log_every: 1, checkpoint: {{every: 2}}}}
sft:
  steps: 3
  batch: 8
  context: 160
  data: {{path: "{{run}}/data/instructions.jsonl", eval_path: "{{run}}/data/instructions_eval.jsonl"}}
reward:
  steps: 2
  batch: 8
  responses: 4
  context: 160
  data: {{path: "{{run}}/data/rankings.jsonl", eval_path: "{{run}}/data/rankings_eval.jsonl"}}
ppo:
  iterations: 1
  episodes: 16
  batch: 8
  epochs: 1
  prompt_length: 40
  response_length: 8
  data: {{path: "{{run}}/data/prompts.jsonl"}}
dpo:
  steps: 2
  batch: 8
  context: 160
  data: {{path: "{{run}}/data/rankings.jsonl", eval_path: "{{run}}/data/rankings_eval.jsonl"}}
evaluate:
  data: {{path: "{{run}}/data/prompts_eval.jsonl"}}
  scorer: jaxgpt.data.meadow:gold_score
  max_tokens: 8
  batch: 16
  samples: ["Who are you?"]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verbs")
    (folder / "small.yaml").write_text(CONFIG.format(runs=folder / "runs"))
    return folder


def jaxgpt(home: Path, *words: str, stdin: str = "", devices: int = 1) -> subprocess.CompletedProcess[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags if devices > 1 else "", "JAX_PLATFORMS": "cpu"}
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(home / "compiled"))
    command = [sys.executable, "-m", "jaxgpt", *words]
    return subprocess.run(command, cwd=home, env=environment, input=stdin, capture_output=True, text=True, timeout=600)


def done(home: Path, stage: str) -> dict:
    return json.loads((home / "runs/small" / stage / "done.json").read_text())


def test_prepare_and_tokenizer_write_what_the_stages_read(home: Path) -> None:
    for verb, made in (("prepare", "data/prompts.jsonl"), ("tokenizer", "tokenizer/tokenizer.model")):
        found = jaxgpt(home, verb, "small.yaml")
        assert found.returncode == 0, found.stderr
        assert (home / "runs/small" / made).is_file()


def test_a_stage_before_its_parent_is_refused_with_what_to_do(home: Path) -> None:
    found = jaxgpt(home, "sft", "small.yaml")
    assert found.returncode == 2
    assert "pretrain" in found.stderr and "has no finished result" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(("stage", "steps"), [("pretrain", 4), ("sft", 3), ("reward", 2), ("ppo", 2), ("dpo", 2)])
def test_each_stage_runs_alone_and_is_not_run_twice(home: Path, stage: str, steps: int) -> None:
    found = jaxgpt(home, stage, "small.yaml")
    assert found.returncode == 0, found.stderr
    assert done(home, stage)["step"] == steps
    lines = (home / "runs/small" / stage / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if '"eval"' not in line] == list(range(1, steps + 1))
    if stage == "pretrain":
        before = done(home, stage)
        again = jaxgpt(home, stage, "small.yaml")
        assert again.returncode == 0 and "finished" in again.stdout and done(home, stage) == before


def test_eval_and_report_read_what_was_trained(home: Path) -> None:
    found = jaxgpt(home, "eval", "small.yaml")
    assert found.returncode == 0, found.stderr
    results = json.loads((home / "runs/small/evaluate/results.json").read_text())
    assert set(results["stages"]) >= {"sft", "ppo", "dpo"} and 0.0 <= results["stages"]["ppo"]["win_rate_vs_sft"] <= 1.0
    found = jaxgpt(home, "report", "runs/small")
    assert found.returncode == 0 and (home / "runs/small/report.html").is_file(), found.stderr
    report = json.loads((home / "runs/small/report.json").read_text())
    for stage in ("ppo", "dpo"):
        assert report[stage]["gold_after"] == results["stages"][stage]["gold"]
    assert 0.0 <= report["dpo"]["heldout_accuracy"] <= 1.0
    assert report["reward"]["heldout_accuracy"] == results["reward"]["accuracy"]


def test_run_finds_everything_finished_and_ends_with_a_table(home: Path) -> None:
    found = jaxgpt(home, "run", "small.yaml")
    assert found.returncode == 0, found.stderr
    for part in ("pretrain", "sft", "reward", "ppo", "dpo", "evaluate"):
        assert f"{part}  finished" in found.stdout
    assert "report.html" in found.stdout


def test_sample_and_chat_speak_with_a_finished_stage(home: Path) -> None:
    found = jaxgpt(home, "sample", "runs/small/pretrain", "The fox", "--max-tokens", "4", "--temperature", "0")
    assert found.returncode == 0 and found.stdout.startswith("The fox"), found.stderr
    found = jaxgpt(home, "chat", "runs/small", "--max-tokens", "4", stdin="Hello!\n/stage dpo\nWho are you?\n/exit\n")
    assert found.returncode == 0, found.stderr


def test_a_result_leaves_and_comes_back_through_the_command_line(home: Path) -> None:
    for stage in ("sft", "reward"):
        found = jaxgpt(home, "export", "runs/small", f"hf/{stage}", f"stage={stage}")
        assert found.returncode == 0 and f"hf/{stage}" in found.stdout, found.stderr
    found = jaxgpt(home, "import", "hf/sft", "out=runs/back")
    assert found.returncode == 0 and "LlamaForCausalLM" in found.stdout and "jaxgpt sample runs/back" in found.stdout
    said = [
        jaxgpt(home, "sample", run, "The fox", "--max-tokens", "6", "--temperature", "0").stdout
        for run in ("runs/small/sft", "runs/back", "hf:hf/sft")
    ]
    assert said[0].startswith("The fox") and len(set(said)) == 1


FOREIGN = """
runs: {runs}
sft: {{steps: 2, batch: 4, context: 160, data: {{path: "{data}/instructions.jsonl"}}}}
reward: {{steps: 2, batch: 4, responses: 4, context: 160, data: {{path: "{data}/rankings.jsonl"}}}}
ppo:
  iterations: 1
  episodes: 4
  batch: 4
  epochs: 1
  prompt_length: 40
  response_length: 8
  data: {{path: "{data}/prompts.jsonl"}}
"""


@pytest.mark.parametrize(
    ("stage", "starts"),
    [
        ("sft", ["sft.init=hf:hf/sft"]),
        ("reward", ["reward.init=hf:hf/sft"]),
        ("ppo", ["ppo.init=hf:hf/sft", "ppo.rewards=[{type: model, models: hf:hf/reward}]"]),
        ("sft", ["sft.init=runs/back"]),
        ("ppo", ["ppo.init=runs/back", "ppo.rewards=[{type: model, models: runs/small}]"]),
    ],
)
def test_every_stage_starts_from_a_model_that_came_from_elsewhere(home: Path, stage: str, starts: list[str]) -> None:
    """The file has no model and no tokenizer: both come with what the stage starts from."""
    (home / "foreign.yaml").write_text(FOREIGN.format(runs=home / "runs", data=home / "runs/small/data"))
    name = f"foreign-{stage}-{starts[0].partition('=')[2][:2]}"
    found = jaxgpt(home, stage, "foreign.yaml", f"name={name}", *starts)
    assert found.returncode == 0, found.stdout + found.stderr
    made = json.loads((home / "runs" / name / stage / "done.json").read_text())
    assert made["step"] > 0 and (home / "runs" / name / "tokenizer/tokenizer.model").is_file()
    again = jaxgpt(home, stage, "foreign.yaml", f"name={name}", *starts)
    assert again.returncode == 0 and f"{stage}  finished" in again.stdout, again.stderr


def test_other_weights_under_the_same_name_are_noticed(home: Path) -> None:
    (home / "hf/moved").mkdir()
    for file in (home / "hf/sft").iterdir():
        (home / "hf/moved" / file.name).write_bytes(file.read_bytes())
    words = ("sft", "foreign.yaml", "name=moved", "sft.init=hf:hf/moved")
    assert jaxgpt(home, *words).returncode == 0
    weights = home / "hf/moved/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    found = jaxgpt(home, *words)
    assert (
        found.returncode == 2 and "was made with other inputs" in found.stderr and "parents.hf:hf/moved" in found.stderr
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("import", "hf/stf"), "hf/stf: no such folder. Did you mean 'sft'?"),
        (("import",), "import: no folder; usage: jaxgpt import HF_FOLDER"),
        (("import", "hf/sft", "ou=x"), "ou (set by 'ou=x'): no such field. Did you mean 'out'?"),
        (("import", "hf/sft", "out=runs/small"), "runs/small is there already"),
        (("import", "runs/small"), "no config.json there, so it is no Hugging Face model folder"),
        (("export", "runs/small"), "export: expected a run and a folder to write"),
        (("export", "runs/small", "hf/sft"), "hf/sft is there already"),
        (("export", "runs/small", "hf/x", "dtype=int8"), "dtype (set by 'dtype=int8'): found 'int8', expected float32"),
        (("export", "runs/small", "hf/x", "stage=stf"), "'stf': no such stage. Did you mean 'sft'?"),
        (("sample", "hf:hf/reward", "x"), "holds a reward model"),
        (("sample", "hf/sft", "x"), "is a Hugging Face folder: hf:hf/sft reads it"),
        (
            ("sft", "foreign.yaml", "sft.init=hf:hf/none"),
            "sft.init (set by 'sft.init=hf:hf/none'): hf/none: no such folder",
        ),
        (("sft", "foreign.yaml", "sft.init=hf/sft"), "hf:hf/sft"),
        (
            ("sft", "foreign.yaml", "name=k", "sft.init=hf:hf/reward"),
            "holds a reward model; a language model is needed",
        ),
        (("sft", "foreign.yaml", "name=w", "sft.init=hf:hf/sft", "model.width=32"), "model.width is 32, and it has 16"),
    ],
)
def test_mistakes_with_folders_are_told_in_words(home: Path, words: tuple[str, ...], expected: str) -> None:
    found = jaxgpt(home, *words)
    assert found.returncode == 2, found.stdout + found.stderr
    assert expected in found.stderr and "Traceback" not in found.stderr, found.stderr


def test_config_prints_settings_that_give_the_same_run(home: Path) -> None:
    words = ("sft.steps=7", "ppo.kl.coef=1e-3", "reward.data.eval_path=null")
    found = jaxgpt(home, "config", "small.yaml", *words)
    assert found.returncode == 0 and "sft.steps=7" in found.stdout, found.stderr
    (home / "printed.yaml").write_text(found.stdout)
    config = load(home / "printed.yaml").config
    assert config == load(home / "small.yaml", words).config
    assert config.sft is not None and config.sft.steps == 7


def test_a_changed_setting_under_the_same_name_is_refused_with_the_difference(home: Path) -> None:
    found = jaxgpt(home, "sft", "small.yaml", "sft.optimizer.lr=0.5")
    assert found.returncode == 2
    assert "sft.optimizer.lr: 0.001 -> 0.5" in found.stderr and "name=" in found.stderr
    allowed = jaxgpt(home, "sft", "small.yaml", "sft.log_every=3", "sft.checkpoint.every=1")
    assert allowed.returncode == 0, allowed.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("pretrain", "small.yaml", "mesh.tensor=3"), "there are 1"),
        (("pretrain", "small.yaml", "data.sources.wikipedia.path=nowhere.jsonl"), "nowhere.jsonl"),
        (("ppo", "small.yaml", "ppo.prompt_length=4"), "ppo.prompt_length"),
        (("sft", "small.yaml", "model.width=32"), "model.width: 16 -> 32"),
        (("pretrain", "small.yaml", "model.vocab=100"), "model.vocab is 100"),
        (("eval", "small.yaml", "evaluate.scorer=jaxgpt.data.meadow:gold_scores"), "gold_score"),
        (("sample", "runs/small/reward", "Hello"), "holds a reward model"),
        (("report", "runs/smal"), "small"),
    ],
)
def test_mistakes_that_only_the_run_can_see_are_told_in_words(
    home: Path, words: tuple[str, ...], expected: str
) -> None:
    extra = (f"name={words[0]}_{len(words[-1])}",) if words[0] == "pretrain" else ()
    found = jaxgpt(home, *words, *extra)
    assert found.returncode == 2, found.stdout + found.stderr
    assert expected in found.stderr and "Traceback" not in found.stderr


def test_a_start_of_another_architecture_is_refused(home: Path) -> None:
    words = ("name=wide", "model.width=32", "sft.init=runs/small/pretrain", "tokenizer.path=runs/small/tokenizer")
    found = jaxgpt(home, "sft", "small.yaml", *words)
    assert found.returncode == 2 and "Traceback" not in found.stderr, found.stdout + found.stderr
    assert "runs/small/pretrain/params is of another architecture: " in found.stderr
    assert "attention/k_DGK is (1, 16, 2, 8) float32 there, (1, 32, 2, 16) float32 here; " in found.stderr
    assert not (home / "runs/wide/sft/done.json").exists()


def test_a_changed_file_and_a_changed_parent_are_refused(home: Path) -> None:
    data, parent = home / "runs/small/data/instructions.jsonl", home / "runs/small/pretrain/done.json"
    whole, before = data.read_text(), json.loads(parent.read_text())
    (home / "own.jsonl").write_text(whole)
    words = ("sft", "small.yaml", "name=moving", "sft.init=runs/small/pretrain", "sft.data.path=own.jsonl")
    words += ("tokenizer.path=runs/small/tokenizer",)
    assert jaxgpt(home, *words).returncode == 0
    assert "sft  finished" in jaxgpt(home, *words).stdout
    (home / "own.jsonl").write_text("".join(whole.splitlines(keepends=True)[1:]))
    found = jaxgpt(home, *words)
    assert found.returncode == 2 and "/moving/sft was made with other inputs" in found.stderr
    assert "\n  files: " in found.stderr and "parents" not in found.stderr
    (home / "own.jsonl").write_text(whole)
    try:
        parent.write_text(json.dumps(before | {"fingerprint": "0123456789abcdef"}))
        found = jaxgpt(home, *words)
    finally:
        parent.write_text(json.dumps(before))
    assert found.returncode == 2
    assert f"\n  parents.runs/small/pretrain: '{before['fingerprint']}' -> '0123456789abcdef'" in found.stderr
    assert jaxgpt(home, *words).returncode == 0


def test_a_checkpoint_can_be_spoken_with_while_its_stage_goes_on(home: Path) -> None:
    for stage, step in (("pretrain", 2), ("ppo", 2)):
        folder = f"runs/small/{stage}/checkpoints/{step}"
        found = jaxgpt(home, "sample", folder, "The fox", "--max-tokens", "3", "--temperature", "0")
        assert found.returncode == 0 and found.stdout.startswith("The fox"), found.stderr


def test_mistakes_of_every_stage_are_told_before_the_first_one_trains(home: Path) -> None:
    (home / "asked.jsonl").write_text('{"prompt": "Who are you?"}\n{"promt": "What?"}\n')
    for words, expected in (
        (("ppo.data=null",), "ppo.data.path (unset by 'ppo.data=null'): must be set"),
        (("evaluate.data.path=asked.jsonl",), "asked.jsonl:2: "),
        (("evaluate.max_tokens=150",), "tokens, model.context - evaluate.max_tokens is 10"),
        (("ppo.prompt_length=4",), "ppo.prompt_length is 4"),
        (("reward.batch=8", "mesh.fsdp=1", "reward.context=24"), "reward.context is 24"),
    ):
        found = jaxgpt(home, "run", "small.yaml", "name=early", *words)
        assert found.returncode == 2 and expected in found.stderr, found.stdout + found.stderr
        assert not (home / "runs/early/pretrain").exists()


def test_every_batch_that_the_mesh_does_not_divide_is_told_at_once(home: Path) -> None:
    words = ("name=early", "pretrain.batch=6", "ppo.batch=4", "ppo.accumulate=2")
    found = jaxgpt(home, "run", "small.yaml", *words, devices=4)
    assert found.returncode == 2, found.stdout + found.stderr
    assert found.stderr.splitlines()[0] == "jaxgpt: 2 mistakes in the settings:"
    for what in ("pretrain.batch / pretrain.accumulate: 6 rows", "ppo.batch / ppo.accumulate: 2 rows"):
        assert f"  {what} do not divide over 4 devices" in found.stderr


def test_work_that_cannot_be_gone_on_with_is_told_before_anything_is_trained(home: Path) -> None:
    """The stage at the beginning is gone and would be another one: what was made from it is named, and stays."""
    (home / "runs/small").rename(home / "runs/kept")
    shutil.copytree(home / "runs/kept", home / "runs/small")
    shutil.rmtree(home / "runs/small/pretrain")
    found = jaxgpt(home, "run", "small.yaml", "pretrain.steps=3")
    assert found.returncode == 2 and "Traceback" not in found.stderr
    folders = ", ".join(str(home / "runs/small" / name) for name in ("sft", "reward", "ppo", "dpo"))
    assert f"{folders} were made with other inputs; use another name=..., or remove those folders:" in found.stderr
    assert "\n  sft was made from pretrain as it was before\n" in found.stderr
    assert not (home / "runs/small/pretrain").exists()
    shutil.rmtree(home / "runs/small")
    (home / "runs/kept").rename(home / "runs/small")
    found = jaxgpt(home, "run", "small.yaml", "pretrain.steps=4", "sft.steps=9")
    assert found.returncode == 2 and "\n  sft.steps: 3 -> 9\n" in found.stderr
    assert "/pretrain" not in found.stderr and "reward was made from sft as it was before" in found.stderr


def test_a_refused_command_leaves_the_run_as_it_was(home: Path) -> None:
    before = (home / "runs/small/config.yaml").read_text()
    assert jaxgpt(home, "pretrain", "small.yaml", "pretrain.steps=9").returncode == 2
    found = jaxgpt(home, "run", "small.yaml", "prepare.seed=5")
    assert found.returncode == 2 and "was made with other settings" in found.stderr
    assert (home / "runs/small/config.yaml").read_text() == before


def test_one_text_file_asks_for_another_way_of_holding_out(home: Path) -> None:
    (home / "book.txt").write_text("A line of a book.\n" * 200)
    (home / "book.yaml").write_text("""
        name: book
        data: {path: book.txt}
        tokenizer: {vocab: 300}
        model: {width: 16, layers: 1, attention: {heads: 2}}
        pretrain: {steps: 2, batch: 4, context: 16}
    """)
    words = ("pretrain", "book.yaml")
    found = jaxgpt(home, *words)
    assert found.returncode == 2 and "data.val_split=tail" in found.stderr, found.stderr
    found = jaxgpt(home, *words, "data.val_split=tail", "data.val_fraction=0.2")
    assert found.returncode == 0, found.stderr


def test_a_run_asked_to_stop_between_stages_says_that_it_can_go_on(home: Path) -> None:
    command = [sys.executable, "-m", "jaxgpt", "run", "small.yaml", "name=stopped", "prepare.documents=1000000"]
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(command, cwd=home, env=environment, stdout=subprocess.PIPE, text=True)
    while not any((home / "runs/stopped").glob("*data*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75 and "the same command goes on" in said
    assert not (home / "runs/stopped/data").exists()


def test_a_file_where_the_runs_belong_is_told_without_a_traceback(home: Path) -> None:
    (home / "file").write_text("")
    found = jaxgpt(home, "pretrain", "small.yaml", "runs=file")
    assert found.returncode == 2 and "Traceback" not in found.stderr
