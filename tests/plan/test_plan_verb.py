"""The verb as a user runs it: figures on the console and in a file, mistakes in words, no jax."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxgpt.cli import main
from jaxgpt.plan.laws import Law
from jaxgpt.plan.show import short, span

CONFIGS = Path(__file__).parents[2] / "configs"


def answer(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_numbers_and_times_are_said_as_people_do():
    assert [short(x) for x in (6_738_415_616, 124_439_808, 1.01e12, 42, 4.2e22)] == [
        "6.74B",
        "124M",
        "1.01T",
        "42",
        "4.2e+22",
    ]
    assert [span(x) for x in (95.3 * 86400, 7200, 119, 0.02)] == ["95.3 days", "2 h", "119 s", "20 ms"]


def test_a_plan_of_seven_billion(capsys, tmp_path):
    file = CONFIGS / "scale" / "llama-7b.yaml"
    code, out, _ = answer(capsys, file, "target=v5e:8x8", "price=1.2", f"out={tmp_path / 'plan.json'}")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "pretrain on v5e:8x8, 64 chips" in lines
    assert "all 6,738,415,616" in lines
    assert "tokens 1.01T in 240,000 updates; 149 a parameter" in lines
    assert any(line.startswith("1 16 1 4 *") for line in lines)  # the file's mesh
    assert "all 6,738,415,616 6,607,347,713 6,738,415,616 6,607,347,713" in lines  # PPO's four models
    assert "* the file's" in out and "takes" in out and "cost" in out
    assert max(map(len, out.splitlines())) <= 80
    pretrain, sft, reward, ppo = json.loads((tmp_path / "plan.json").read_text())
    assert [one["stage"] for one in (pretrain, sft, reward, ppo)] == ["pretrain", "sft", "reward", "ppo"]
    assert sum(pretrain["parameters"]["policy"].values()) == 6_738_415_616
    assert pretrain["mesh"] == {"data": 1, "fsdp": 16, "context": 1, "tensor": 4} and pretrain["fits"]
    assert pretrain["seconds"] == pytest.approx(pretrain["flops"] / (0.4 * 64 * 197e12))
    assert reward["tokens"] is None and reward["seconds"] is None  # its length is in files that are not there


def test_a_plan_is_made_without_jax():
    code = "import sys; from jaxgpt.cli import main; c = main(sys.argv[1:]); print('jax' in sys.modules); sys.exit(c)"
    words = [sys.executable, "-c", code, "plan", str(CONFIGS / "meadow.yaml"), "target=v5e:2x2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.endswith("False\n")


def test_what_does_not_fit_ends_with_1(capsys):
    words = (CONFIGS / "scale" / "gpt3-175b.yaml", "target=v5e:4x4", "mesh=null")
    code, out, _ = answer(capsys, *words)
    assert code == 1
    assert "does not fit" in out and "such chips or more" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["target=v7:2x2"], "target=v7:2x2: no such machine. Did you mean 'v4'?"),
        (["targt=v5e:2x2"], "no such field"),
        (["mfu=1.5"], "mfu (set by 'mfu=1.5'): found 1.5, expected a number above 0, at most 1"),
        (["judge=lama-7b"], "no file"),
        (["pretrain=null", "sft=null", "reward=null", "ppo=null"], "there is nothing to plan"),
        (["mesh.fsdp=8", "target=v5e:2x2"], "8 devices, and v5e:2x2 has 4; change the mesh"),
    ],
)
def test_mistakes_are_answered_in_words(capsys, words, said):
    code, _, err = answer(capsys, CONFIGS / "meadow.yaml", *words)
    assert code == 2
    assert said in err


def test_chinchilla(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(CONFIGS.parent)
    code, out, _ = answer(capsys, "--chinchilla", "budget=5.76e23", f"out={tmp_path / 'c.json'}")
    assert code == 0
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "Hoffmann 2022, approach 1 67B 1.43T 21.4" in lines
    assert any(line.startswith("llama-65b 65.3B 1.47T 22.5") for line in lines)
    figures = json.loads((tmp_path / "c.json").read_text())
    assert figures["optimum"]["Hoffmann 2022, approach 1"]["parameters"] == pytest.approx(6.7e10)
    assert answer(capsys, "--chinchilla")[0] == 2


LAW = Law(E=0.8, A=30.0, B=60.0, alpha=0.3, beta=0.3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Run folders as training leaves them, whose losses follow a law: four widths, three lengths of training."""
    home, found = tmp_path_factory.mktemp("isoflop"), []
    for width in (64, 96, 128, 192):
        for budget in (1e12, 1e13, 1e14):
            size = 512 * width + 2 * (4 * width**2 + 3 * width * 4 * width + 2 * width) + width
            tokens = round(budget / 6 / size)
            folder = home / f"w{width}-{budget:.0e}"
            (folder / "pretrain").mkdir(parents=True)
            model = {"width": width, "layers": 2, "mlp": {"width": 4 * width}, "attention": {"heads": 2}}
            config = {"name": folder.name, "model": model, "pretrain": {"context": 8}}
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
            done = {"step": 10, "trained": 10, "tokens": tokens, "params": size, "seconds": 1.0}
            (folder / "pretrain" / "done.json").write_text(json.dumps(done))
            line = {"step": 10, "eval": {"nll": LAW.loss(size, tokens)}}
            (folder / "pretrain" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            found.append(folder)
    return found


def test_runs_of_ones_own_give_their_law(capsys, runs, tmp_path):
    code, out, _ = answer(capsys, "--isoflop", *runs, "tolerance=0.3", "budget=1e16", f"out={tmp_path / 'fit.json'}")
    assert code == 0
    assert "12 runs of 3 budgets" in out
    assert "L(N, D)" in out and "at 1e+16" in out
    figures = json.loads((tmp_path / "fit.json").read_text())
    for name in ("E", "A", "B", "alpha", "beta"):
        assert figures["law"][name] == pytest.approx(getattr(LAW, name), rel=1e-4), name
    flops = np.array([run["flops"] / (6 * run["parameters"] * run["tokens"]) for run in figures["runs"]])
    assert np.all((flops > 1.0) & (flops < 1.1))  # and a little attention; the embeddings are also the output matrix


def test_runs_that_are_too_few_are_told(capsys, runs):
    code, out, _ = answer(capsys, "--isoflop", *runs[:2])
    assert code == 1
    assert "too few" in out and "2 runs, and at least 8 are needed" in " ".join(out.split())


def test_a_run_that_is_not_finished_is_named(capsys, runs, tmp_path):
    (tmp_path / "half" / "pretrain").mkdir(parents=True)
    (tmp_path / "half" / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n')
    code, _, err = answer(capsys, "--isoflop", runs[0], tmp_path / "half")
    assert code == 2
    assert f"{tmp_path / 'half'}: no finished pretraining there" in err
