"""The report: its figures are the run's, its page needs nothing beside it, and damaged files are named."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from run_folder import CONFIG, ENVIRONMENT, RESULTS, STEPS, metric_lines, write_run

from jaxgpt.errors import UserError
from jaxgpt.report import summary_table, write_report
from jaxgpt.report.charts import Line, Scale, line_chart, log_ticks, smooth, thin_out, ticks
from jaxgpt.report.numbers import DASH, compact, count, decimal, duration, percent, power, signed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "meadow")
    write_report(folder)
    return folder


@pytest.fixture(scope="module")
def figures(run):
    return json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def page(run):
    return (run / "report.html").read_text()


def test_the_figures_are_those_of_the_run(figures):
    validation = [line["eval"]["nll"] for line in metric_lines("pretrain") if "eval" in line]
    assert figures["pretrain"]["val_nll"] == validation[-1]
    assert figures["pretrain"]["tokens"] == 300 * 4096
    assert 3900 < figures["pretrain"]["tokens_per_second"] < 4300
    assert figures["sft"]["heldout_exact"] == {"facts": 0.906, "sums": 0.56, "opposites": 1.0}
    told = {name: value for name, value in RESULTS["reward"].items() if name != "accuracy"}
    assert figures["reward"] == {"heldout_accuracy": 0.877, **told}
    ppo = figures["ppo"]
    assert (ppo["gold_before"], ppo["gold_after"]) == (0.64, 0.89)
    assert (ppo["reward_before"], ppo["reward_after"]) == (0.05, 0.91)
    assert (ppo["kl"], ppo["eos_rate"], ppo["win_rate_vs_sft"]) == (0.8, 1.0, 0.71)
    assert ppo["gold_by_kind_before"]["stories"] == 0.67
    assert ppo["gold_by_kind_after"]["stories"] == 1.73
    assert ppo["heldout_exact"] == RESULTS["stages"]["ppo"]["exact"]
    assert figures["base"]["chat_exact"] == RESULTS["base_chat_exact"]
    assert figures["params"] == 868_352
    assert figures["environment"] == ENVIRONMENT
    assert figures["config"] == CONFIG


def dpo_accuracy() -> float:
    """The last validation of the run's DPO."""
    return [line["eval"]["rewards/accuracies"] for line in metric_lines("dpo") if "eval" in line][-1]


def test_each_stage_that_follows_sft_is_compared_with_it(figures, page):
    dpo = figures["dpo"]
    assert (dpo["gold_before"], dpo["gold_after"], dpo["kl"], dpo["win_rate_vs_sft"]) == (0.64, 0.92, 1.5, 0.66)
    assert dpo["heldout_accuracy"] == dpo_accuracy() and dpo["heldout_margin"] > 1
    tiles = re.findall(r'<div class="over">(\w+)</div><b>[^<]*</b><span>(gold score|of prompts won[^<]*)<', page)
    assert [stage for stage, _ in tiles] == ["PPO", "PPO", "DPO", "DPO"]


