"""Models are found by what settings name, and results are kept with the run they are about."""

import json
from pathlib import Path

import pytest

from jaxgpt.errors import UserError
from jaxgpt.evaluate.named import check_home, frontier_points, home_of, label_of, model_folder, write_results


def finish(stage: Path, step: int = 30) -> None:
    (stage / "params").mkdir(parents=True)
    (stage / "done.json").write_text(json.dumps({"step": step}))


@pytest.fixture
def run(tmp_path) -> Path:
    run = tmp_path / "runs" / "x"
    for stage in ("pretrain", "sft", "reward", "ppo"):
        finish(run / stage)
    for step in ("10", "20", "30", "100.tmp"):
        (run / "ppo" / "checkpoints" / step).mkdir(parents=True)
    (run / "grpo" / "checkpoints" / "5").mkdir(parents=True)
    return run


def test_a_run_stands_for_its_last_model_of_the_kind_that_is_needed(run):
    assert model_folder(str(run), "against") == run / "ppo"
    assert model_folder(str(run), "judge", "scalar") == run / "reward"
    assert model_folder(str(run), "eval", stage="sft") == run / "sft"
    assert model_folder(str(run / "sft"), "against") == run / "sft"
    assert model_folder(str(run / "ppo/checkpoints/10"), "against") == run / "ppo/checkpoints/10"


@pytest.mark.parametrize(
    ("word", "kind", "said"),
    [
        ("reward", "language", "against: .*/reward holds a reward model, expected a language model"),
        ("sft", "scalar", "against: .*/sft holds a language model, expected a reward model"),
        ("stf", "language", "against: .*/stf: no such folder. Did you mean 'sft'"),
        ("grpo", "language", "against: .*/grpo is not finished"),
    ],
)
def test_a_model_that_cannot_be_is_told_with_its_setting(run, word, kind, said):
    with pytest.raises(UserError, match=said):
        model_folder(str(run / word), "against", kind)


def test_a_stage_is_its_checkpoints_in_order_and_its_result(run):
    points = frontier_points((str(run / "ppo"),))
    assert [(point.folder.name, point.step) for point in points] == [("10", 10), ("20", 20), ("ppo", 30)]
    assert {point.group for point in points} == {str(run / "ppo")}
    assert frontier_points((str(run / "ppo" / "checkpoints"),)) == points
    assert [point.step for point in frontier_points((str(run / "grpo"),))] == [5]


def test_patterns_and_lists_name_many(run):
    points = frontier_points((str(run / "ppo/checkpoints/*"), str(run / "sft"), str(run / "ppo/checkpoints/20")))
    assert [point.folder.name for point in points] == ["10", "20", "30", "sft"]
    with pytest.raises(UserError, match=r"frontier: no folder matches .*dpo/\*"):
        frontier_points((str(run / "dpo/*"),))
    (run / "rloo" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has no checkpoint and no result yet"):
        frontier_points((str(run / "rloo"),))


def test_results_lie_with_the_run_and_are_named_by_the_model(run, tmp_path, monkeypatch):
    assert home_of(run / "ppo") == home_of(run / "ppo/checkpoints/10") == run / "evaluate"
    assert label_of(run / "ppo") == "ppo" and label_of(run / "ppo/checkpoints/10") == "ppo-10"
    assert label_of(run / "ppo/checkpoints/10", run) == "ppo-10" and label_of(run / "sft", tmp_path) == "x-sft"
    path = write_results(run / "ppo/checkpoints/10", "a/b", {"x": float("nan")})
    assert path == run / "evaluate" / "ppo-10-a_b.json"
    assert json.loads(path.read_text()) == {"model": str(run / "ppo/checkpoints/10"), "label": "ppo-10", "x": None}
    assert [found.name for found in (run / "evaluate").iterdir()] == ["ppo-10-a_b.json"]
    assert write_results(run / "sft", "b", {}, str(tmp_path / "new" / "place")) == tmp_path / "new/place/sft-b.json"
    assert home_of(Path("hf:gpt2")) == Path("evaluate")


def test_a_place_that_cannot_be_written_to_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    check_home(tmp_path / "new" / "place")
    with pytest.raises(UserError, match="out=FOLDER names another place"):
        check_home(tmp_path / "file" / "evaluate")
