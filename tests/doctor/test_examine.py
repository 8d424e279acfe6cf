"""A run without a fault: everything is looked at, all holds, and nothing but data is written."""

from __future__ import annotations

import io
import math
import re

import pytest
from examined import setup, told
from rich.console import Console

from jaxgpt.doctor import rows
from jaxgpt.doctor.check import below, near, none_of, show
from jaxgpt.runs import STAGES


@pytest.fixture(scope="module")
def whole(untrained):
    return told(setup(untrained, STAGES))


def test_every_stage_is_examined_before_anything_is_trained(whole, untrained):
    assert (whole.code, whole.failed) == (0, set())
    titles = [line.split()[0] for line in whole.text.splitlines() if re.match(r"[a-z]+  |pretrain$", line)]
    assert [title for title in titles if title in STAGES] == list(STAGES)
    assert "ppo  (sft, reward not trained yet: new parameters stand for it)" in whole.text
    assert not any((untrained / "small" / name).exists() for name in STAGES)


def test_the_first_figures_are_those_of_the_formulas(whole):
    assert f"log 128 = {math.log(128):.4f}" in whole.line("loss at init, nats a token")
    assert "0.6931  (log 2 = 0.6931" in whole.line("loss at init, nats a ranking")
    for name in ("KL at step 0, k1", "KL at step 0, k3", "gradient into other documents"):
        assert f"{whole.line(name)[6:].split(name)[1].split()[0]}" == "0"


def test_rows_are_shown_with_what_is_trained(whole):
    assert re.search(r"talks.jsonl:1  <s><\|user\|>.*<\|assistant\|>\[saw a .*</s>\]\n", whole.text)
    assert re.search(r"rankings.jsonl:1 rank 1  <s>.*\[.*\]\n", whole.text)
    assert re.search(r"prompts.jsonl:1  <s><\|user\|>[^\[]*<\|assistant\|>\n", whole.text)


def test_finished_parents_are_used(trained):
    found = told(setup(trained, ("reward", "ppo")))
    assert found.failed == set() and "not trained yet" not in found.text
    assert "ok" in found.line("not finite: finished reward")


def test_a_failure_says_what_to_change_and_a_figure_does_not():
    def lines(check, **kind) -> str:
        file = io.StringIO()
        show(Console(file=file, width=80, soft_wrap=not kind, **kind), check)
        return file.getvalue()

    bad = below("gap", 0.5, 1e-3, "mend it " * 20)
    assert lines(bad) == f"FAIL  {'gap':<38} 0.5  (below 0.001)  {('mend it ' * 20).strip()}\n"
    assert "mend" not in lines(below("gap", 1e-4, 1e-3, "mend it"))
    assert lines(below("gap", 0.5, None, "mend it")) == f"--    {'gap':<38} 0.5\n"
    assert max(map(len, re.sub(r"\x1b\[[0-9;]*m", "", lines(bad, force_terminal=True)).splitlines())) <= 80


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_what_is_no_number_never_holds(figure):
    assert not below("gap", figure, 1.0, "").holds
    assert not near("gap", figure, 1.0, 1.0, "", "one").holds
    assert none_of("count", 0, "").holds


def test_a_row_from_a_stranger_cannot_speak_to_the_terminal():
    row = [rows.Run(rows._shown("a\x1b[31m\nb"), False, True)]
    assert rows.plain(row) == "[a\\x1b[31m\\nb]"
