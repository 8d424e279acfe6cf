"""The report of a study of over-optimisation: its points and laws are those of the results."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from run_folder import write_run

from jaxgpt.report import write_report
from jaxgpt.report.numbers import DASH
from jaxgpt.report.study import study_view, turn


def curve(start: float, peak: float, drop: float) -> list[dict[str, float]]:
    """Gold that rises to `peak` at d = 1 and falls by `drop` to d = 2, while the proxy rises."""
    ends = [(0.0, start), (0.25, (start + peak) / 2), (1.0, peak), (4.0, peak - drop)]
    return [{"kl": kl, "proxy": kl**0.5, "gold": gold, "gold_error": 0.05} for kl, gold in ends]


def proxy(drop: float) -> dict[str, Any]:
    law = {"alpha": 1.2, "beta": 0.5, "r2": 0.95, "peak": 1.2}
    return {
        "params": 42_000,
        "labels": 250,
        "noise": 1.0,
        "accuracy": 0.86,
        "start": {"proxy": 0.0, "gold": 1.6},
        "best_of_n": {"points": curve(1.6, 2.5, drop), "fit": law},
        "ppo": {"points": curve(1.6, 2.3, 3 * drop), "fit": None},
    }


STUDY = {"policy": "sft", "prompts": 64, "proxies": {"small": proxy(0.5), "<large>": proxy(0.1)}}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "meadow")
    (folder / "overopt").mkdir()
    (folder / "overopt/results.json").write_text(json.dumps(STUDY))
    write_report(folder)
    return (folder / "report.html").read_text()


def test_there_is_a_section_where_there_was_a_study(page, tmp_path):
    assert 'href="#overopt"' in page and "64 held-out prompts" in page
    write_report(write_run(tmp_path / "other"))
    assert "overopt" not in (tmp_path / "other/report.html").read_text()


def test_a_study_of_another_runs_model_needs_no_stage_of_its_own(tmp_path):
    (tmp_path / "alone/overopt").mkdir(parents=True)
    (tmp_path / "alone/overopt/results.json").write_text(json.dumps(STUDY))
    assert "Over-optimisation" in write_report(tmp_path / "alone").read_text()
    assert json.loads((tmp_path / "alone/report.json").read_text())["overopt"] == STUDY


def test_every_proxy_has_a_chart_for_each_method_on_the_same_axes(page):
    section = page[page.index('<section id="overopt">') :]
    titles = re.findall(r"<figcaption><b>(.*?)</b>", section)
    assert titles[:4] == ["small, best-of-n", "small, PPO", "&lt;large&gt;, best-of-n", "&lt;large&gt;, PPO"]
    axes = re.findall(r'data-of="√KL" data-x="(.*?)" data-y="(.*?)"', section)
    assert len(axes) == 4 and len(set(axes)) == 1 and axes[0][0] == "0.0 2.0"


def test_the_points_are_gains_over_the_square_root_of_the_kl(page):
    gold = re.search(r'class="line dots own" data-label="gold score" d="(.*?)"', page)[1]
    places = [tuple(map(float, point.split())) for point in re.findall(r"M([\d.]+ [\d.]+)h0", gold)]
    assert [x for x, _ in places] == [0.0, 250.0, 500.0, 1000.0]
    low, high = -0.8 - 0.05 * 2.8, 2.0 + 0.05 * 2.8  # gains from 2.3 - 1.5 - 1.6 up to the proxy's 2
    assert places[2][1] == pytest.approx(1000 * (1 - (0.9 - low) / (high - low)), abs=0.2)
    assert "its law, R² 0.95" in page and page.count("its law") > 0


def test_the_table_tells_the_turn():
    row = study_view(STUDY)["rows"][0]
    assert (row["start"], row["peak"], row["end"]) == ("1.60", "2.50 at 1.00", "2.00 at 2.00")
    assert row["law"] == ["1.20", "0.50", "0.95"] and study_view(STUDY)["rows"][1]["law"] == [DASH] * 3


def test_the_end_is_what_is_farthest_not_what_is_last():
    points = [{"kl": 0.0, "gold": 1.0}, {"kl": 5.0, "gold": 2.0}, {"kl": 4.0, "gold": 3.0}]
    assert turn(points) == {"peak": points[2], "end": points[1]}


def test_no_study_is_no_section():
    assert study_view({}) is None
