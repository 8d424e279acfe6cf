"""The arithmetic world: right answers, a held-out fifth that no training file knows, demonstrations good and bad."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from jaxgpt.config.load import ConfigError, load
from jaxgpt.config.schema import ArithmeticConfig, NumberReward
from jaxgpt.data.arithmetic.files import FILES
from jaxgpt.data.arithmetic.problems import KINDS, Operation, draw_problem, is_held_out, is_problem, sample_problems
from jaxgpt.data.arithmetic.solutions import at_once, careless, steps, worked
from jaxgpt.data.worlds import write_world
from jaxgpt.graders import final_number, grader

SMALL = ArithmeticConfig(documents=3_000, instructions=2_000, prompts=1_000, held_out=200)
TRAINING = ("text", "instructions", "prompts")
TWO_DIGITS = [number for number in range(11, 100) if number % 10]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arithmetic") / "data"
    write_world(folder, SMALL)
    return folder


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def calculated(text: str) -> set[Operation]:
    """Every calculation that a text states, asks for, or puts in words."""
    found = {Operation(int(a), sign, int(b)) for a, sign, b in re.findall(r"(\d+) ?([-+*]) ?(\d+)", text)}
    found |= {Operation(int(a), "+", int(b)) for a, b in re.findall(r"Add (\d+) and (\d+)", text)}
    found |= {Operation(int(a), "-", int(b)) for b, a in re.findall(r"Take (\d+) from (\d+)", text)}
    return found | {Operation(int(a), "*", int(b)) for a, b in re.findall(r"Multiply (\d+) by (\d+)", text)}


def story(prompt: str) -> tuple[Operation, ...]:
    """The operations of a story, read from its words."""
    a, b, *rest = map(int, re.findall(r"\d+", prompt))
    if "finds" in prompt:
        return Operation(a, "+", b), Operation(a + b, "-", rest[0])
    if "together" in prompt:
        return Operation(a, "+", b), Operation(a + b, "+", a)
    return Operation(a, "*", b), Operation(a * b, "-" if "sells" in prompt else "+", rest[0])


def test_one_config_gives_one_world_to_the_byte(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "data", SMALL)
    names = {*FILES, "world.json"}
    assert {path.name for path in world.iterdir()} == names
    assert all((tmp_path / "data" / name).read_bytes() == (world / name).read_bytes() for name in names)
    write_world(tmp_path / "data", SMALL.model_copy(update={"seed": 1}))
    assert all((tmp_path / "data" / name).read_bytes() != (world / name).read_bytes() for name in names)


def test_files_have_the_numbers_of_records_that_the_config_asks_for(world: Path) -> None:
    counts = {path.stem: len(path.read_text().splitlines()) for path in world.glob("*.jsonl")}
    assert counts == {
        "text": 3_000,
        "instructions": 2_000,
        "instructions_eval": 200,
        "prompts": 1_000,
        "prompts_eval": 200,
    }
    for name in ("instructions", "prompts", "prompts_eval"):
        found = Counter(record["kind"] for record in read(world, name))
        assert found == {kind: round(share * sum(found.values())) for kind, share in KINDS.items()}


def test_answers_are_what_the_prompts_ask_for(world: Path) -> None:
    for record in read(world, "prompts") + read(world, "prompts_eval"):
        operations = story(record["prompt"]) if record["kind"] == "stories" else calculated(record["prompt"])
        assert record["answer"] == str(list(operations)[-1].result)
        assert int(record["answer"]) >= 0


def test_a_fifth_of_the_problems_is_held_out() -> None:
    pairs = [(a, b) for a in TWO_DIGITS for b in TWO_DIGITS if a >= b]
    for sign in ("+", "-"):
        share = sum(is_held_out(Operation(a, sign, b)) for a, b in pairs) / len(pairs)
        assert share == pytest.approx(0.2, abs=0.02)
    assert all(is_held_out(Operation(a, "+", b)) == is_held_out(Operation(b, "+", a)) for a, b in pairs)


def test_no_training_file_states_a_held_out_problem_or_asks_for_it(world: Path) -> None:
    known: set[Operation] = set()
    for name in TRAINING:
        known |= calculated((world / f"{name}.jsonl").read_text().replace("\\n", "\n"))
    problems = {operation for operation in known if is_problem(operation)}
    assert len(problems) > 4_000
    assert not [str(operation) for operation in problems if is_held_out(operation)]
    held = {operation for record in read(world, "prompts_eval") for operation in calculated(record["prompt"])}
    assert len(held) > 100 and all(map(is_problem, held)) and all(map(is_held_out, held))


def test_no_training_file_tells_a_held_out_story(world: Path) -> None:
    pattern = r"(?:Mia|Tom|Ana|Ben|Eva|Leo|Ida|Max) has \d+[^?]*\?"
    told = [one for name in TRAINING for one in re.findall(pattern, (world / f"{name}.jsonl").read_text())]
    assert len(told) > 2_000
    for prompt in told:
        operations = story(prompt)
        assert not is_held_out(*operations)
        assert not any(is_problem(one) and is_held_out(one) for one in operations)
    held = [story(record["prompt"]) for record in read(world, "prompts_eval") if record["kind"] == "stories"]
    assert len(set(held)) == len(held) and all(is_held_out(*operations) for operations in held)


def test_held_out_prompts_are_different_problems(world: Path) -> None:
    records = read(world, "prompts_eval")
    plain = [record for record in records if record["kind"] != "stories"]
    assert len({next(iter(calculated(record["prompt"]))) for record in plain}) == len(plain)
    assert [record["messages"][0]["content"] for record in read(world, "instructions_eval")] == [
        record["prompt"] for record in records
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_worked_solutions_are_right_in_every_step_and_made_of_small_ones(kind: str) -> None:
    rng = Random(kind)
    for held_out in (False, True):
        for _ in range(200):
            problem = draw_problem(rng, kind, held_out)
            *lines, last = worked(problem).splitlines()
            for line in lines:
                left, result = line.split("=")
                (operation,) = calculated(left)
                assert operation.result == int(result)
                assert not is_problem(operation)
            assert last == at_once(problem) == f"#### {problem.answer}"
            assert int(lines[-1].split("=")[1]) == problem.answer and len(lines) == len(steps(problem)) >= 2


def test_careless_solutions_are_wrong_for_the_grader() -> None:
    grade, rng = grader(NumberReward(), "x"), Random(0)
    found = [
        (grade(problem.record(), careless(rng, problem), 0), careless(rng, problem))
        for problem in sample_problems(rng, 1_000, held_out=False)
    ]
    assert sum(score for score, _ in found) / 1_000 < 0.05  # a line left out may hold the answer, as in 8 - 4 = 4
    marked = sum("####" in text for _, text in found) / 1_000
    assert 0.28 < marked < 0.39


def test_a_slip_is_carried_on() -> None:
    rng = Random(1)
    problem = next(p for p in sample_problems(rng, 50, held_out=False) if p.kind == "stories")
    texts = {text for _ in range(200) if "####" in (text := careless(rng, problem))}
    for text in texts:
        wrong = []
        for line in text.splitlines()[:-1]:
            left, result = line.split("=")
            (operation,) = calculated(left)
            wrong.append(int(result) - operation.result)
        assert [off for off in wrong if off] in ([-10], [-1], [1], [10])  # one step is wrong, the rest follow from it
    assert len(texts) > 10


def test_demonstrations_have_the_shares_that_the_config_asks_for(world: Path) -> None:
    for kind in KINDS:
        texts = [record["messages"][1]["content"] for record in read(world, "instructions") if record["kind"] == kind]
        direct = sum(text.startswith("####") for text in texts) / len(texts)
        assert direct == pytest.approx(SMALL.at_once / 2 if kind == "stories" else SMALL.at_once, abs=0.06)
    evals = zip(read(world, "instructions_eval"), read(world, "prompts_eval"), strict=True)
    assert all(final_number(a["messages"][1]["content"]) == int(b["answer"]) for a, b in evals)


def test_shares_are_no_more_than_all(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("prepare: {type: arithmetic, at_once: 0.7, careless: 0.4}\n")
    with pytest.raises(ConfigError, match=r"prepare: at_once 0.7 and careless 0.4 are more than 1 together"):
        load(tmp_path / "run.yaml")
