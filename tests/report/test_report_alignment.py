"""The report's section on alignment: what `jaxgpt eval` left in evaluate/, as tables and charts."""

import json
import re
from pathlib import Path

import pytest
from run_folder import write_run

from jaxgpt.report import write_report

COUNTS = {"prompts": 4, "wins": 2, "ties": 1, "losses": 1, "win_rate": 0.625, "interval": [0.25, 0.9]}
ASKED = {"judge": "my:judge", "proxy": "runs/m/reward", "temperature": 1.0, "prompts": 4}
WIN_RATE = {
    "label": "ppo",
    "measure": "win_rate",
    "against_label": "<b>sft</b>",
    **ASKED,
    **COUNTS,
    "by_kind": {"stories": {**COUNTS, "win_rate": 0.75}, "sums": COUNTS},
    "length": {"ours": 90.0, "theirs": 70.0},
    "longer_won": 0.8,
    "length_controlled": 0.55,
    "scores": {"ours": {"mean": 2.0, "error": 0.1}, "theirs": {"mean": 1.5, "error": 0.1}},
    "asked_twice": {"compared": 3, "flipped": 1, "unreadable": 0, "first_share": 0.6},
}
RATED = {"rating": 1100.4, "interval": [1050.0, 1150.0]}
RATINGS = {"label": "ppo", "measure": "ratings", **ASKED, "ratings": {"ppo": RATED, "sft": {**RATED, "rating": 899.6}}}
CURVE = [
    {"n": n, "kl": kl, "proxy": p, "proxy_error": 0.1, "gold": g, "gold_error": 0.1, "right": r, "right_error": 0.1}
    for n, kl, p, g, r in [(1, 0.0, 0.1, 1.4, 0.8), (4, 0.64, 0.6, 1.9, 0.79), (16, 1.84, 0.7, 1.8, 0.7)]
]
BEST_OF = {
    "label": "sft",
    "measure": "best_of",
    **ASKED,
    "samples": 16,
    "curve": CURVE,
    "pass_at_k": [{"k": n, "share": s, "error": 0.1, "by_kind": {}} for n, s in ((1, 0.8), (4, 0.9), (16, 0.99))],
}
POINTS = [
    {"label": "sft", "group": "sft", "reference": True, "kl": 0.0, "kl_k3": 0.0, "gold": 1.4, "proxy": 0.2},
    *(
        {
            "label": f"{group}-{n}",
            "group": group,
            "reference": False,
            "kl": 0.3 * n,
            "kl_k3": 0.2 * n,
            "gold": 1.4 + n / 9,
        }
        | {"proxy": 0.2 + n / 5, "win_rate": 0.5 + n / 20, "interval": [0.4, 0.8]}
        for group in ("ppo", "grpo")
        for n in (1, 2, 3)
    ),
]
FRONTIER = {"label": "sft", "measure": "frontier", **ASKED, "points": POINTS}
FILES = {"ppo-against-sft": WIN_RATE, "ppo-ratings": RATINGS, "sft-best-of": BEST_OF, "sft-frontier": FRONTIER}


def reported(folder: Path, files: dict) -> tuple[str, dict]:
    run = write_run(folder / "meadow")
    for name, found in {**files, "sft-book.txt": {"text": "book.txt", "perplexity": 3.0}}.items():
        (run / "evaluate" / f"{name}.json").write_text(json.dumps(found))
    page = write_report(run).read_text()
    return page, json.loads((run / "report.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return reported(tmp_path_factory.mktemp("whole"), FILES)


def section(page: str) -> str:
    return page[page.index('<section id="alignment">') : page.index('<section id="environment"')]


def test_the_results_are_in_the_figures(whole):
    _, figures = whole
    assert [one["measure"] for one in figures["alignment"]] == ["win_rate", "ratings", "best_of", "frontier"]
    assert figures["alignment"][0]["win_rate"] == 0.625


def test_win_rates_are_a_table_by_kind_with_what_to_know(whole):
    text = section(whole[0])
    assert "ppo against &lt;b&gt;sft&lt;/b&gt;" in text
    assert re.findall(r'<th scope="row">(\w+)</th><td class="n">4</td>', text) == ["stories", "sums", "all"]
    for said in (
        "Judged by my:judge.",
        "Its score: 2.00 ± 0.10 against 1.50 ± 0.10.",
        "Length: 90 characters against 70; of the decided pairs the longer response won 80\u202f%.",
        "At equal length the win rate would be 55.0\u202f%.",
        "1 of 3 verdicts flipped and count as ties; 60\u202f% of the verdicts were for the one shown first.",
        '<i class="link" style="left:25.0%;width:65.0%"></i>',
        '<td class="n">1100</td>',
    ):
        assert said in text


def test_curves_are_drawn_over_kl_from_the_reference_on(whole):
    text = section(whole[0])
    assert text.count("<svg") == 3 + 3 and text.count('data-of="KL, nats"') == 6
    gold = text[text.index("<b>Judge&#39;s score</b>") :]
    first, second = re.findall(r'class="line (raw \w+)" data-label="(\w+)" d="M([\d.]+) [\d.]+L', gold)[:2]
    assert first == ("raw main", "ppo", "0.0") and second == ("raw second", "grpo", "0.0")
    assert len(re.findall(r"h0", re.search(r'class="line dots mark main"[^>]*d="([^"]*)"', gold).group(1))) == 4
    assert "pass@n" in text and "grpo-3" in text and "80.0\u202f%" in text


def test_other_evaluations_bring_no_section(tmp_path):
    page, figures = reported(tmp_path, {})
    assert 'id="alignment"' not in page and "#alignment" not in page and "alignment" not in figures


def test_a_judge_without_scores_leaves_the_scores_out(tmp_path):
    bare = {key: value for key, value in WIN_RATE.items() if key != "scores"}
    points = [{key: value for key, value in point.items() if key not in ("gold", "proxy")} for point in POINTS]
    curve = [{"n": 1, "kl": 0.0}, {"n": 4, "kl": 0.64}]
    passes = [{"k": 1, "share": 0.5, "error": None}, {"k": 4, "share": 1.0, "error": None}]
    files = {
        "a": bare | {"longer_won": None},
        "b": FRONTIER | {"points": points},
        "c": BEST_OF | {"proxy": None, "curve": curve, "pass_at_k": passes},
        "d": RATINGS | {"ratings": {}, "reason": "x never lost"},
    }
    text = section(reported(tmp_path, files)[0])
    assert text.count("<svg") == 2 and "None: x never lost." in text and "Its score" not in text
