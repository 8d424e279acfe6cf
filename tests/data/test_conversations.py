"""Conversations: what is trained is what the assistant says, and packing changes nothing but the rows."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from jaxgpt.config.schema import TokenizerConfig
from jaxgpt.data.conversations import Example, PackedConversations, best_fit, load_conversations, load_demonstrations
from jaxgpt.data.meadow.sources import documents
from jaxgpt.data.tokenizer import Tokenizer, train_tokenizer
from jaxgpt.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(documents("commoncrawl", 300, 0), TokenizerConfig(vocab=400))


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def talk(*contents: str) -> dict[str, Any]:
    """A conversation whose turns alternate, the user's first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]}


def test_trained_tokens_are_the_assistants_words_and_their_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = ("Who?", "I am.", "What does a fox eat?", "The fox eats berries.")
    record = {"messages": [{"role": "system", "content": "Be kind."}, *talk(*turns)["messages"]]}
    (example,) = load_conversations(write(tmp_path / "a.jsonl", record), tokenizer, 128)
    trained = [int(token) for token in example.ids[example.mask == 1]]
    assert trained == [*tokenizer.encode(turns[1]), tokenizer.eos, *tokenizer.encode(turns[3]), tokenizer.eos]
    assert tokenizer.decode_visible(trained) == "I am.</s>The fox eats berries.</s>"
    assert not example.cut

    row = PackedConversations([example], 128)[0]
    assert row["targets"][row["mask"] == 1].tolist() == trained
    assert row["tokens"][0] == tokenizer.bos


def test_the_end_is_trained_where_it_is_the_padding_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    padded = Tokenizer(tokenizer.engine)
    padded.pad = padded.eos
    (example,) = load_conversations(write(tmp_path / "a.jsonl", talk("Who?", "I am.")), padded, 64)
    row = PackedConversations([example], 64)[0]
    assert row["targets"][row["mask"] == 1].tolist() == [*padded.encode("I am."), padded.pad]
    assert row["mask"][row["segments"] == 0].sum() == 0


def test_a_demonstration_ends_with_the_assistants_last_word(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long, asked = talk("Hello!", "The fox. " * 40), talk("Who?", "I am.", "Why?")
    path = write(tmp_path / "a.jsonl", talk("Who?", "I am."), long, asked, talk("Hello?"))
    kept, left = load_demonstrations(path, tokenizer, 64)
    (example,) = load_conversations(write(tmp_path / "b.jsonl", talk("Who?", "I am.")), tokenizer, 64)
    assert [ids.tolist() for ids in kept] == [example.ids.tolist()] * 2 and left == 1
    with pytest.raises(UserError, match=r"no demonstrations: all 1 have more than reward\.context=64 tokens"):
        load_demonstrations(write(tmp_path / "c.jsonl", long), tokenizer, 64)
    with pytest.raises(UserError, match="no demonstrations: none has an assistant turn"):
        load_demonstrations(write(tmp_path / "d.jsonl", talk("Hello?")), tokenizer, 64)


def test_three_spellings_of_a_record_are_one_conversation(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        talk("2 + 2?", "4."),
        {"prompt": "2 + 2?", "completion": "4."},
        {"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4."}]},
    )
    one, *others = load_conversations(path, tokenizer, 64)
    assert all(other.ids.tolist() == one.ids.tolist() and other.mask.tolist() == one.mask.tolist() for other in others)
    path = write(tmp_path / "b.jsonl", {"question": "2 + 2?", "answer": "4."})
    (named,) = load_conversations(path, tokenizer, 64, prompt_field="question", completion_field="answer")
    assert named.ids.tolist() == one.ids.tolist()


