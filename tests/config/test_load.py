"""A config is a file, what it inherits, its groups and the command line; each value knows its place."""

import re
from pathlib import Path

import pytest
import yaml

from jaxgpt.config.load import ConfigError, difference, dump, load
from jaxgpt.config.schema import Config, LearnedPositions, RopePositions

FILES = {
    "base.yaml": """\
        model: tiny
        pretrain: {}
        data:
          sources:
            web: {path: [a, b], weight: 67}
            books: {path: c}
        """,
    "run.yaml": """\
        base: base.yaml
        # a comment
        name: meadow
        model:
          positions: {base: 5e5}
          attention:
            heads: 8
        sft:
          steps: 1e2
          data: {path: talk.jsonl}
          optimizer:
            lr: 1e-3
        """,
    "model/tiny.yaml": "width: 64\ncontext: 1e3\npositions:\n  type: rope\n  fraction: 0.25\n",
    "model/wide.yaml": "base: tiny.yaml\nwidth: 512\n",
    "grown.yaml": "model:\n  base: tiny\n  layers: 9\n",
    "loop/a.yaml": "base: b.yaml\n",
    "loop/b.yaml": "base: a.yaml\n",
    "anchors.yaml": "pretrain: &stage\n  steps: 7\nsft:\n  <<: *stage\n  dropout: 0.2\n",
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        write(name, text)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = text.splitlines()
    margin = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    path.write_text("".join(f"{line[margin:]}\n" for line in lines))
    return path


def load_run(*overrides: str) -> Config:
    return load(Path("run.yaml"), overrides).config


def problems(*overrides: str, text: str | None = None) -> list[str]:
    path = Path("run.yaml") if text is None else write("bad.yaml", text)
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    assert str(caught.value).count("\n") == (len(caught.value.problems) if len(caught.value.problems) > 1 else 0)
    return list(caught.value.problems)


# What is laid over what


def test_a_file_changes_what_it_inherits_key_by_key():
    config = load_run()
    assert config.name == "meadow" and config.pretrain is not None
    assert config.model.attention.heads == 8 and config.model.width == 64 and config.model.context == 1000
    assert config.model.positions == RopePositions(base=5e5, fraction=0.25)
    assert config.data.sources["web"].weight == 67 and config.data.sources["books"].path == "c"
    assert config.sft.steps == 100 and config.sft.optimizer.lr == 1e-3 and config.sft.optimizer.b2 == 0.95


def test_every_value_knows_where_it_was_set(folder):
    origins = load(folder / "run.yaml", ["sft.steps=10", "ppo.kl={coef: 0.1}", "reward={}"]).origins
    assert origins["name"] == "run.yaml:3"
    assert origins["model.positions.base"] == "run.yaml:5"
    assert origins["model.positions.fraction"] == "model/tiny.yaml:5"
    assert origins["model.context"] == "model/tiny.yaml:2"
    assert origins["data.sources.web.weight"] == "base.yaml:5"
    assert origins["sft.optimizer.lr"] == "run.yaml:12"
    assert origins["sft.steps"] == "command line 'sft.steps=10'"
    assert origins["ppo.kl.coef"] == "command line 'ppo.kl={coef: 0.1}'"
    assert origins["sft.optimizer.b1"] == origins["seed"] == origins["reward.steps"] == origins["evaluate"] == "default"


def test_a_group_takes_the_place_of_its_section():
    config = load_run("model=wide")
    assert config.model.width == 512 and config.model.context == 1000  # wide.yaml has tiny.yaml as its base
    assert config.model.attention.heads == 4 and config.model.positions.base == 10000  # run.yaml's are gone


def test_a_group_can_be_the_base_of_a_section():
    config = load(Path("grown.yaml")).config
    assert (config.model.width, config.model.layers) == (64, 9)


def test_groups_are_found_in_configs_beside_the_file_and_beside_its_folder():
    write("configs/mesh/two.yaml", "data: 2")
    write("runs/old/config.yaml", "name: old")
    assert load_run("mesh=two").mesh.data == 2
    assert load(Path("runs/old/config.yaml"), ["mesh=two"]).config.mesh.data == 2


def test_overrides_apply_in_order_after_groups():
    assert load_run("sft.steps=1", "sft.steps=2").sft.steps == 2
    assert load_run("model.width=32", "model=wide").model.width == 32
    assert load_run("sft=null", "sft.batch=4").sft.steps == 300  # the file's 100 is unset first


def test_an_override_reaches_into_a_section_that_is_absent():
    config = load_run("ppo.data.path=prompts.jsonl", "evaluate.samples=[a, b]")
    assert config.ppo.data.path == "prompts.jsonl" and config.evaluate.samples == ("a", "b")


def test_null_unsets():
    config = load_run("sft=null", "data.sources.web=null", "model.context=null", "pretrain.optimizer.clip=null")
    assert config.sft is None and list(config.data.sources) == ["books"]
    assert config.model.context == 256 and config.pretrain.optimizer.clip is None


@pytest.mark.parametrize("text", ["1e3", "1000", "1000.0", "+1e+3"])
def test_whole_numbers_may_be_written_as_floats(text):
    config = load_run(f"sft.steps={text}", f"model.attention.windows=[{text}]", "sft.optimizer.eps=1e-9")
    assert config.sft.steps == 1000 and type(config.sft.steps) is int
    assert config.model.attention.windows == (1000,) and config.sft.optimizer.eps == 1e-9


def test_text_stays_text():
    config = load_run("name=no", "runs='1e3'", "data.sources=null", "data.path={run}/text/*.jsonl", "tokenizer.path=")
    assert (config.name, config.runs, config.data.path) == ("no", "1e3", "{run}/text/*.jsonl")
    assert config.tokenizer.path is None and load_run("name=12:30").name == "12:30"


def test_choosing_another_variant_drops_the_settings_of_the_old_one():
    config = load_run("model.positions.type=learned")
    assert config.model.positions == LearnedPositions()
    assert load_run("model.positions.type=rope").model.positions.fraction == 0.25


def test_yaml_anchors_work():
    config = load(Path("anchors.yaml")).config
    assert (config.pretrain.steps, config.sft.steps, config.sft.dropout) == (7, 7, 0.2)


def test_an_empty_file_is_all_defaults():
    assert load(write("empty.yaml", "")).config == Config()


# Writing


def test_a_dumped_config_loads_to_the_same_config():
    odd = ["1e3", "no", "null", "", " a", "12:30", "a: b # c", "é\n\n ü", "{run}/x", "*", "0x1F", "~", "- a", "\x7f"]
    odd += ["'\"\\", "1_000", ".5", "<<", "="]
    config = load_run("ppo={data: {path: x}}").model_copy(update={"name": "1e3"})
    config = Config.model_validate({**config.model_dump(), "evaluate": {"samples": odd, "few_shot": [["a", "b"]]}})
    again = load(write("dumped.yaml", dump(config))).config
    assert again == config and again.evaluate.samples == tuple(odd)
    assert yaml.safe_load(dump(config))["evaluate"]["samples"] == odd  # for readers of YAML 1.1 too
    assert dump(again) == dump(config)


def test_the_difference_of_two_configs_is_told_by_path():
    old, new = load_run(), load_run("sft.steps=200", "reward={}", "data.sources.web=null", "sft.optimizer.clip=null")
    told = difference(old.model_dump(mode="json"), new.model_dump(mode="json"))
    assert told[0] == "data.sources.web: {path: [a, b], weight: 67.0, field: text} -> unset"
    assert told[1:3] == ["sft.optimizer.clip: 1.0 -> null", "sft.steps: 100 -> 200"]
    assert len(told) == 4 and told[3].startswith("reward: null -> {")
    assert difference(old.model_dump(mode="json"), yaml.safe_load(dump(old))) == []


# Mistakes


def test_an_unknown_key_is_told_with_its_place_the_nearest_name_and_the_fields():
    assert problems("model.widht=512") == [
        "model.widht (set by 'model.widht=512'): no such field. Did you mean 'width'? Fields: "
        "vocab, width, layers, context, norm, positions, attention, mlp, residual, shared_norm, tied, embedding_scale, "
        "logit_scale, logit_softcap, init_std, embedding_std, dtype, scan_layers, remat"
    ]
    (problem,) = problems(text="sft:\n  data:\n    path: a\n    evalpath: b\n")
    assert problem == (
        "sft.data.evalpath (set by bad.yaml:4): no such field. Did you mean 'eval_path'? "
        "Fields: path, eval_path, prompt_field, completion_field"
    )


def test_a_key_at_the_wrong_depth_is_told_the_right_one():
    assert "Did you mean 'sft.optimizer.lr'?" in problems("sft.lr=1e-3")[0]
    assert (
        "'pretrain.optimizer.lr', 'sft.optimizer.lr', 'reward.optimizer.lr' or 'ppo.optimizer.lr'"
        in problems("lr=1")[0]
    )


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.steps=ten", "found 'ten', expected a whole number, 1 or more"),
        ("sft.steps=1.5", "found 1.5, expected a whole number, 1 or more"),
        ("sft.steps=true", "found true, expected a whole number, 1 or more"),
        ("sft.steps={a: 1}", "found {a: 1}, expected a whole number, 1 or more"),
        ("sft.batch=0", "found 0, expected a whole number, 1 or more"),
        ("reward.epochs=-1", "found -1, expected a whole number, 1 or more"),
        ("sft.dropout=1", "found 1, expected a number from 0 to below 1"),
        ("sft.optimizer.b1=2", "found 2, expected a number from 0 to below 1"),
        ("sft.optimizer.lr=yes", "found 'yes', expected a number above 0"),
        ("sft.optimizer.lr=.inf", "found .inf, expected a number above 0"),
        ("sft.optimizer.clip=[1]", "found [1], expected a number above 0 or null"),
        ("reward.responses=1", "found 1, expected a whole number from 2 to 64"),
        ("mesh.data=all", "found 'all', expected a whole number, 1 or more, or auto"),
        ("model.tied=5", "found 5, expected true or false"),
        ("model.mlp=5", "found 5, expected a section with type, width, bias"),
        (
            "model.mlp.type=gellu",
            "found 'gellu', expected gelu, gelu_tanh, relu, swiglu or geglu. Did you mean 'gelu'?",
        ),
        ("model.positions.type=roep", "found 'roep', expected rope, learned or none. Did you mean 'rope'?"),
        ("model.positions=5", "found 5, expected a section whose type is rope, learned or none"),
        ("model.attention.windows=[-1]", "found [-1], expected a list, each item a whole number, 1 or more, or null"),
        (
            "name=2024",
            "found 2024, expected text that can name a folder, without /. For text, write \"name='2024'\".",
        ),
        ("name=''", "found '', expected text that can name a folder, without /"),
        ("name=..", "found '..', expected text that can name a folder, without /"),
        ("name=a/b", "found 'a/b', expected text that can name a folder, without /"),
        ("sft.optimizer.b1=false", "found false, expected a number from 0 to below 1"),
        ("sft.optimizer.b2=true", "found true, expected a number from 0 to below 1"),
        ("data.sources=5", "found 5, expected a table of names, each with path, weight, field"),
        ("evaluate.few_shot=[[a]]", "found [[a]], expected a list, each item a list of 2: text, text"),
    ],
)
def test_a_wrong_value_is_told_with_what_was_found_and_what_is_expected(override, said):
    path = override.partition("=")[0]
    assert problems(override) == [f"{path} (set by '{override}'): {said}"]


