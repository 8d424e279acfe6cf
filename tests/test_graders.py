"""Verifiable rewards: what the final number is, what each grader gives, what is told of records and functions."""

import json
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from jaxgpt.config.load import ConfigError, load
from jaxgpt.config.schema import ExactReward, FunctionReward, LengthReward, ModelReward, NumberReward, RegexReward
from jaxgpt.data.prompts import PromptRows
from jaxgpt.data.records import read_jsonl
from jaxgpt.errors import UserError
from jaxgpt.graders import check_records, final_number, grader, load_scorer

MINUS, DASH = "\u2212", "\u2013"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 72", 72),
        ("####72", 72),
        ("48 + 24 = <<48+24=72>>72 clips\n#### 72", 72),
        ("#### 1\nNo, that is wrong.\n#### 2", 2),
        ("#### 12\nThat is 3 more than 9.", 12),
        ("####\n\n7 days", 7),
        ("There are 3 apples and 4 pears.", 4),
        ("A: 18", 18),
        ("= 12", 12),
        ("18.", 18),
        ("18.00", 18),
        ("$18.50", Decimal("18.5")),
        (".5", Decimal("0.5")),
        ("$1,000.", 1000),
        ("1,234,567", 1_234_567),
        ("1,234.5 liters", Decimal("1234.5")),
        ("1,2 and 3,45", 45),  # no thousands
        ("[1,2,3]", 3),
        ("€7 per hour", 7),
        ("12%", 12),
        ("5th", 5),
        ("twenty-5", 5),
        ("-7", -7),
        (f"#### {MINUS}47", -47),
        (f"{DASH}3 degrees", -3),
        ("-$5.00", -5),
        ("$-5", -5),
        ("x=-4", -4),
        ("10-3", 3),
        (f"2{DASH}4 days", 4),
        ("(8)-2", 2),
        ("50%-5", 5),
        ("2e3", 2000),
        ("1.5E-3", Decimal("0.0015")),
        (f"3e{MINUS}2", Decimal("0.03")),
        ("3e9999", 9999),  # no exponent that long
        ("2eggs", 2),
        ("3/4", Decimal("0.75")),
        ("-3/4 cup", Decimal("-0.75")),
        ("6 / 4", Decimal("1.5")),
        ("1 1/2 hours", Decimal("1.5")),
        ("-2 1/4", Decimal("-2.25")),
        ("in 2023 7/2", Decimal("3.5")),
        ("$12/hour", 12),
        ("on 3/4/2020", 2020),
        ("7/0", 0),
        ("\\boxed{5}", 5),
        ("**9**", 9),
        ("", None),
        ("no number here", None),
        ("12 + 3\n####", None),  # the mark was made, and nothing follows it
        ("#### none", None),
        ("$ - . , / ½", None),
    ],
)
def test_the_final_number(text: str, number: int | Decimal | None) -> None:
    assert final_number(text) == number


def test_fractions_are_equal_when_their_values_are() -> None:
    assert final_number("1/3") == final_number("2/6") == final_number("100,000/300,000")
    assert final_number("1/3") != final_number("0.333")
    assert final_number("9" * 60) == int("9" * 60)


def test_a_number_is_right_however_it_is_written() -> None:
    grade = grader(NumberReward(), "ppo.rewards[0]")
    for answer in ("18", 18, 18.0, "18.00", "$18", "9 + 9 = 18\n#### 18"):
        assert [grade({"answer": answer}, text, 9) for text in ("so 18.", "#### 18.0", "$18.00")] == [1, 1, 1]
        assert [grade({"answer": answer}, text, 9) for text in ("", "17", "#### 17\n", "18 #### 81")] == [0, 0, 0, 0]
    assert grader(NumberReward(field="solution"), "x")({"answer": 1, "solution": "1,000"}, "1000 eggs", 3) == 1


def test_exact_ignores_surrounding_spaces_alone() -> None:
    grade = grader(ExactReward(), "ppo.rewards[0]")
    assert [grade({"answer": " a fox"}, text, 3) for text in ("a fox", "a fox\n", "A fox", "a fox.", "")] == [
        1,
        1,
        0,
        0,
        0,
    ]
    assert grade({"answer": 7}, "7", 1) == 1 and grade({"answer": 7}, "7.0", 3) == 0


def test_a_pattern_is_looked_for_anywhere() -> None:
    assert grader(RegexReward(pattern=r"\d+ eggs"), "x")({}, "so 12 eggs.", 5) == 1
    bound = grader(RegexReward(pattern=r"^#### -?\d+$"), "x")
    assert [bound({}, text, 5) for text in ("#### 12", "a\n#### 12", "", "#### x")] == [1, 0, 0, 0]


def test_length_costs_1_for_each_target_beyond_the_first() -> None:
    grade = grader(LengthReward(target=40), "x")
    assert [grade({}, "any", tokens) for tokens in (0, 40, 50, 80, 140)] == [0, 0, -0.25, -1, -2.5]


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judges.py").write_text(
        "import math\n"
        "def count(record, response): return len(response) * record['factor']\n"
        "def whole(record, response): return True\n"
        "def missing(record, response):\n    return record['nothing']\n"
        "def nan(record, response): return math.nan\n"
        "def infinite(record, response): return math.inf\n"
        "def none(record, response): pass\n"
        "def text(record, response): return '1'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("judges", None)