def shared(*turns: tuple[str, str]) -> dict[str, Any]:
    """A ShareGPT record."""
    return {"id": "x", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def test_sharegpt_conversations_begin_with_the_first_human_turn(tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = (("human", "2 + 2?"), ("gpt", "4."))
    records = [
        shared(*turns),
        shared(("gpt", "Hello!"), *turns),
        shared(("user", "2 + 2?"), ("assistant", "4.")),
        shared(("system", "Be kind."), ("gpt", "Hello!"), *turns),
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    found = load_conversations(tmp_path / "a.json", tokenizer, 64)
    system = {"messages": [{"role": "system", "content": "Be kind."}, *talk("2 + 2?", "4.")["messages"]]}
    plain = load_conversations(write(tmp_path / "b.jsonl", talk("2 + 2?", "4."), system), tokenizer, 64)
    wanted = [plain[0], plain[0], plain[0], plain[1]]
    assert [example.ids.tolist() for example in found] == [example.ids.tolist() for example in wanted]
    assert [example.mask.tolist() for example in found] == [example.mask.tolist() for example in wanted]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (shared(("humman", "Hi?")), r"\[1\]: \"conversations\"\[0\]: \"from\" is 'humman'.*Did you mean 'human'"),
        (
            {"conversations": [{"from": "human", "vale": "Hi?"}]},
            r"\[1\]: .*\[0\]: \"value\" is None.*Did you mean 'vale'",
        ),
        ({"conversations": ["Hi?"]}, r"\[1\]: .*\[0\] is 'Hi\?', expected an object"),
        ({"conversations": "Hi?"}, r"\[1\]: .* is 'Hi\?', expected a list"),
        (shared(("gpt", "Hi!"), ("gpt", "Well?")), r"\[1\]: .* has no turn of a human"),
        (shared(("human", "Hi!")), r"\[1\]: no assistant turn"),
    ],
)
def test_a_bad_sharegpt_record_is_named(tokenizer: Tokenizer, tmp_path: Path, record: Any, message: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps([shared(("human", "Hi?"), ("gpt", "Hi!")), record]))
    with pytest.raises(UserError, match=r"a\.json" + message):
        load_conversations(tmp_path / "a.json", tokenizer, 64)


def test_too_long_conversations_lose_their_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", talk("Hello!", "The fox is red. " * 20), talk("Hello!", "Hi."))
    (long, short), (whole, _) = (load_conversations(path, tokenizer, context) for context in (32, 512))
    assert (len(long.ids), long.cut, short.cut, whole.cut) == (33, True, False, False)
    assert (long.ids.tolist(), long.mask.tolist()) == (whole.ids[:33].tolist(), whole.mask[:33].tolist())
    packed = PackedConversations([long, short], 32)
    assert packed.cut == 1
    assert packed[0]["segments"].tolist() == [1] * 32
    assert packed[0]["targets"][-1] == long.ids[32]


def random_examples(count: int, longest: int) -> list[Example]:
    """Examples of distinct tokens, so that each token tells where it came from."""
    rng, at, examples = Random(0), 1, []
    for _ in range(count):
        length = rng.randint(2, longest + 1)
        mask = np.array([0] + [rng.randint(0, 1) for _ in range(length - 1)], np.uint8)
        examples.append(Example(np.arange(at, at + length, dtype=np.int32), mask))
        at += length
    return examples


def segments_of(packed: PackedConversations) -> list[tuple[tuple[int, ...], ...]]:
    """Every segment of every row as (tokens, targets, mask, positions)."""
    found = []
    for index in range(len(packed)):
        row = packed[index]
        for segment in range(1, row["segments"].max() + 1):
            here = row["segments"] == segment
            found.append(tuple(tuple(row[name][here].tolist()) for name in ("tokens", "targets", "mask", "positions")))
    return found


def test_packed_rows_hold_every_example_exactly_once() -> None:
    examples = random_examples(300, 60)
    packed = PackedConversations(examples, 64, block=100)
    wanted = [
        (
            tuple(example.ids[:-1].tolist()),
            tuple(example.ids[1:].tolist()),  # targets: the next token of the same conversation, never of another
            tuple(example.mask[1:].tolist()),
            tuple(range(len(example.ids) - 1)),  # positions restart
        )
        for example in examples
    ]
    assert sorted(segments_of(packed)) == sorted(wanted)
    assert sorted(index for row in packed.members for index in row) == list(range(300))
    assert all(len({index // 100 for index in row}) == 1 for row in packed.members)  # blocks do not mix


def test_padding_carries_no_loss_and_efficiency_is_what_is_filled() -> None:
    packed = PackedConversations(random_examples(500, 40), 64)
    rows = [packed[index] for index in range(len(packed))]
    filled = np.mean([(row["segments"] > 0).mean() for row in rows])
    assert packed.efficiency == pytest.approx(filled)
    assert packed.efficiency > 0.97
    for row in rows:
        assert {name: value.dtype.name for name, value in row.items()} == {
            "tokens": "int32",
            "targets": "int32",
            "mask": "float32",
            "segments": "int32",
            "positions": "int32",
        }
        assert row["mask"][row["segments"] == 0].sum() == 0
        assert all(value.shape == (64,) for value in row.values())


def test_permuting_examples_keeps_the_set() -> None:
    examples = random_examples(200, 50)
    mixed = Random(1).sample(examples, len(examples))
    assert sorted(segments_of(PackedConversations(mixed, 64))) == sorted(segments_of(PackedConversations(examples, 64)))


def test_best_fit_takes_the_fullest_row_with_room() -> None:
    assert best_fit([5, 6, 4, 3, 2], capacity=10) == [[1, 2], [0, 3, 4]]
    assert best_fit([10, 10], capacity=10) == [[0], [1]]
    lengths = [Random(i).randint(1, 100) for i in range(1000)]
    rows = best_fit(lengths, capacity=100)
    assert all(sum(lengths[i] for i in row) <= 100 for row in rows)
    assert len(rows) <= 1.02 * sum(lengths) / 100 + 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"messages": [', r"a\.jsonl:2: not JSON"),
        ({"messages": [{"role": "user", "content": "Hi."}]}, r"a\.jsonl:2: no assistant turn"),
        ({"messages": []}, r'a\.jsonl:2: "messages" is \[\], expected a string or a list'),
        ({"messages": [{"rol": "user", "content": "Hi."}]}, r"a\.jsonl:2: .*\[0\].*Did you mean 'rol'"),
        ({"messages": [{"role": "user", "content": 3}]}, r'a\.jsonl:2: .*"content" is 3, expected a string'),
        (talk("The fox is red. " * 30, "Yes."), r"a\.jsonl:2: \d+ tokens come before .* sft\.context is 32.*raise"),
        (
            {"question": "Hi?", "answer": "No."},
            r'a\.jsonl:2: needs "messages", .*, or "prompt" and "completion".*question',
        ),
        ({"messages": [{"role": "robot", "content": "Hi."}, talk("", "b")["messages"][1]]}, r"a\.jsonl:2: .*robot"),
    ],
)
def test_a_bad_record_is_named_by_file_and_line(
    tokenizer: Tokenizer, tmp_path: Path, record: Any, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", talk("Hello!", "Hi."), record)
    with pytest.raises(UserError, match=message):
        load_conversations(path, tokenizer, 32)


def test_a_file_without_conversations_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl: no conversations"):
        load_conversations(write(tmp_path / "a.jsonl"), tokenizer, 32)