def test_a_best_step_that_is_not_the_last_is_the_one_described(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain",), results=False)
    done = json.loads((folder / "pretrain" / "done.json").read_text())
    (folder / "pretrain" / "done.json").write_text(json.dumps(done | {"step": 125}))
    text, figures = write_report(folder).read_text(), json.loads((folder / "report.json").read_text())
    measured = {line["step"]: line["eval"]["nll"] for line in metric_lines("pretrain") if "eval" in line}
    assert figures["pretrain"]["val_nll"] == measured[125] != measured[300]
    assert figures["pretrain"]["tokens"] == 300 * 4096
    assert "<dt>Updates</dt><dd>300</dd>" in text and "<dt>Handed on: update</dt><dd>125</dd>" in text


def test_the_speed_of_ppo_counts_its_rollouts(tmp_path):
    """One update in four waits for a rollout: 4 x 100 tokens in 0.1 + 0.1 + 0.1 + 1.7 seconds."""
    folder = write_run(tmp_path / "run", ("ppo",), results=False)
    lines = [line for line in metric_lines("ppo") if "eval" not in line]
    for n, line in enumerate(lines):
        line["time"] = line["time"] | {"tokens_per_second": 100 / (1.7 if n % 4 == 0 else 0.1)}
        if n % 4:
            del line["objective/scores"]
    (folder / "ppo" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    speed = re.search(r"<dt>Tokens/s</dt><dd>(.*?)</dd>", write_report(folder).read_text())
    assert speed is not None and speed.group(1) == "200"


def test_the_kinds_with_most_prompts_are_in_the_headline(page):
    tiles = re.findall(r"<span>exact on held-out (\w+)</span>", page)
    assert tiles == ["sums", "opposites"]
    _, table, other = page.split("<h3>Exact answers")
    assert '<span class="key rl">PPO</span>' in table and '<span class="key rl">DPO</span>' in other
    rows = re.findall(r'<th scope="row">(\w+)</th>\s*<td class="n">(\d+)</td>', table)
    assert rows == [("facts", "12"), ("sums", "60"), ("opposites", "20")]


def test_the_seconds_of_the_stages_add_up(figures):
    assert list(figures["seconds_by_stage"]) == [*STEPS, "evaluate"]
    assert figures["seconds"] == pytest.approx(sum(figures["seconds_by_stage"].values()))


class Elements(HTMLParser):
    """Counts opened and closed elements, and keeps attributes that could fetch something."""

    void = ("meta", "path")

    def __init__(self):
        super().__init__()
        self.open, self.names, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")
        ]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)


def test_the_page_is_whole_and_fetches_nothing(page):
    elements = Elements()
    elements.feed(page)
    assert elements.open == []
    assert all(address.startswith("#") for address in elements.addresses)
    assert not {"link", "img", "iframe", "object", "embed", "use"} & set(elements.names)
    assert not re.search(r"https?:|url\(|@import|//[a-z]+\.", page)
    assert elements.names.count("svg") == 4 + 4 + (5 + 2) + 18 + 6
    targets = set(re.findall(r'id="(\w+)"', page))
    assert {address[1:] for address in elements.addresses} <= targets


def test_words_of_the_run_cannot_become_markup(page):
    assert "What is &lt;script&gt;alert(1)&lt;/script&gt; &amp; &#34;5&#34;?" in page
    assert "&lt;img src=x onerror=alert(2)&gt;" in page
    assert page.count("<script>") == page.count("</script>") == 1


