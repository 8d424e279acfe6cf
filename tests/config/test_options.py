"""The options of sample and chat are read like settings: every mistake at once, in words."""

import dataclasses

import pytest

from jaxgpt.config.load import ConfigError
from jaxgpt.config.options import MEANINGS, SamplingOptions, describe_options, parse_options


def test_options_may_stand_anywhere_and_be_written_in_two_ways():
    line = "runs/a --top-k=5 once --temperature 0 --seed 1e2 --stop a --stop=b"
    words, options = parse_options(line.split())
    assert words == ["runs/a", "once"]
    assert options == SamplingOptions(temperature=0.0, top_k=5, seed=100, stop=("a", "b"))
    assert dataclasses.replace(options, stage="sft", top_p=1.0).stage == "sft"


def test_after_two_dashes_all_is_text():
    assert parse_options(["--", "--top-k", "-"])[0] == ["--top-k", "-"]


def test_text_may_begin_with_one_dash():
    assert parse_options(["-3 + 4"])[0] == ["-3 + 4"]


def test_every_mistake_is_told():
    with pytest.raises(ConfigError) as caught:
        parse_options(["--top-p=0", "--temprature", "--max-tokens=1.5", "--top-k", "x", "--temperature=nan", "--seed"])
    told = caught.value.problems
    assert told[0] == "--top-p: found '0', expected a number above 0, at most 1"
    assert told[1].startswith("--temprature: no such option. Did you mean '--temperature'? Options: --temp")
    assert told[2] == "--max-tokens: found '1.5', expected a whole number, 1 or more"
    assert told[3] == "--top-k: found 'x', expected a whole number, 1 or more"
    assert told[4] == "--temperature: found 'nan', expected a number, 0 or more"
    assert told[5] == "--seed: nothing after it, expected a whole number, 0 or more"


def test_every_option_is_described():
    assert list(MEANINGS) == [field.name for field in dataclasses.fields(SamplingOptions)]
    assert describe_options()[2] == "  --top-k = unset  (a whole number, 1 or more)"
