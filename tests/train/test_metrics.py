"""metrics.jsonl tells of every step once, whatever interrupted it; the console says the same in plain lines."""

import io
import json
import re
import time

import pytest
from rich.console import Console

from jaxgpt.health import Limits
from jaxgpt.train.metrics import Clock, ConsoleLine, JsonLines, Warnings

TIME = {"seconds": 1.0, "tokens_per_second": 1234.5, "wait": 0.5}


def line(step, **values):
    return {"step": step, "loss": 1.5, "skipped": 0, "time": TIME} | values


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def test_lines_after_the_restored_step_are_cut(tmp_path):
    path = tmp_path / "stage" / "metrics.jsonl"
    writer = JsonLines(path, after=0)
    for step in range(1, 6):
        writer.write(line(step))
        if step % 2 == 0:
            writer.write({"step": step, "eval": {"nll": 2.0}})
    writer.close()
    writer = JsonLines(path, after=4)
    writer.write(line(5, loss=9.0))
    writer.close()
    assert [(found["step"], "eval" in found) for found in read(path)] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False)
    ]  # fmt: skip
    assert read(path)[-1]["loss"] == 9.0
    JsonLines(path, after=0).close()
    assert read(path) == []


def test_a_half_written_line_goes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps(line(1)) + "\n"
    for torn in ('{"step": 2, "lo', "2", '{"st', "\x00\x00\x00", '{"loss": 1.0}'):
        path.write_text(good + torn)
        JsonLines(path, after=9).close()
        assert path.read_text() == good
    path.write_bytes(good.encode() + b'{"step": 2, "name": "\xc3')
    JsonLines(path, after=9).close()
    assert path.read_text() == good
    path.write_text(good.rstrip("\n"))  # whole but for its end of line
    writer = JsonLines(path, after=9)
    writer.write(line(2))
    writer.close()
    assert [found["step"] for found in read(path)] == [1, 2]


def test_flushed_lines_are_on_the_disk(tmp_path):
    writer = JsonLines(tmp_path / "metrics.jsonl", after=0)
    writer.write(line(1))
    writer.flush()
    assert [found["step"] for found in read(tmp_path / "metrics.jsonl")] == [1]
    writer.close()


def test_the_console_has_plain_lines_where_it_is_no_terminal():
    out = io.StringIO()
    writer = ConsoleLine(Console(file=out, width=200), "sft", steps=5, start=0, every=2)
    for step in range(1, 6):
        writer.write(line(step, lr=0.001, loss=None if step == 4 else 1.5, skipped=int(step == 4)))
    writer.write({"step": 5, "eval": {"nll": 0.25, "accuracy": None}, "time": TIME})
    writer.close()
    assert out.getvalue().splitlines() == [
        "sft step 2/5  wait 50%  loss 1.5  lr 0.001  1,234 tok/s",
        "sft step 4/5  skipped 1  wait 50%  loss not finite  lr 0.001  1,234 tok/s",
        "sft step 5/5  wait 50%  loss 1.5  lr 0.001  1,234 tok/s",
        "sft step 5/5  eval  nll 0.25  accuracy not finite",
    ]


PPO = {
    "loss": -0.01234,
    "objective/scores": 0.5678,
    "objective/kl": 1.234,
    "objective/kl_k3": 1.1987,
    "objective/entropy": 0.3342,
    "objective/length": 21.46,
    "objective/eos_rate": 0.9844,
    "val/ratio": 1.003,
    "policy/clipfrac_avg": 0.0512,
    "lr": 0.00012,
    "grad_norm": 0.8,
    "time": TIME | {"wait": 0.0},
}


@pytest.mark.parametrize(
    ("width", "figures"),
    [
        (40, ""),
        (60, "score 0.568  kl 1.23"),
        (80, "score 0.568  kl 1.23  k3 1.2  clip 0.0512"),
        (100, "score 0.568  kl 1.23  k3 1.2  clip 0.0512  ratio 1  ent 0.334"),
        (200, "score 0.568  kl 1.23  k3 1.2  clip 0.0512  ratio 1  ent 0.334  len 21.5  eos 0.984  loss -0.01234  lr"),
    ],
)
def test_a_live_line_keeps_name_step_and_eta_and_the_figures_that_fit(width, figures):
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=True, legacy_windows=False, color_system=None)
    writer = ConsoleLine(console, "ppo", steps=560, start=0, every=1)
    for step in (120, 130):
        writer.write(line(step, **PPO))
    writer.close()
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n").splitlines()[-1].rstrip()
    assert len(last) <= width
    assert re.match(r"ppo [━╸╺ ]{12} 130/560 \S+", last), last
    assert last[len("ppo") + 1 + 12 + 1 + len("130/560") + 1 :].partition(" ")[2].strip().startswith(figures)
    assert ("tok/s" in last) == (width == 200)


def test_steps_that_are_written_together_share_their_time():
    clock = Clock(0.0, tokens_per_step=50)
    time.sleep(0.05)
    assert 1000 < clock.lap(2)["tokens_per_second"] <= 2000


def test_the_clock_goes_on_from_earlier_starts_and_leaves_evaluations_out():
    clock = Clock(100.0, tokens_per_step=50)
    since = clock.now()
    time.sleep(0.05)
    clock.waited(since)
    lap = clock.lap()
    assert 100.05 <= lap["seconds"] < 110 and lap["tokens_per_second"] <= 1000 and 0.5 < lap["wait"] <= 1
    time.sleep(0.2)
    clock.skip()
    lap = clock.lap()
    assert lap["tokens_per_second"] > 1000 and lap["wait"] == 0.0 and lap["seconds"] >= 100.25


def test_an_evaluation_shows_errors_beside_what_they_belong_to():
    out = io.StringIO()
    writer = ConsoleLine(Console(file=out, width=200), "ppo", steps=9, start=0, every=1)
    writer.write({"step": 5, "eval": {"gold": 1.25, "gold_error": 0.0456, "kl": 0.5}, "time": TIME})
    assert out.getvalue() == "ppo step 5/9  eval  gold 1.25 ± 0.046  kl 0.5\n"


def test_warnings_are_yellow_on_a_terminal_and_plain_elsewhere(tmp_path):
    for number, terminal in enumerate((True, False)):
        out, folder = io.StringIO(), tmp_path / str(number)
        writer = Warnings(folder, 0, Limits(), Console(file=out, width=400, force_terminal=terminal))
        writer.write(line(1))
        writer.write(line(2, skipped=1))
        writer.close()
        assert ("\x1b[33m" in out.getvalue()) == terminal
        assert "warning: step 2: loss, gradient or update is not finite" in out.getvalue()
        assert [found["step"] for found in read(folder / "warnings.jsonl")] == [2]