def test_names_from_files_cannot_become_markup(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain", "sft", "ppo"))
    results = json.loads((folder / "evaluate" / "results.json").read_text())
    for stage in results["stages"].values():
        stage["exact"]["<b>kind</b>"] = 0.5
    results["reward"]["by_kind"]["<b>kind</b>"] = 0.5
    (folder / "evaluate" / "results.json").write_text(json.dumps(results))
    (folder / "config.yaml").write_text("name: <b>me</b>\n")
    done = json.loads((folder / "ppo" / "done.json").read_text())
    (folder / "ppo" / "done.json").write_text(json.dumps(done | {"environment": {"<b>cpu</b>": "<b>x</b>"}}))
    text = write_report(folder).read_text()
    assert "&lt;b&gt;kind" in text
    assert "<h1>&lt;b&gt;me" in text
    assert not re.search("<b>(kind|me|x|cpu)</b>", text)


def test_curves_have_at_most_400_points(page):
    assert max(path.count("L") + path.count("M") for path in re.findall(r' d="([^"]*)"', page)) <= 400


def test_a_long_run_gives_a_small_page(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain",), results=False)
    line = metric_lines("pretrain")[0]
    lines = (json.dumps(line | {"step": step, "nll": 1 + 1 / step}) for step in range(1, 20_001))
    (folder / "pretrain" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert len(write_report(folder).read_text()) < 120_000


def test_a_run_with_one_stage_has_a_report_of_one_stage(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain",), results=False)
    text = write_report(folder).read_text()
    figures = json.loads((folder / "report.json").read_text())
    assert not {"sft", "reward", "ppo", "base"} & set(figures)
    assert set(figures["pretrain"]) == {"val_nll", "tokens", "tokens_per_second"}
    assert 'id="pretrain"' in text
    assert 'id="ppo"' not in text
    assert 'id="samples"' not in text


@pytest.mark.parametrize("stages", [("sft",), ("reward",), ("ppo",), ("reward", "ppo")])
def test_any_part_of_a_run_has_a_report(tmp_path, stages):
    for results in (False, True):
        folder = write_run(tmp_path / str(results), stages, results=results)
        assert write_report(folder) == folder / "report.html"
        assert {"pretrain", "sft", "reward", "ppo"} & set(json.loads((folder / "report.json").read_text())) == set(
            stages
        )
        assert summary_table(folder).row_count == len(stages)


def test_a_stage_under_way_is_shown_so_far(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain",), results=False)
    (folder / "pretrain" / "done.json").unlink()
    metrics = folder / "pretrain" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:40]) + '{"step": 40, "lo')
    assert "The stage is not finished." in write_report(folder).read_text()
    assert json.loads((folder / "report.json").read_text())["pretrain"]["tokens"] == 39 * 4096


def test_of_a_step_written_twice_the_later_line_counts(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain",), results=False)
    with (folder / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 300, "eval": {"nll": 0.125}}\n')
    write_report(folder)
    assert json.loads((folder / "report.json").read_text())["pretrain"]["val_nll"] == 0.125


def test_the_head_tells_size_machine_and_date(page):
    head = page[page.index("<header>") : page.index("<nav")]
    assert "868\u202fk parameters, 4 layers of width 128, vocabulary 512, context 128 tokens" in head
    assert "2 cpu devices, 2 processor cores" in head
    assert "4 January 2026, 12:30 UTC" in head


def test_skipped_updates_are_told_once(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain",), results=False)
    lines = [line | {"skipped": int(line["step"] > 90) + int(line["step"] > 200)} for line in metric_lines("pretrain")]
    (folder / "pretrain" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "<dt>Updates skipped</dt><dd>2, 0.7\u202f%</dd>" in write_report(folder).read_text()


def test_numbers_that_are_not_finite_leave_valid_json_and_a_page(tmp_path):
    folder = write_run(tmp_path / "run", ("pretrain", "sft", "ppo"))
    with (folder / "pretrain" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 301, "loss": NaN, "nll": NaN, "lr": 0.0, "grad_norm": Infinity, "tokens": 5}\n')
    results = json.loads((folder / "evaluate" / "results.json").read_text())
    results["stages"]["ppo"]["win_rate_vs_sft"] = float("nan")
    (folder / "evaluate" / "results.json").write_text(json.dumps(results))
    assert "nan" not in write_report(folder).read_text().lower()
    text = (folder / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["ppo"]["win_rate_vs_sft"] is None


@pytest.mark.parametrize(
    ("name", "line", "text", "message"),
    [
        ("sft/metrics.jsonl", 3, '{"step": 1, loss}', "not JSON"),
        ("sft/metrics.jsonl", 3, "[1, 2]", 'expected an object with a whole number "step", found [1, 2]'),
        ("sft/metrics.jsonl", 3, '{"loss": 1.0}', 'a whole number "step"'),
        ("sft/done.json", 2, "{\n oops", "not JSON"),
        ("evaluate/results.json", 1, "[]", "expected an object, found list"),
        ("config.yaml", 2, "a: 1\nb: [", "not YAML"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path, name, line, text, message):
    folder = write_run(tmp_path / "run", ("sft",))
    path = folder / name
    if path.suffix == ".jsonl":
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:2], text, *lines[3:]]) + "\n")
    else:
        path.write_text(text)
    with pytest.raises(UserError, match=re.escape(f"{path}:{line}: ")) as error:
        write_report(folder)
    assert message in str(error.value)
    assert not (folder / "report.html").exists()


def test_what_is_no_run_is_an_error_with_a_mend(tmp_path):
    (tmp_path / "meadow").mkdir()
    with pytest.raises(UserError, match=r"Did you mean 'meadow'\?"):
        write_report(tmp_path / "medow")
    with pytest.raises(UserError, match="no stage has written anything here; expected pretrain/"):
        write_report(tmp_path / "meadow")


def test_writing_again_gives_the_same_bytes_and_leaves_nothing_beside(run, page):
    before = sorted(path.name for path in run.iterdir())
    assert write_report(run).read_text() == page
    assert sorted(path.name for path in run.iterdir()) == before


def test_the_table_tells_what_each_stage_came_to(run):
    written = io.StringIO()
    Console(width=160, file=written).print(summary_table(run))
    rows = [re.split(r"\s*│\s*", line)[1:-1] for line in written.getvalue().splitlines() if "│" in line]
    assert [row[0] for row in rows] == list(STEPS)
    assert rows[0][1:3] == ["300", "1.23\u202fM"]
    assert rows[4][-1] == (
        f"{percent(dpo_accuracy(), 1)} of held-out pairs right, gold score from 0.64 to 0.92, "
        "wins 66\u202f% of prompts against SFT, KL 1.50"
    )
    assert rows[2][-1] == "87.7\u202f% of held-out pairs right, calibration error 0.047"
    assert "gold score from 0.64 to 0.89, wins 71\u202f% of prompts against SFT" in rows[3][-1]


def test_numbers_read_well():
    assert [count(n) for n in (0, 999, 1234, 868_352, 1_228_800, 65e9)] == [
        "0", "999", "1\u202f234", "868\u202fk", "1.23\u202fM", "65\u202fB",
    ]  # fmt: skip
    assert [duration(s) for s in (0.5, 59, 75, 3700, 200_000)] == [
        "0.5\u202fs", "59\u202fs", "1\u202fmin 15\u202fs", "1\u202fh 1\u202fmin", "2\u202fd 7\u202fh",
    ]  # fmt: skip
    assert [decimal(v) for v in (0.634, -0.001, -1.5, None)] == ["0.63", "0.00", "\u22121.50", DASH]
    assert [signed(v) for v in (0.25, -0.25, 0.001)] == ["+0.25", "\u22120.25", "0.00"]
    assert [percent(0.906), percent(0.877, 1)] == ["91\u202f%", "87.7\u202f%"]
    assert [compact(v) for v in (0.0015, 20_000, 2.5, -1.0)] == ["0.0015", "20\u202fk", "2.5", "\u22121"]
    assert [power(v) for v in (0.0, 3e-5, 0.00015)] == ["0", "3e\u22125", "1.5e\u22124"]


def test_axes_have_round_ticks():
    assert ticks(0, 300) == [0, 100, 200, 300]
    assert ticks(-0.3, 1.1) == [0, 0.5, 1.0]
    assert ticks(0, 0.003) == [0, 0.001, 0.002, 0.003]
    assert log_ticks(0.4, 7) == [0.5, 1, 2, 5]


def test_a_log_axis_puts_equal_ratios_at_equal_distances():
    scale = Scale(0.1, 10, log=True)
    assert [round(scale.at(v)) for v in (0.1, 1, 10)] == [0, 500, 1000]


def test_thinning_keeps_ends_and_spikes():
    points = [(step, 1.0) for step in range(10_000)]
    points[4321] = (4321, 9.0)
    points[7777] = (7777, -9.0)
    thinned = thin_out(points)
    assert len(thinned) <= 400
    assert {points[0], points[-1], points[4321], points[7777]} <= set(thinned)
    assert thinned == sorted(thinned)


def test_smoothing_does_not_lag_and_keeps_a_straight_line():
    line = [(step, 2.0 * step) for step in range(600)]
    inner = [value for _, value in smooth(line)][:-40]
    assert inner == pytest.approx([2.0 * step for step in range(560)])


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-5.0, -5.0], [1e-9, 1e9]])
def test_any_curve_can_be_drawn(values):
    chart = line_chart("A", "b", [Line("c", list(enumerate(values)))], log=True)
    places = [float(n) for n in re.findall(r"-?[\d.]+", re.search(r'class="line main".* d="([^"]*)"', chart).group(1))]
    assert all(0 <= place <= 1000 for place in places)


def test_a_chart_without_points_is_empty():
    assert line_chart("A", "b", [Line("c", [])]) == ""
