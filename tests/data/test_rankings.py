"""Rankings: every response beside its rank, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.chat import render
from jaxgpt.data.meadow.sources import documents
from jaxgpt.data.rankings import check_split, load_rankings
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.errors import UserError

GOOD = {"prompt": "What does a fox eat?", "responses": ["Berries.", "Fish.", "I do not know."], "ranks": [1, 3, 2]}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(documents("commoncrawl", 300, 0), TokenizerConfig(vocab=400))


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_a_row_holds_each_response_as_a_conversation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = load_rankings(write(tmp_path / "a.jsonl", GOOD), tokenizer, 64, 4)
    assert len(rows) == 1
    row = rows[0]
    assert (row["tokens"].shape, row["lengths"].shape, row["ranks"].shape) == ((4, 64), (4,), (4,))
    assert {value.dtype.name for value in row.values()} == {"int32"}
    assert row["ranks"].tolist() == [1, 3, 2, 0]
    for number, response in enumerate(GOOD["responses"]):
        messages = [{"role": "user", "content": GOOD["prompt"]}, {"role": "assistant", "content": response}]
        ids, _ = render(tokenizer, messages)
        assert row["lengths"][number] == len(ids)
        assert row["tokens"][number, : len(ids)].tolist() == ids
        assert ids[-1] == tokenizer.eos
        assert row["tokens"][number, len(ids) :].sum() == 0
    assert row["lengths"][3] == 0


def test_a_pair_is_a_ranking_of_two(tokenizer: Tokenizer, tmp_path: Path) -> None:
    pair = {"prompt": "Hello!", "chosen": "Hi.", "rejected": "No."}
    spoken = {"prompt": [{"role": "user", "content": "Hello!"}], "responses": ["Hi.", "No."], "ranks": [1, 2]}
    listed = {**pair, "chosen": [{"role": "assistant", "content": "Hi."}]}
    rows = load_rankings(write(tmp_path / "a.jsonl", pair, spoken, listed), tokenizer, 64, 9)
    assert rows[0]["ranks"].tolist() == [1, 2] + [0] * 7
    for row in (rows[1], rows[2]):
        assert all((row[name] == rows[0][name]).all() for name in row)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("[1, 2]", r"a\.jsonl:2: .*expected an object"),
        ({**GOOD, "ranks": [1, 2]}, r'a\.jsonl:2: "ranks" has 2 entries for 3 responses; give each response one rank'),
        ({**GOOD, "ranks": [1, 2, 0]}, r'a\.jsonl:2: "ranks" is .*expected whole numbers from 1'),
        ({**GOOD, "ranks": [1, 2.5, 3]}, r"a\.jsonl:2: .*expected whole numbers from 1"),
        ({**GOOD, "ranks": [True, 2, 3]}, r"a\.jsonl:2: .*expected whole numbers from 1"),
        ({**GOOD, "ranks": [2, 2, 2]}, r"a\.jsonl:2: all ranks are equal"),
        ({**GOOD, "responses": ["one"], "ranks": [1]}, r'a\.jsonl:2: "responses" is .* at least two'),
        (
            {**GOOD, "responses": list("abcde"), "ranks": [1, 2, 3, 4, 5]},
            r"a\.jsonl:2: 5 responses, reward\.responses is 4",
        ),
        ({**GOOD, "responses": ["a", "b", 3]}, r"a\.jsonl:2: a response is 3, expected a string"),
        (
            {**GOOD, "responses": ["a", "b", "The fox. " * 40]},
            r"a\.jsonl:2: response 3 .* reward\.context is 64; raise",
        ),
        ({"prompt": "Hi", "chosen": "a"}, r'a\.jsonl:2: needs "responses" and "ranks", or "chosen" and "rejected"'),
        ({"promt": "Hi", "chosen": "a", "rejected": "b"}, r"a\.jsonl:2: .*Did you mean 'promt'"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(
    tokenizer: Tokenizer, tmp_path: Path, record: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_rankings(write(tmp_path / "a.jsonl", GOOD, record), tokenizer, 64, 4)


def test_a_prompt_on_both_sides_of_the_split_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = {**GOOD, "prompt": "What does an owl eat?"}
    train = load_rankings(write(tmp_path / "train.jsonl", other, GOOD), tokenizer, 64, 4)
    clean = load_rankings(write(tmp_path / "clean.jsonl", {**GOOD, "prompt": "Hello!"}), tokenizer, 64, 4)
    check_split(train, clean)
    spoken = {**GOOD, "prompt": [{"role": "user", "content": GOOD["prompt"]}]}
    leaky = load_rankings(write(tmp_path / "leaky.jsonl", {**GOOD, "prompt": "Hello!"}, spoken), tokenizer, 64, 4)
    with pytest.raises(UserError, match=r"leaky\.jsonl:2: its prompt is also at .*train\.jsonl:2; 1 of 2 held-out"):
        check_split(train, leaky)