def test_a_function_of_the_users_gets_record_and_response(judges: None) -> None:
    assert grader(FunctionReward(function="judges:count"), "x")({"factor": 0.5}, "abc", 9) == 1.5
    assert grader(FunctionReward(function="judges:whole"), "x")({}, "abc", 9) == 1


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing", r"judges:missing raised KeyError: 'nothing' \(.*judges.py:5\) for the response"),
        ("nan", "judges:nan gave NaN for the response"),
        ("infinite", "judges:infinite gave Infinity for the response"),
        ("none", "judges:none gave null for the response"),
        ("text", 'judges:text gave "1" for the response'),
    ],
)
def test_a_function_that_fails_is_told_with_the_record(judges: None, name: str, said: str) -> None:
    grade = grader(FunctionReward(function=f"judges:{name}"), "ppo.rewards[1]")
    with pytest.raises(UserError, match=rf"^ppo.rewards\[1\].function: {said} \"so 7\" to .*\"What is 3 \+ 4"):
        grade({"prompt": "What is 3 + 4?", "answer": 7}, "so 7", 3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gold_score", "x is 'gold_score'; expected module:function, as jaxgpt.data.meadow:gold_score"),
        (":score", "x is ':score'; expected module:function"),
        ("nowhere.at_all:score", "x: cannot import nowhere.at_all .ModuleNotFoundError: No module named 'nowhere'"),
        ("jaxgpt.data.meadow:gold_scor", "x: jaxgpt.data.meadow has no function gold_scor. Did you mean 'gold_score'"),
        ("broken_judge:score", "x: cannot import broken_judge .ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_cannot_be_had_is_told(name: str, said: str, judges: None) -> None:
    Path("broken_judge.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=said):
        load_scorer(name, "x")


def rows(folder: Path, *records: object) -> PromptRows:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return PromptRows([[1]] * len(records), list(read_jsonl(file)), 4, 0)


@pytest.mark.parametrize(
    ("term", "record", "said"),
    [
        (
            NumberReward(),
            {"prompt": "?", "answr": 3},
            'no key "answer", and .* has "answr", "prompt". Did you mean .answr',
        ),
        (
            ExactReward(field="gold"),
            {"prompt": "?"},
            r'no key "gold", and .*; the record has "prompt". .*\[1\].field names',
        ),
        (
            ExactReward(),
            {"answer": None},
            r'"answer" is null, expected text or a number; ppo.rewards\[1\] \(type exact\)',
        ),
        (NumberReward(), {"answer": [3]}, r'"answer" is \[3\], expected text or a number'),
        (NumberReward(), {"answer": True}, '"answer" is true, expected text or a number'),
        (NumberReward(), {"answer": "a fox"}, '"answer" is "a fox", which has no number; .* compares with it'),
        (NumberReward(), {"answer": "3\n####"}, ".*which has no number"),
    ],
)
def test_a_record_that_cannot_be_graded_is_told_by_file_and_line(term, record, said, tmp_path: Path) -> None:
    good = {"answer": 3, "gold": "x"}
    check_records((ModelReward(), term), rows(tmp_path, good, good), "ppo.rewards")
    with pytest.raises(UserError, match=f"prompts.jsonl:2: {said}"):
        check_records((ModelReward(), term), rows(tmp_path, good, record), "ppo.rewards")


def test_other_rewards_ask_nothing_of_a_record(tmp_path: Path, judges: None) -> None:
    terms = (ModelReward(), RegexReward(pattern="x"), LengthReward(), FunctionReward(function="judges:count"))
    check_records(terms, rows(tmp_path, {"prompt": "?"}), "ppo.rewards")
    with pytest.raises(
        UserError, match=r"ppo.rewards\[0\].function: judges has no function cont. Did you mean 'count'"
    ):
        check_records((FunctionReward(function="judges:cont"),), rows(tmp_path, {"prompt": "?"}), "ppo.rewards")


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ('[{type: regex, pattern: "("}]', r"ppo.rewards\[0\]: pattern '\(' is no regular expression: missing \)"),
        ("[{type: regex}]", r"ppo.rewards\[0\].pattern .*: must be set, text"),
        ("[{type: number}, {type: nmber}]", r"ppo.rewards\[1\].type .*: found 'nmber', .* Did you mean 'number'\?"),
        ("[{type: number, feld: x}]", r"ppo.rewards\[0\].feld .*: no such field. Did you mean 'field'\?"),
        ("[{type: length, target: 0}]", r"ppo.rewards\[0\].target .*: found 0, expected a whole number, 1 or more"),
        ("[{field: x}]", r"ppo.rewards\[0\].type .*: must be set, model, exact, number"),
        ("[number]", r"ppo.rewards\[0\] .*: found 'number', expected a section whose type is model"),
        ("[]", r"ppo.rewards .*: found \[\], expected a list, each item a section"),
    ],
)
def test_the_config_tells_what_is_wrong_with_a_reward(rewards: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match=said):
        load(tmp_path / "run.yaml", [f"ppo.rewards={rewards}"])


def test_a_config_may_have_several_rewards(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        "ppo:\n  rewards:\n    - type: number\n    - {type: length, target: 9, weight: 0.5}\n"
    )
    config = load(tmp_path / "run.yaml").config
    assert config.ppo is not None and config.ppo.rewards == (NumberReward(), LengthReward(target=9, weight=0.5))
