"""Rankings: every response beside its rank, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt.config.schema import Rankings, TokenizerConfig
from jaxgpt.data.chat import render
from jaxgpt.data.meadow.sources import documents
from jaxgpt.data.rankings import check_split, held_prompts, load_rankings, load_split
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
    more = {"prompt": "Hello!", "responses": list("abcd"), "ranks": [1, 2, 2, 3], "margin": 0.5}
    rows = load_rankings(write(tmp_path / "a.jsonl", GOOD, more), tokenizer, 64, 9)
    assert len(rows) == 2
    row = rows[0]
    assert (row["tokens"].shape, row["lengths"].shape, row["ranks"].shape) == ((4, 32), (4,), (4,))
    assert {name: value.dtype.name for name, value in row.items() if name != "margin"} == dict.fromkeys(
        ("tokens", "lengths", "ranks"), "int32"
    )
    assert (row["margin"].dtype, row["margin"].shape) == (np.float32, ())
    assert (row["margin"], rows[1]["margin"]) == (0.0, 0.5)
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
    assert rows[0]["ranks"].tolist() == [1, 2]
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
        ({**GOOD, "responses": ["a", "b", 3]}, r'a\.jsonl:2: "responses"\[2\] is 3, expected a string'),
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


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def test_the_prompt_of_whole_conversations_is_what_they_have_in_common(tokenizer: Tokenizer, tmp_path: Path) -> None:
    plain = {"prompt": talk("Hello!", "Hi.", "Who?"), "chosen": "A fox.", "rejected": "No."}
    whole = {"chosen": talk("Hello!", "Hi.", "Who?", "A fox."), "rejected": talk("Hello!", "Hi.", "Who?", "No.")}
    both = {"prompt": plain["prompt"], **whole}
    listed = {"responses": [whole["rejected"], whole["chosen"]], "ranks": [2, 1]}
    rows = load_rankings(write(tmp_path / "a.jsonl", plain, whole, both, listed), tokenizer, 96, 2)
    assert len({ranking.prompt for ranking in rows.rankings}) == 1
    assert rows.rankings[1].messages == plain["prompt"]
    for row in (rows[1], rows[2]):
        assert all((row[name] == rows[0][name]).all() for name in row)
    assert (rows[3]["tokens"][::-1] == rows[0]["tokens"]).all()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"chosen": talk("Hi", "a"), "rejected": talk("Ho", "b")}, "the responses have no message in common"),
        ({"chosen": talk("Hi", "a"), "rejected": talk("Hi")}, "have nothing behind the messages that all have in com"),
        ({"chosen": talk("Hi", "a"), "rejected": "b"}, 'no key "prompt"'),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "big"}, "\"margin\" is 'big', expected a number"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": float("inf")}, '"margin" is inf'),
    ],
)
def test_a_pair_without_a_prompt_or_with_a_wrong_margin_is_named(
    tokenizer: Tokenizer, tmp_path: Path, record: Any, message: str
) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:2: .*" + message):
        load_rankings(write(tmp_path / "a.jsonl", GOOD, record), tokenizer, 64, 4)


def test_a_ranking_of_ties_alone_is_kept_where_ties_count(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**GOOD, "ranks": [2, 2, 2]})
    assert load_rankings(path, tokenizer, 64, 4, ties="half").rankings[0].ranks == (2, 2, 2)
    with pytest.raises(UserError, match=r"drop the line, or set reward\.ties=half"):
        load_rankings(path, tokenizer, 64, 4)


def test_the_subset_or_kind_or_source_of_a_record_is_kept(tokenizer: Tokenizer, tmp_path: Path) -> None:
    marks = [{"subset": "a", "source": "b"}, {"kind": "c"}, {"source": "d"}, {"kind": 3, "source": "e"}, {}]
    rows = load_rankings(write(tmp_path / "a.jsonl", *({**GOOD, **mark} for mark in marks)), tokenizer, 64, 4)
    assert [ranking.kind for ranking in rows.rankings] == ["a", "c", "d", "e", None]


def test_all_rankings_of_a_prompt_are_held_out_or_none(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Detail 25: train/val split by prompt, no prompt id in both."""
    records = [{**GOOD, "prompt": f"{n % 40}?"} for n in range(120)]
    path = str(write(tmp_path / "a.jsonl", *records))
    data = Rankings(path=path, val_fraction=0.3)
    train, test = load_split(data, lambda given: [given], tokenizer, 64, 4)
    sides = [{ranking.prompt for ranking in side.rankings} for side in (train, test)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 40
    assert len(train) + len(test) == 120 and len(test) == 3 * len(sides[1])
    assert 6 <= len(sides[1]) <= 18
    again = write(tmp_path / "b.jsonl", *records[::-1])
    assert {r.prompt for r in load_split(data, lambda _: [again], tokenizer, 64, 4)[1].rankings} == sides[1]
    more = held_prompts(sorted(sides[0] | sides[1]), 0.6)
    assert sides[1] < more < sides[0] | sides[1]
    assert len(held_prompts(["a", "b", "c"], 1e-9)) == 1 and len(held_prompts(["a", "b", "c"], 0.999)) == 2
    lone = str(write(tmp_path / "c.jsonl", GOOD, GOOD))
    with pytest.raises(UserError, match=r"val_fraction is 0\.3, and all rankings are of one prompt"):
        load_split(Rankings(path=lone, val_fraction=0.3), lambda given: [given], tokenizer, 64, 4)


def test_a_prompt_on_both_sides_of_the_split_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = {**GOOD, "prompt": "What does an owl eat?"}
    train = load_rankings(write(tmp_path / "train.jsonl", other, GOOD), tokenizer, 64, 4)
    clean = load_rankings(write(tmp_path / "clean.jsonl", {**GOOD, "prompt": "Hello!"}), tokenizer, 64, 4)
    check_split(train, clean)
    spoken = {**GOOD, "prompt": [{"role": "user", "content": GOOD["prompt"]}]}
    leaky = load_rankings(write(tmp_path / "leaky.jsonl", {**GOOD, "prompt": "Hello!"}, spoken), tokenizer, 64, 4)
    with pytest.raises(UserError, match=r"leaky\.jsonl:2: its prompt is also at .*train\.jsonl:2; 1 of 2 held-out"):
        check_split(train, leaky)
