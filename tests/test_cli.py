"""The command line answers mistakes in words and with exit code 2, before jax is imported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.cli import VERBS, main
from jaxgpt.config.fields import sections, settings
from jaxgpt.config.schema import Config

STAGES = {"pretrain", "sft", "reward", "ppo"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("name: meadow\npretrain: {steps: 3}\n")
    Path("runs/meadow").mkdir(parents=True)
    return tmp_path


def answer(capsys, *words: str) -> tuple[int, str, str]:
    code = main(words)
    out, err = capsys.readouterr()
    return code, out, err


def process(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxgpt", *words], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("verb", sorted({"run", "config", "prepare", "tokenizer", "eval", "report"} | STAGES))
def test_a_typo_is_answered_in_words_by_every_verb(verb, capsys):
    code, out, err = answer(capsys, verb, "run.yaml", "model.widht=512", "sft.steps=ten")
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert lines[0] == "jaxgpt: 2 mistakes in the settings:"
    assert lines[1].startswith(
        "  model.widht (set by 'model.widht=512'): no such field. Did you mean 'width'? Fields: vocab"
    )
    assert lines[2] == "  sft.steps (set by 'sft.steps=ten'): found 'ten', expected a whole number, 1 or more"


def test_a_mistake_is_answered_without_jax():
    code = "import sys; from jaxgpt.cli import main; c = main(sys.argv[1:]); print('jax' in sys.modules); sys.exit(c)"
    words = [sys.executable, "-c", code, "run", "run.yaml", "model.widht=512"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == "False\n"
    assert done.stderr.startswith(
        "jaxgpt: model.widht (set by 'model.widht=512'): no such field. Did you mean 'width'?"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rnu", "run.yaml"], "'rnu': no such verb. Did you mean 'run'? Verbs: run, prepare, tokenizer"),
        (["run.yaml", "seed=3"], "'run.yaml': a file, expected a verb before it: jaxgpt run run.yaml seed=3"),
        (["run"], "run: found no file; usage: jaxgpt run FILE.yaml"),
        (["run", "seed=3"], "run: found 'seed=3' where the file belongs; usage: jaxgpt run FILE.yaml"),
        (["run", "--fast", "run.yaml"], "--fast: no such option of run; usage: jaxgpt run FILE.yaml"),
        (["run", "rnu.yaml"], "rnu.yaml: no such file or directory. Did you mean 'run.yaml'?"),
        (["run", "run.yaml", "steps"], "'steps': expected key.path=value, as in 'sft.steps=100'"),
        (["sft", "run.yaml"], "sft: not set in run.yaml; add the section 'sft:', or sft={} for its defaults"),
        (
            ["prepare", "run.yaml"],
            "prepare: not set in run.yaml; add the section 'prepare:', or prepare.type=meadow for",
        ),
        (["eval", "run.yaml"], "evaluate: not set in run.yaml; add the section 'evaluate:'"),
        (["report", "runs/medow"], "runs/medow: no such folder. Did you mean 'runs/meadow'?"),
        (
            ["report", "runs/meadow", "seed=3"],
            "'seed=3': a run folder takes no settings; its own are in runs/meadow/conf",
        ),
        (["sample", "meadow", "hello"], "meadow: no such folder. Did you mean 'runs/meadow'?"),
        (["sample", "run.yaml", "hello"], "run.yaml: a file, expected the folder of a run, such as runs/meadow"),
        (
            ["sample", "runs/meadow"],
            "sample: found 0 texts, expected one: jaxgpt sample runs/meadow 'Once upon a time'",
        ),
        (["sample"], 'sample: no run folder; usage: jaxgpt sample RUN_FOLDER "TEXT" [options]'),
        (["chat", "runs/meadow", "hi"], "'hi': chat takes a run folder alone; for one text there is jaxgpt sample"),
        (["chat", "runs/meadow", "--top-k=0"], "--top-k: found '0', expected a whole number, 1 or more"),
    ],
)
def test_mistakes_outside_the_settings_are_answered_the_same_way(words, said, capsys):
    code, out, err = answer(capsys, *words)
    assert (code, out) == (2, "") and err.startswith(f"jaxgpt: {said}")


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_each_verb_lists_every_setting_it_reads(verb, capsys):
    code, out, err = answer(capsys, verb, "--help")
    assert (code, err) == (0, "") and out.startswith(f"jaxgpt {verb} ")
    words = {line.split()[0].rstrip(":") for line in out.splitlines() if line.strip()}
    of_folder = VERBS[verb].of_folder
    described = settings(of_folder) if of_folder is not None else ()
    own = {setting.path for setting in described if not sections(setting.annotation)}
    assert own <= words
    for setting in settings(Config):
        listed = setting.path.partition(".")[0] in VERBS[verb].reads or setting.path in own
        assert (setting.path in words) == listed or (not listed and sections(setting.annotation)), setting.path
    if not VERBS[verb].reads and of_folder is None:
        assert {"--temperature", "--top-k", "--top-p", "--max-tokens", "--seed", "--stop", "--stage"} <= words


def test_every_setting_is_read_by_run_and_each_section_by_some_verb_of_its_own():
    assert set(VERBS["run"].reads) == set(Config.model_fields)
    rest = {name for verb in VERBS if verb not in ("run", "config") for name in VERBS[verb].reads}
    assert rest == set(Config.model_fields)


def test_help_and_version(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        code, out, _ = answer(capsys, *words)
        assert code == 0 and all(f"  {verb} " in out for verb in VERBS)
    assert answer(capsys, "help", "sft") == answer(capsys, "sft", "-h")
    assert answer(capsys, "--version")[1].startswith("jaxgpt ")


def test_config_prints_what_config_reads(capsys):
    code, out, _ = answer(capsys, "config", "run.yaml", "sft={}", "model.width=64")
    assert code == 0
    assert "  width: 64" in out and "# command line 'model.width=64'" in out and "# run.yaml:2" in out
    Path("again.yaml").write_text(out)
    _, again, _ = answer(capsys, "config", "again.yaml")
    assert [line.split("  #")[0].rstrip() for line in again.splitlines()] == [
        line.split("  #")[0].rstrip() for line in out.splitlines()
    ]


def test_config_prints_the_schema(capsys):
    code, out, _ = answer(capsys, "config", "--schema")
    assert code == 0 and json.loads(out)["properties"]["name"]["default"] == "run"


def test_the_module_and_its_exit_code_are_those_of_main():
    assert process("--version").returncode == 0
    done = process("config", "run.yaml")
    assert done.returncode == 0 and done.stdout.startswith("name: meadow ")
    assert process("run").returncode == 2


def test_a_reader_that_leaves_early_is_no_error():
    done = subprocess.run(
        f"'{sys.executable}' -m jaxgpt config --schema | head -1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("{\n", "")