def test_no_trace_of_how_variants_are_read_is_in_the_message():
    (problem,) = problems("model.positions.bsae=5")
    assert problem.startswith(
        "model.positions.bsae (set by 'model.positions.bsae=5'): no such field. Did you mean 'base'?"
    )
    path = "model.positions.scaling.factor"
    assert problems(f"{path}=-1") == [f"{path} (set by '{path}=-1'): found -1, expected a number above 0"]


def test_a_rule_between_settings_names_the_places_of_both():
    assert problems("model.width=60") == [
        "model: width 60 is not a multiple of attention.heads 8; set attention.head_dim "
        "(width is set by 'model.width=60', attention.heads is set by run.yaml:7)"
    ]
    assert problems("mesh.data=auto") == ["mesh: only one axis can be auto"]


def test_a_needed_setting_is_asked_for():
    assert problems("ppo.data={}") == ["ppo.data.path (needed by 'ppo.data={}'): must be set, text or a list of texts"]


def test_all_mistakes_are_told_at_once():
    text = "base: nowhere.yaml\nnmae: x\nsft:\n  steps: 5\n  steps: x\n  data: {eval_path: 5}\nmodel: huge\n"
    told = problems("foo", "ppo.clip=-1", "--seed=3", "model=tyni", "runs=[a", text=text)
    starts = [
        "bad.yaml:5: 'sft.steps' is set twice, first in line 4; keep one",
        "model (set by bad.yaml:7): no file model/huge.yaml. There are: model/tiny.yaml, model/wide.yaml.",
        "nowhere.yaml (base set by bad.yaml:1): no such file or directory.",
        "model (set by 'model=tyni'): no file model/tyni.yaml. Did you mean 'model/tiny.yaml'?",
        "runs (set by 'runs=[a'): not valid YAML: expected ',' or ']', but got '<stream end>'",
        "'foo': expected key.path=value, as in 'sft.steps=100'",
        "'--seed=3': no such option. Settings have no dashes: 'seed=3'",
        "nmae (set by bad.yaml:2): no such field. Did you mean 'name'?",
        "sft.data.eval_path (set by bad.yaml:6): found 5, expected text or a list of texts or null. For text",
        "sft.steps (set by bad.yaml:5): found 'x', expected a whole number, 1 or more",
        "ppo.clip (set by 'ppo.clip=-1'): found -1, expected a number above 0",
    ]
    assert [line[: len(start)] for line, start in zip(told, starts, strict=True)] == starts


