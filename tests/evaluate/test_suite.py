"""What would be found out at the end of a run is told at its beginning."""

import json

import pytest
from rich.console import Console
from tiny_run import make_run

from jaxgpt.config.schema import Config, EvaluateConfig, MeshConfig, Prompts
from jaxgpt.errors import UserError
from jaxgpt.evaluate.suite import Suite
from jaxgpt.pipeline import Pipeline

ONE = MeshConfig(data=1, fsdp=1, tensor=1)


def test_a_run_is_refused_before_it_begins(tmp_path):
    wrong = EvaluateConfig(data=Prompts(path="x.jsonl"), scorer="jaxgpt.data.meadow:gold")
    config = Config(name="a", runs=str(tmp_path), pretrain={}, evaluate=wrong)
    with pytest.raises(UserError, match=r"evaluate.scorer: jaxgpt.data.meadow has no function gold"):
        Pipeline(config, Console()).everything()
    assert not (tmp_path / "a").exists()


def test_prompts_are_checked_by_file_and_line(tmp_path):
    run, asked = make_run(tmp_path / "run"), tmp_path / "asked.jsonl"
    config = EvaluateConfig(data=Prompts(path=str(asked)), max_tokens=40)

    def suite(*records, folder=run):
        asked.write_text("".join(json.dumps(record) + "\n" for record in records))
        return Suite(folder, Config(), config, ONE, Console())

    assert len(suite({"prompt": "cat?"}, {"prompt": "dog?"}).asked) == 2
    with pytest.raises(UserError, match=r"asked.jsonl:2: .* tokens, model.context - evaluate.max_tokens is 24"):
        suite({"prompt": "cat?"}, {"prompt": "cat? " * 20})
    with pytest.raises(UserError, match=r"asked.jsonl:1: "):
        suite({"promt": "cat?"})
    exact, config = config, config.model_copy(update={"grade": "number"})
    with pytest.raises(UserError, match=r'asked.jsonl:3: "answer" is "four", which has no number; evaluate.grade'):
        suite({"prompt": "cat?"}, {"prompt": "cat?", "answer": None}, {"prompt": "cat?", "answer": "four"})
    config = exact.model_copy(update={"samples": ("cat?", "cat? " * 20)})
    with pytest.raises(UserError, match=r"evaluate.samples.1.: .* tokens, model.context - evaluate.max_tokens is 24"):
        suite({"prompt": "cat?"})
    config = config.model_copy(update={"samples": ("cat?",), "few_shot": (("cat?", "It is black. " * 9),)})
    with pytest.raises(UserError, match=r"evaluate.samples.0.: with evaluate.few_shot before it, "):
        suite({"prompt": "cat?"})
    with pytest.raises(UserError, match="no stage is finished, so there is nothing to evaluate"):
        suite({"prompt": "cat?"}, folder=tmp_path / "empty")
