"""What speaks against a verb is told at once, with where it was set, before jax is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxgpt.config.load import ConfigError, load
from jaxgpt.ready import check_ready

RUN = """name: a
prepare: {type: meadow, documents: 100}
model: {context: 64}
tokenizer:
  path_text: "{run}/data/text/*.jsonl"
data: {path: "{run}/data/text/c4.jsonl"}
pretrain: {context: 64}
sft: {context: 32, data: {path: "{run}/data/instructions.jsonl"}}
reward: {context: 32, data: {path: "{run}/data/rankings.jsonl", eval_path: "{run}/data/rankings_eval.jsonl"}}
ppo: {prompt_length: 16, response_length: 48, data: {path: "{run}/data/prompts.jsonl"}}
evaluate: {max_tokens: 16, data: {path: "{run}/data/prompts_eval.jsonl"}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(RUN)
    return tmp_path


def problems(verb: str, *words: str) -> list[str]:
    try:
        check_ready(verb, load(Path("run.yaml"), words))
    except ConfigError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize(
    "verb", ["run", "config", "prepare", "tokenizer", "pretrain", "sft", "reward", "ppo", "report"]
)
def test_files_that_prepare_will_make_need_not_be_there(verb):
    assert problems(verb) == []


def test_each_world_has_files_of_its_own():
    lacking = problems("run", "prepare={type: arithmetic}")
    settings = ("tokenizer.path_text", "data.path", "reward.data.path", "reward.data.eval_path")
    assert [line.partition(" ")[0] for line in lacking] == [*settings]
    assert problems("sft", "prepare={type: arithmetic}", "tokenizer.path_text={run}/data/text.jsonl") == []


def test_every_mistake_is_told_at_once_with_where_it_was_set():
    found = problems(
        "run",
        "pretrain.context=65",
        "ppo.response_length=49",
        "evaluate.max_tokens=64",
        "data.val_fraction=0",
        "pretrain.best=best",
        "sft.best=best",
        "reward.best=best",
        "ppo.best=best",
        "reward.data.path=ranks.jsonl",
        "sft.data.eval_path={run}/data/instruction_eval.jsonl",
        "ppo.data=null",
    )
    limit = "model.context, which is 64 (set by run.yaml:3)"
    assert found == [
        f"pretrain.context (set by 'pretrain.context=65'): found 65, expected at most {limit}",
        "ppo.prompt_length (set by run.yaml:10) + ppo.response_length (set by 'ppo.response_length=49'): found 65, "
        f"expected at most {limit}",
        f"evaluate.max_tokens (set by 'evaluate.max_tokens=64'): found 64, expected less than {limit}: prompts need "
        "room",
        "pretrain.best (set by 'pretrain.best=best'): found 'best', and there is no held-out text; raise "
        "data.val_fraction above 0, or use last",
        "ppo.best (set by 'ppo.best=best'): found 'best', and ppo measures nothing on held-out data; "
        "set ppo.gold, or use last",
        "ppo.data.path (unset by 'ppo.data=null'): must be set, a JSONL file of prompts",
        "sft.data.eval_path (set by 'sft.data.eval_path={run}/data/instruction_eval.jsonl'): "
        "runs/a/data/instruction_eval.jsonl does not exist, nor does the folder runs/a/data. "
        "Did you mean 'runs/a/data/instructions_eval.jsonl'?",
        "reward.data.path (set by 'reward.data.path=ranks.jsonl'): ranks.jsonl does not exist. "
        "Did you mean 'runs/a/data/rankings.jsonl'?",
    ]


def test_a_stage_is_asked_for_its_own_section_alone():
    wrong = ("pretrain.context=65", "sft.data=null", "reward.best=best", "reward.data.eval_path=null")
    assert problems("ppo", *wrong) == problems("tokenizer", *wrong) == problems("prepare", *wrong) == []
    assert problems("pretrain", *wrong)[0].startswith("pretrain.context (set by 'pretrain.context=65'): found 65")
    assert problems("sft", *wrong) == [
        "sft.data.path (unset by 'sft.data=null'): must be set, a JSONL file of conversations"
    ]
    assert problems("reward", *wrong) == [
        "reward.best (set by 'reward.best=best'): found 'best', and there is no held-out data; set "
        "reward.data.eval_path or val_fraction, or use last"
    ]
    assert problems("reward", *wrong, "reward.data.val_fraction=0.1") == []
    assert len(problems("run", *wrong)) == 3


def test_scores_are_normalized_over_what_there_is():
    assert problems("reward", "reward.normalize=policy") == problems("reward", "reward.normalize=demonstrations") == []
    alone = ("sft=null", "pretrain=null", "reward.normalize=policy")
    assert problems("reward", *alone) == [
        "reward.normalize (set by 'reward.normalize=policy'): found policy, and there is no policy to sample from: the "
        "parameters start at random; set reward.init"
    ]
    assert problems("reward", *alone, "reward.init=runs/other/sft") == []
    assert problems("reward", "sft=null", "reward.normalize=demonstrations") == [
        "reward.normalize (set by 'reward.normalize=demonstrations'): found demonstrations, and there are none; set "
        "reward.demonstrations.path, a JSONL file of conversations, or sft.data.path"
    ]
    own = ("reward.normalize=demonstrations", "reward.demonstrations.path=good.jsonl")
    assert problems("reward", *own)[0].startswith(
        "reward.demonstrations.path (set by 'reward.demonstrations.path=good.jsonl'): good.jsonl does not exist"
    )
    missing = problems("reward", "prepare=null", "reward.normalize=demonstrations")
    assert [line.partition(" ")[0] for line in missing if "instructions" in line] == ["sft.data.path"]


def test_config_tells_what_holds_for_every_verb():
    assert problems("config", "sft.data=null", "sft.best=best", "reward.data.path=nowhere.jsonl") == []
    assert len(problems("config", "sft.context=65", "sft.best=best", "ppo.best=best")) == 3


def test_without_prepare_every_file_must_be_there():
    found = problems("run", "prepare=null")
    settings = ("tokenizer.path_text", "data.path", "sft.data.path", "reward.data.path", "reward.data.eval_path")
    assert [line.partition(" ")[0] for line in found] == [*settings, "ppo.data.path", "evaluate.data.path"]
    assert found[0] == "tokenizer.path_text (set by run.yaml:5): no file matches runs/a/data/text/*.jsonl"
    assert [line.partition(" ")[0] for line in problems("eval")] == ["evaluate.data.path"]  # it prepares nothing
    for name in ("instructions.jsonl", "text/c4.jsonl"):
        Path("runs/a/data", name).parent.mkdir(parents=True, exist_ok=True)
        Path("runs/a/data", name).touch()
    assert problems("sft", "prepare=null") == problems("pretrain", "prepare=null") == []


def test_a_tokenizer_needs_text_or_files():
    words = ("data=null", "tokenizer.path_text=null")
    assert problems("sft", *words)[0].startswith("tokenizer.path_text: must be set, files to learn a tokenizer from")
    assert problems("pretrain", *words)[0].startswith("data.path: must be set, files of text for pretrain")
    for path in ("none.model", "none/"):
        assert problems("sft", *words, f"tokenizer.path={path}")[0].startswith(
            "tokenizer.path (set by 'tokenizer.path="
        )
    Path("given").mkdir()
    assert problems("sft", *words, "tokenizer.path=given", "tokenizer.template=vicuna") == []
    found = problems("sft", "tokenizer.template=chat.jinja")
    assert found == ["tokenizer.template (set by 'tokenizer.template=chat.jinja'): chat.jinja does not exist."]


def test_a_run_without_stages_has_nothing_to_do():
    sections = "pretrain", "sft", "reward", "ppo"
    assert problems("run", *(f"{name}=null" for name in sections))[0].startswith("there is nothing to run: the config")


@pytest.mark.parametrize("verb", ["run", "pretrain", "config"])
def test_the_command_line_answers_without_jax(verb):
    code = "import sys; from jaxgpt.cli import main; c = main(sys.argv[1:]); print('jax' in sys.modules); sys.exit(c)"
    words = [sys.executable, "-c", code, verb, "run.yaml", "pretrain.context=65"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert done.stderr.startswith("jaxgpt: pretrain.context (set by 'pretrain.context=65'): found 65, expected at most")


def test_adapters_need_a_matrix_a_rank_that_fits_and_a_model_that_is_trained():
    words = ["model.mlp.type=gelu", "model.attention.kv_heads=1", "sft.lora.targets=[q, gate]", "sft.lora.rank=200"]
    assert problems("run", *words, "reward.lora={rank: 40, targets: [q, k]}", "ppo.lora.rank=32") == [
        "sft.lora.targets (set by 'sft.lora.targets=[q, gate]'): found 'gate', and a feed-forward of type gelu has "
        "none; expected some of q, k, v, o, up, down",
        "sft.lora.rank (set by 'sft.lora.rank=200'): found 200, and the matrix of q is 128 by 128; expected at "
        "most 128",
        "reward.lora.rank (set by 'reward.lora={rank: 40, targets: [q, k]}'): found 40, and the matrix of k is 128 by "
        "32; expected at most 32",
    ]
    assert problems("sft", "pretrain=null", "data.path=null", "sft.lora={}") == [
        "sft.lora: there is no trained model to adapt; set sft.init, or train whole with sft.lora=null"
    ]
    assert problems("run", "sft.lora={}", "ppo.lora={targets: [up, gate, down]}") == []


STUDY = """
overopt:
  gold: {type: function, function: "jaxgpt.data.meadow:gold_score"}
  data: {path: "{run}/data/prompts.jsonl", eval_path: "{run}/data/prompts_eval.jsonl"}
  proxies: {small: {width: 32}}
  reward: {context: 64}
  ppo: {prompt_length: 16, response_length: 40}
"""


def test_a_study_asks_for_its_files_and_those_of_the_stages_it_comes_from():
    Path("run.yaml").write_text(RUN + STUDY)
    assert problems("overopt") == problems("config") == []
    lacking = problems("overopt", "prepare=null")
    assert [line.partition(" ")[0].removesuffix(":") for line in lacking] == [
        "tokenizer.path_text", "data.path", "sft.data.path", "overopt.data.path", "overopt.data.eval_path",
    ]  # fmt: skip


def test_sizes_and_rows_of_a_study_are_told_beforehand():
    Path("run.yaml").write_text(RUN + STUDY)
    words = ("overopt.proxies.small.heads=3", "overopt.reward.context=56", "overopt.ppo.response_length=49")
    assert problems("overopt", *words) == [
        "overopt.proxies.small: width 32 is not a multiple of heads 3, its own or the policy's",
        "overopt.ppo.prompt_length (set by run.yaml:18) + overopt.ppo.response_length (set by "
        "'overopt.ppo.response_length=49'): found 65, expected at most model.context, which is 64",
        "overopt.reward.context (set by 'overopt.reward.context=56'): found 56, expected more than "
        "overopt.ppo.prompt_length (set by run.yaml:18) + overopt.ppo.response_length (set by "
        "'overopt.ppo.response_length=49'), 65: room for a prompt, a response and its end",
    ]


def test_what_a_study_sets_itself_is_refused():
    Path("run.yaml").write_text(RUN + STUDY)
    found = problems("overopt", "overopt.ppo.init=sft")
    assert found == [
        "overopt: ppo.init is set, and the study has its own; leave it out (ppo.init is set by 'overopt.ppo.init=sft')"
    ]
    assert problems("overopt", "overopt.samples=4") == [
        "overopt: best_of goes up to 256, and samples is 4 (samples is set by 'overopt.samples=4')"
    ]