def test_a_missing_file_is_answered_with_the_nearest():
    write("configs/meadow.yaml", "")
    for name, guess in [("rnu.yaml", "run.yaml"), ("meadow.yml", "configs/meadow.yaml")]:
        with pytest.raises(ConfigError, match=re.escape(f"{name}: no such file or directory. Did you mean '{guess}'?")):
            load(Path(name))
    write("runs/old/config.yaml", "")
    with pytest.raises(ConfigError, match=r"runs/old: is a directory\. Did you mean 'runs/old/config\.yaml'\?"):
        load(Path("runs/old"))


def test_files_that_inherit_in_a_circle_are_named():
    with pytest.raises(ConfigError) as caught:
        load(Path("loop/a.yaml"))
    assert str(caught.value) == (
        "base (set by loop/b.yaml:1): the files inherit from each other in a circle: "
        "loop/a.yaml -> loop/b.yaml -> loop/a.yaml"
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\n  runs: b\n", "bad.yaml:2:7: not valid YAML: a ':' where no key can stand; check the indentation"),
        ("name:\n\tx: 1\n", "bad.yaml:2:1: not valid YAML: a tab; indent with spaces"),
        ("name: [a\n", "bad.yaml:2:1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("data:\n  path: {run}/text\n", "bad.yaml:2:14: not valid YAML: text that begins with { or * needs quotes"),
        ("data:\n  path: *.jsonl\n", "bad.yaml:2:10: not valid YAML: text that begins with { or * needs quotes"),
        ("name: !!python/name:os.system\n", "bad.yaml:1:7: not valid YAML: could not determine a constructor"),
        ("- a\n", "bad.yaml:1: expected lines of 'key: value', found a list"),
        ("? [a]\n: b\n", "bad.yaml:1:3: not valid YAML: a list cannot be a key"),
        ("sft: &a\n  data: *a\n", "bad.yaml:1:6: not valid YAML: an alias that contains itself"),
        ("name: a\nruns: \x01\n", "bad.yaml:2: not valid YAML: character U+0001 is not allowed"),
        ("name: a\nname: b\n", "bad.yaml:2: 'name' is set twice, first in line 1; keep one"),
        ("base: [a]\n", "base (set by bad.yaml:1): found [a], expected the path of a YAML file"),
    ],
)
def test_bad_yaml_is_told_with_line_and_column(text, said):
    (problem,) = problems(text=text)
    assert problem.startswith(said)


def test_a_file_that_is_no_text_is_told_so():
    Path("bad.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(ConfigError, match=r"bad.yaml: not UTF-8 text \(byte 6\)"):
        load(Path("bad.yaml"))


def test_filters_of_what_is_sampled_to_be_learned_from_are_refused_with_the_reason():
    with pytest.raises(ConfigError, match=r"ppo.top_p \(set by .*\): there is no such setting: .*log-probabilities"):
        load(Path("run.yaml"), ["ppo.top_p=0.9"])


def test_a_penalty_for_a_missing_end_is_not_negative():
    with pytest.raises(ConfigError, match=r"grpo.missing_eos: value -1.0 is taken off, which adds to the score"):
        load(Path("run.yaml"), ["grpo.missing_eos={how: subtract}"])


def test_what_does_not_divide_is_told():
    for words, told in (
        (["ppo.episodes=48"], "episodes 48 is not a multiple of batch 32"),
        (["grpo={episodes: 36, responses: 8, batch: 12}"], "episodes 36 is not a multiple of responses 8"),
        (["rejection={episodes: 64, responses: 16, batch: 8}"], "episodes / responses 4 is not a multiple of batch 8"),
        (["grpo={rollout_batch: 4}"], "rollout_batch 4 is not a multiple of responses 8"),
        (["rloo={stop_after: 64}"], "stop_after 64 is not below response_length 64"),
        (["grpo.kl.controller=adaptive"], "kl.controller adaptive steers a penalty in the reward"),
    ):
        with pytest.raises(ConfigError, match=re.escape(told)):
            load(Path("run.yaml"), words)
