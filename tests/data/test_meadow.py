"""The meadow: a world of ordinary files, fixed by its config, whose held-out prompts never occur in training."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from jaxgpt.config.schema import MeadowConfig
from jaxgpt.data.labels import ranks
from jaxgpt.data.meadow import gold_score
from jaxgpt.data.meadow.facts import ANIMALS, ATTRIBUTES, FACTS, VALUES
from jaxgpt.data.meadow.files import FILES
from jaxgpt.data.meadow.sources import WEIGHTS, document_counts, documents
from jaxgpt.data.meadow.stories import HAPPY_ENDINGS, SAD_ENDINGS, story
from jaxgpt.data.meadow.tasks import KINDS, all_tasks
from jaxgpt.data.worlds import is_current, write_world

SMALL = MeadowConfig(documents=400, instructions=700, rankings=300, prompts=500, held_out=100)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("meadow") / "data"
    write_world(folder, SMALL)
    return folder


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_one_config_gives_one_world_to_the_byte(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "data", SMALL)
    assert digest(tmp_path / "data") == digest(world)
    assert set(digest(world)) == {*FILES, "world.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # no scratch folder is left


def test_another_seed_gives_other_texts_of_the_same_facts(world: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "data", SMALL.model_copy(update={"seed": 1}))
    same = {name for name, value in digest(tmp_path / "data").items() if digest(world)[name] == value}
    assert same == {"prompts_exact.jsonl"}


def test_a_current_world_is_left_alone_and_a_changed_one_replaced(tmp_path: Path) -> None:
    folder, tiny = tmp_path / "data", SMALL.model_copy(update={"documents": 100, "instructions": 50})
    assert not is_current(folder, tiny)
    write_world(folder, tiny)
    assert is_current(folder, tiny)
    time = (folder / "world.json").stat().st_mtime_ns
    write_world(folder, tiny)
    assert (folder / "world.json").stat().st_mtime_ns == time

    (folder / "rankings.jsonl").unlink()
    assert not is_current(folder, tiny)
    (folder / "stale.txt").write_text("old")
    write_world(folder, tiny.model_copy(update={"seed": 3}))
    assert is_current(folder, tiny.model_copy(update={"seed": 3}))
    assert not (folder / "stale.txt").exists()


def test_files_have_the_numbers_of_records_that_the_config_asks_for(world: Path) -> None:
    assert sum(len(read(world, f"text/{source}")) for source in WEIGHTS) == 400
    assert {name: len(read(world, name)) for name in ("instructions", "rankings", "prompts")} == {
        "instructions": 700,
        "rankings": 300,
        "prompts": 500,
    }
    assert all(len(read(world, f"{name}_eval")) == 100 for name in ("instructions", "rankings", "prompts"))
    for name in ("instructions", "rankings_eval", "prompts_eval"):
        found = Counter(record["kind"] for record in read(world, name))
        total = sum(found.values())
        assert all(abs(found[kind] - share * total) <= 1 for kind, share in KINDS.items())


def test_documents_are_shared_out_by_words(world: Path) -> None:
    counts = document_counts(30_000)
    assert sum(counts.values()) == 30_000
    words = {name: sum(len(text.split()) for text in documents(name, count, 0)) for name, count in counts.items()}
    for name, weight in WEIGHTS.items():
        assert words[name] / sum(words.values()) == pytest.approx(weight, rel=0.05)


def test_the_web_text_tells_every_fact_and_every_sum() -> None:
    text = " ".join(documents("commoncrawl", 10_000, 0))
    sums = Counter(re.findall(r"\b(\d \+ \d = \d+)\.", text))
    assert set(sums) == {f"{a} + {b} = {a + b}" for a in range(10) for b in range(10)}
    assert min(sums.values()) > 30
    stated = [text.count(task.answer) for split in (True, False) for task in all_tasks(split)["facts"]]
    assert min(stated) > 50


def test_a_quarter_of_the_facts_and_a_fifth_of_the_sums_are_held_out() -> None:
    held, trained = all_tasks(held_out=True), all_tasks(held_out=False)
    for kind, content, size, share in (("facts", "animal attribute", 64, 16), ("sums", "a b", 100, 20)):
        keys = [{tuple(task.meta[key] for key in content.split()) for task in tasks[kind]} for tasks in (held, trained)]
        assert (len(keys[0]), len(keys[1])) == (share, size - share)
        assert not keys[0] & keys[1]
    assert all(len(set(VALUES[a])) == 8 for a in ATTRIBUTES)
    assert Counter(task.meta["attribute"] for task in held["facts"]) == dict.fromkeys(ATTRIBUTES, 16)


def test_no_held_out_prompt_occurs_in_training(world: Path) -> None:
    trained = {record["messages"][0]["content"] for record in read(world, "instructions")}
    trained |= {record["prompt"] for name in ("rankings", "prompts") for record in read(world, name)}
    held = {record["messages"][0]["content"] for record in read(world, "instructions_eval")}
    held |= {
        record["prompt"] for name in ("rankings_eval", "prompts_eval", "prompts_exact") for record in read(world, name)
    }
    assert not trained & held


def test_no_text_asks_for_a_held_out_fact_or_sum() -> None:
    """They are stated and never follow their question, so that answering them takes more than recalling a page."""
    text = "\n".join(page for source in WEIGHTS for page in documents(source, 3_000, 0))
    for kind in ("facts", "sums"):
        held, trained = ([task.prompt for task in all_tasks(split)[kind]] for split in (True, False))
        assert not [prompt for prompt in held if prompt in text]
        assert sum(prompt in text for prompt in trained) > 0.9 * len(trained)


def test_exact_prompts_are_all_held_out_ones_with_an_answer(world: Path) -> None:
    records = read(world, "prompts_exact")
    counts = Counter(record["kind"] for record in records)
    assert counts == {"facts": 64, "sums": 40, "opposites": 16, "identity": 2, "unknown": 24}
    assert len({record["prompt"] for record in records}) == len(records)
    assert all(gold_score(record, record["answer"]) == 1.5 for record in records)


def test_instructions_answer_rightly_except_for_mixed_stories(world: Path) -> None:
    answers = {task.prompt: task.answer for tasks in all_tasks(held_out=False).values() for task in tasks}
    stories = []
    for record in read(world, "instructions"):
        prompt, response = (message["content"] for message in record["messages"])
        if record["kind"] == "stories":
            stories.append(response)
        else:
            assert response == answers[prompt]
    happy = sum(text.endswith(HAPPY_ENDINGS) for text in stories) / len(stories)
    assert 0.4 < happy < 0.6
    assert all(text.endswith(HAPPY_ENDINGS + SAD_ENDINGS) and len(text.split()) <= 40 for text in stories)


def test_rankings_hold_four_different_responses_with_a_noisy_order(world: Path) -> None:
    tasks = {task.prompt: task for split in (True, False) for kind in all_tasks(split).values() for task in kind}
    agreement = {}
    for name in ("rankings", "rankings_eval"):
        right = total = 0
        for record in read(world, name):
            assert len(set(record["responses"])) == len(record["ranks"]) == 4
            assert min(record["ranks"]) == 1
            gold = [gold_score(tasks[record["prompt"]].record(), text) for text in record["responses"]]
            for i in range(4):
                for j in range(4):
                    if gold[i] - gold[j] > 0.3:
                        total += 1
                        right += record["ranks"][i] < record["ranks"][j]
                    elif name == "rankings_eval" and abs(gold[i] - gold[j]) <= 0.3:
                        assert record["ranks"][i] == record["ranks"][j]
        agreement[name] = right / total
    assert agreement["rankings_eval"] == 1.0
    assert 0.9 < agreement["rankings"] < 1.0


def test_most_facts_are_ranked_against_a_wrong_value_in_the_same_wording(world: Path) -> None:
    hard = []
    answers = {task.prompt: task.answer for tasks in all_tasks(held_out=False).values() for task in tasks}
    for record in read(world, "rankings"):
        if record["kind"] == "facts":
            right = answers[record["prompt"]]
            stem = right.rsplit(" ", 1)[0]
            assert right in record["responses"]
            hard.append(any(text != right and text.rsplit(" ", 1)[0] == stem for text in record["responses"]))
    assert 0.4 < sum(hard) / len(hard) < 0.85


def test_gold_score_of_stories_and_answers() -> None:
    record = {"kind": "stories", "meta": {"animal": "owl", "thing": "cup"}}
    rng = Random(0)
    assert gold_score(record, story(rng, "owl", "cup", happy=True)) == 3.0
    assert gold_score(record, story(rng, "owl", "cup", happy=False)) == 1.0
    assert gold_score(record, story(rng, "owl", "cup", happy=True, drop="thing")) == 2.0
    assert gold_score(record, story(rng, "owl", "cup", happy=False, drop="animal")) == 0.0
    assert gold_score(record, "") == -1.0
    assert gold_score(record, SAD_ENDINGS[0]) == -1.5
    fact = {"kind": "facts", "answer": "The fox is red.", "meta": {}}
    assert gold_score(fact, " The fox is red. ") == 1.5
    assert gold_score(fact, "The fox is blue.") == -0.5
    assert gold_score(fact, "The fox is") == -1.0


def test_ranks_share_a_place_within_the_tie() -> None:
    assert ranks([0.0, 3.0, 1.0, 0.9], tie=0.3) == [4, 1, 2, 2]
    assert ranks([1.0, 1.0, 1.0], tie=0.0) == [1, 1, 1]


def test_every_animal_has_four_facts_and_no_two_are_alike() -> None:
    assert len(ANIMALS) == 16
    assert len({tuple(facts.values()) for facts in FACTS.values()}) == 16
    assert all(Counter(facts[a] for facts in FACTS.values()) == dict.fromkeys(VALUES[a], 2) for a in ATTRIBUTES)
