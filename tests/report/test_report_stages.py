"""What the page says of a stage: charts of its figures, what looked wrong, and episodes to read."""

from __future__ import annotations

import json
import re

import pytest
from run_folder import metric_lines, write_run

from jaxgpt.report import write_report
from jaxgpt.report.collect import Stage
from jaxgpt.report.episodes import episodes_view
from jaxgpt.report.stages import stage_view

WARNINGS = [
    {"step": 30, "warning": "entropy", "value": 0.01, "limit": 0.1, "text": "step 30: the entropy is <b>low</b>."},
    {"step": 90, "warning": "eos", "value": 0.1, "limit": 0.4, "text": "step 90: hardly any response ends."},
]


def sample(step, prompt="Why?", response="Because.", **changes):
    known = {
        "step": step,
        "prompt": prompt,
        "response": response,
        "score": -0.5,
        "kl": 1.25,
        "length": 7,
        "ended": True,
    }
    return known | changes


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    folder = write_run(tmp_path / "run", ("ppo",), results=False)
    write_lines(folder / "ppo" / "warnings.jsonl", WARNINGS)
    write_lines(
        folder / "ppo" / "samples.jsonl", [sample(1, response="<i>No.</i>"), sample(61), sample(120, ended=False)]
    )
    return folder


def titles(text):
    return re.findall(r"<figcaption><b>(.*?)</b>", text)


def test_every_figure_of_a_rollout_stage_has_its_chart(folder):
    assert titles(write_report(folder).read_text()) == [
        "Score", "Spread of the scores",
        "KL from the reference", "Entropy", "Approximate KL of an update", "Clipped", "Ratio", "Largest ratio",
        "Ratio off 1",
        "Length", "Ended by itself",
        "Returns", "Value loss", "Explained variance", "Clipped values",
        "Learning rate", "Gradient norm", "Speed",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["grpo", "rloo", "rejection"])
def test_the_neighbours_of_ppo_have_the_charts_of_what_they_measure(name):
    lines = [{k: v for k, v in line.items() if "value" not in k} for line in metric_lines("ppo") if "eval" not in line]
    lines = [line | {"objective/zero_std": 0.2, "objective/best_score": 1.0} for line in lines]
    view = stage_view({name: {}}, Stage(name, tuple(lines), (), None))
    assert [group["title"] for group in view["groups"]] == [
        "What it is rewarded for", "How far the policy moves", "What it says", "What the critic knows",
        "Optimiser and speed",
    ]  # fmt: skip
    shown = titles("".join(chart for group in view["groups"] for chart in group["charts"]))
    assert {"Groups without a winner", "Best of each prompt"} <= set(shown)
    assert not {"Value loss", "Gold score", "KL coefficient", "Updates left out"} & set(shown)


def test_what_moves_or_goes_wrong_has_a_chart_only_then(folder):
    lines = [line | {"skipped": int(line["step"] > 50)} for line in metric_lines("ppo") if "eval" not in line]
    lines = [line | {"objective/kl_coef": 0.05 * 1.01 ** line["step"]} for line in lines]
    write_lines(folder / "ppo" / "metrics.jsonl", lines)
    assert {"KL coefficient", "Updates left out"} <= set(titles(write_report(folder).read_text()))


def test_k1_and_k3_are_side_by_side(folder):
    text = write_report(folder).read_text()
    chart = next(one for one in text.split("<figure")[1:] if "KL from the reference" in one)
    assert re.findall(r'class="key (\w+)">(.*?)<', chart) == [("raw", "each rollout"), ("main", "k1"), ("second", "k3")]


def test_the_ratio_off_1_is_that_of_first_updates_alone():
    lines = [line | {"val/ratio_gap": 3e-6} for line in metric_lines("ppo") if "eval" not in line]
    for line in lines:
        if line["step"] % 4 != 1:
            line["val/ratio_gap"] = 5.0
            del line["objective/scores"]
    view = stage_view({"ppo": {}}, Stage("ppo", tuple(lines), (), None))
    chart = next(one for group in view["groups"] for one in group["charts"] if "Ratio off 1" in one)
    low, high = map(float, re.search(r'data-y="(\S+) (\S+) \d"', chart).groups())
    assert low <= 3e-6 <= high < 1e-4


def test_the_held_out_evaluation_is_drawn_and_told(folder):
    lines = metric_lines("ppo")
    for line in lines:
        if "eval" in line:
            line["eval"] = {"gold": 1.0 + line["step"] / 100, "gold_error": 0.1, "gold_start": 0.9, "win_rate": 0.6}
    write_lines(folder / "ppo" / "metrics.jsonl", lines)
    text = write_report(folder).read_text()
    assert {"Gold score", "Wins"} <= set(titles(text))
    assert "Gold score of held-out prompts from 0.90 to 2.00" in text or "from 0.90 to 2.20" in text
    held = json.loads((folder / "report.json").read_text())["ppo"]["held_out"]
    assert held["gold_start"] == 0.9 and held["win_rate"] == 0.6


def test_warnings_are_listed_in_the_stage_counted_in_the_head_and_kept_in_the_json(folder):
    text = write_report(folder).read_text()
    head, section = text[: text.index("<main>")], text[text.index('<section id="ppo">') :]
    assert re.search(r"Health</div><b>2</b><span>warnings</span>\s*<span class=\"note\">PPO 2</span>", head)
    assert "<li>Step 30: the entropy is &lt;b&gt;low&lt;/b&gt;.</li><li>Step 90: hardly" in section
    assert json.loads((folder / "report.json").read_text())["warnings"] == {"ppo": WARNINGS}


def test_a_stage_without_warnings_says_nothing_of_them(folder):
    (folder / "ppo" / "warnings.jsonl").write_text("")
    text = write_report(folder).read_text()
    assert "What looked wrong" not in text and ">Health<" not in text
    assert "warnings" not in json.loads((folder / "report.json").read_text())


def test_early_episodes_stand_beside_late_ones(folder):
    text = write_report(folder).read_text()
    columns = re.findall(r"<h4>Update (\d+)</h4>", text)
    assert columns == ["1", "120", "61"]  # the last one is folded away
    assert "&lt;i&gt;No.&lt;/i&gt;" in text and "<i>No." not in text
    assert "score \u22120.50, KL 1.25, 7 tokens</div>" in text
    assert "score \u22120.50, KL 1.25, 7 tokens, cut off</div>" in text


def test_of_many_rollouts_some_are_shown():
    view = episodes_view([sample(step) for step in range(1, 201)])
    assert [column["step"] for column in view["ends"]] == [1, 200]
    between = [column["step"] for column in view["between"]]
    assert len(between) == 6 and between == sorted(between) and 1 not in between and 200 not in between
    assert [column["step"] for column in episodes_view([sample(1)])["ends"]] == [1]
    assert episodes_view([]) is None


def test_a_stage_under_way_is_shown_with_the_lines_that_are_whole(folder):
    (folder / "ppo" / "done.json").unlink()
    for name in ("metrics.jsonl", "warnings.jsonl", "samples.jsonl"):
        path = folder / "ppo" / name
        path.write_text(path.read_text() + '{"step": 121, "te')
    text = write_report(folder).read_text()
    assert "The stage is not finished." in text and "Step 90" in text and "<h4>Update 120</h4>" in text


def test_the_first_updates_alone_make_a_page(tmp_path):
    folder = write_run(tmp_path / "run", ("ppo",), results=False)
    (folder / "ppo" / "done.json").unlink()
    write_lines(folder / "ppo" / "metrics.jsonl", metric_lines("ppo")[:1])
    assert "Score from" in write_report(folder).read_text()
