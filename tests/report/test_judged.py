"""A reward model's calibration and the spread of its scores, as the report draws them."""

import re

import pytest
from run_folder import RESULTS, write_run

from jaxgpt.report import summary_table, write_report
from jaxgpt.report.judged import margins, reward_charts


def places(chart: str, look: str) -> list[tuple[float, float]]:
    """The points of a line, in units of the drawing: 1000 wide and high, from the upper left."""
    drawn = re.search(rf'class="line {look}"[^>]* d="([^"]*)"', chart)
    assert drawn is not None
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", drawn[1])]


@pytest.fixture(scope="module")
def charts():
    return [str(chart) for chart in reward_charts(RESULTS["reward"])]


def test_the_reliability_diagram_has_each_bin_at_its_confidence_and_accuracy(charts):
    chart = charts[0]
    low, high, _ = map(float, re.search(r'data-y="(\S+) (\S+) (\S+)"', chart).groups())
    for (x, y), b in zip(places(chart, "dots"), RESULTS["reward"]["calibration"]["bins"], strict=True):
        assert x / 1000 == pytest.approx((b["confidence"] - 0.5) / 0.5, abs=1e-3)
        assert low + (1 - y / 1000) * (high - low) == pytest.approx(b["accuracy"], abs=1e-3)
    assert places(chart, "main") == places(chart, "dots")
    first, last = places(chart, "raw")
    assert (first[0], last) == (0.0, (1000.0, 0.0)) and first[1] == pytest.approx(1000 * (high - 0.5) / (high - low))
    assert "error 0.047, slope 0.81" in chart and 'data-title="confidence"' in chart


def test_the_histogram_outlines_both_sides(charts):
    chart = charts[1]
    _, high, _ = map(float, re.search(r'data-y="(\S+) (\S+) (\S+)"', chart).groups())
    assert "better: mean 0.62" in chart and "other: mean \u22120.55" in chart and 'data-title="score"' in chart
    for look, side in (("main", "chosen"), ("second", "rejected")):
        counts = RESULTS["reward"]["scores"][side]["counts"]
        heights = [(1 - y / 1000) * high for _, y in places(chart, look)]
        assert heights[0] == heights[-1] == 0
        assert heights[1:-1:2] == pytest.approx([count / sum(counts) for count in counts], abs=1e-3)


def test_the_page_and_the_summary_tell_the_calibration(tmp_path):
    folder = write_run(tmp_path / "run", ("reward",))
    page = write_report(folder).read_text()
    assert "calibration error 0.047" in page and page.count('data-title="confidence"') == 1
    assert re.search(r'<th scope="row">stories</th><td class="n">420</td><td class="n">90', page)
    cells = [cell for column in summary_table(folder).columns for cell in column.cells]
    assert "87.7\u202f% of held-out pairs right, calibration error 0.047" in cells


def test_without_an_evaluation_there_is_nothing_to_draw():
    assert reward_charts({"heldout_accuracy": 0.8}) == [] and margins([]) == []
