"""Rankings as a policy's rows: what the response says is a target, what all responses share is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.chat import render
from jaxgpt.data.meadow.sources import documents
from jaxgpt.data.preferences import Pairs, PreferenceRows, preferences
from jaxgpt.data.rankings import load_rankings
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.errors import UserError

ASKED = {"role": "user", "content": "What does a fox eat?"}
TALK = [ASKED, {"role": "assistant", "content": "Berries."}, {"role": "user", "content": "And an owl?"}]
GOOD = {"prompt": TALK, "responses": ["Mice.", "Fish and mice.", "I do not know."], "ranks": [1, 3, 2]}
PAIR = {"prompt": "Hello!", "chosen": "Hi.", "rejected": "No."}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(documents("commoncrawl", 300, 0), TokenizerConfig(vocab=400))


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def load(path: Path, tokenizer: Tokenizer, context: int, responses: int, pairs: Pairs = "all") -> PreferenceRows:
    return preferences(load_rankings(path, tokenizer, context, responses, "dpo"), pairs)


def test_the_targets_are_the_response_and_its_end_token_alone(tokenizer: Tokenizer, tmp_path: Path) -> None:
    row = load(write(tmp_path / "a.jsonl", GOOD), tokenizer, 64, 9)[0]
    assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == {
        **dict.fromkeys(("tokens", "targets", "segments"), ((3, 64), "int32")),
        "mask": ((3, 64), "float32"),
        "ranks": ((3,), "int32"),
    }
    assert row["ranks"].tolist() == [1, 3, 2]
    for number, response in enumerate(GOOD["responses"]):
        ids, _ = render(tokenizer, [*TALK, {"role": "assistant", "content": response}])
        assert row["tokens"][number, : len(ids) - 1].tolist() == ids[:-1]
        assert row["targets"][number, : len(ids) - 1].tolist() == ids[1:]
        assert row["segments"][number].tolist() == [1] * (len(ids) - 1) + [0] * (65 - len(ids))
        learned = row["targets"][number][row["mask"][number] > 0].tolist()
        assert learned == [*tokenizer.encode(response), tokenizer.eos]  # and not "Berries.", which all of them share


def test_a_row_is_as_wide_as_the_longest_ranking(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = load(write(tmp_path / "a.jsonl", PAIR, GOOD), tokenizer, 64, 9)
    assert rows.responses == 3 and rows[0]["ranks"].tolist() == [1, 2, 0]
    assert not rows[0]["segments"][2].any() and not rows[0]["mask"][2].any()
    assert load(write(tmp_path / "b.jsonl", PAIR), tokenizer, 64, 9).responses == 2


def test_pairs_are_those_of_different_rank(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tied = {**GOOD, "ranks": [2, 1, 2]}
    assert load(write(tmp_path / "a.jsonl", GOOD, tied, PAIR), tokenizer, 64, 9).pairs == 3 + 2 + 1


def test_extremes_are_the_best_with_the_worst(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", GOOD, {**GOOD, "ranks": [2, 1, 2]})
    whole, rows = (load(path, tokenizer, 64, 9, pairs) for pairs in ("all", "extremes"))
    assert rows.responses == 2 and rows.pairs == 2
    assert (rows[0]["ranks"].tolist(), rows[1]["ranks"].tolist()) == ([1, 3], [1, 2])
    np.testing.assert_array_equal(rows[0]["targets"], whole[0]["targets"][[0, 1]])
    np.testing.assert_array_equal(rows[1]["targets"], whole[1]["targets"][[1, 0]])


def test_a_response_without_a_token_of_the_assistant_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    silent = {**PAIR, "rejected": [{"role": "user", "content": "No."}]}
    with pytest.raises(UserError, match=r"a.jsonl:2: the chat template marks no token of response 2 as the assistant"):
        load(write(tmp_path / "a.jsonl", PAIR, silent), tokenizer, 64, 9)
    with pytest.raises(UserError, match=r"a.jsonl:1: 3 responses, dpo.responses is 2"):
        load(write(tmp_path / "a.jsonl", GOOD), tokenizer, 64, 2)
    with pytest.raises(UserError, match=r"a.jsonl:1: response 1 .* raise dpo.context"):
        load(write(tmp_path / "a.jsonl", GOOD), tokenizer, 24, 9)
