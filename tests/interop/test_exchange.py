"""Finished models out as Hugging Face folders and in again: the same answers and scores on both sides, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import SENTENCES, load_once, make_run

import jaxgpt
from jaxgpt.api import Model
from jaxgpt.config.options import Export, Import
from jaxgpt.config.schema import MeshConfig
from jaxgpt.errors import UserError
from jaxgpt.exchange import export, import_folder
from jaxgpt.interop.export import write_folder
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.weights import paths_of

QUESTIONS = ["What is the cat?", "Tell me a story.", "Who? ", " \n<|user|></s>"]
FOLDER_FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.getbasetemp() / "exchange_run")


@pytest.fixture(scope="module")
def sft(run) -> Model:
    return load_once(run / "sft")


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory) -> Path:
    """sft/ and reward/, exported from eight devices."""
    home = tmp_path_factory.mktemp("exported")
    for stage in ("sft", "reward"):
        export(run, home / stage, Export(stage=stage, mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    return home


def test_the_folders_are_whole(folders):
    assert {file.name for file in (folders / "sft").iterdir()} == FOLDER_FILES | {"generation_config.json"}
    assert {file.name for file in (folders / "reward").iterdir()} == FOLDER_FILES
    config = json.loads((folders / "sft" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"] and config["rope_theta"] == 10_000.0
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10_000.0}
    score = json.loads((folders / "reward" / "config.json").read_text())
    assert (score["num_labels"], score["pad_token_id"]) == (1, config["pad_token_id"])
    assert "split_special_tokens" in (folders / "sft" / "README.md").read_text()


def test_what_was_exported_comes_back_bit_for_bit(run, folders, tmp_path):
    """On eight devices, as a run and straight from the folder; the tokenizer is the same one. Rows that pad the
    embedding stay behind: transformers would generate them, and we never do."""
    for stage in ("sft", "reward"):
        import_folder(folders / stage, Import(out=str(tmp_path / stage), mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
        ours = load_once(run / stage)
        for back in (jaxgpt.load(tmp_path / stage), jaxgpt.load(f"hf:{folders / stage}")):
            size = ours.tokenizer.size
            assert (back.kind, back.vocab, back.tokenizer.hash) == (ours.kind, size, ours.tokenizer.hash)
            found = paths_of(back.params)
            for path, array in paths_of(ours.params).items():
                kept = array[:size] if path.endswith("VD") else array
                assert np.array_equal(kept, found[path]), path


def test_greedy_answers_are_those_of_transformers(sft, folders):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "sft", padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "sft", dtype=torch.float32)
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS[:3]]
    rows = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True
    )
    assert [ids[mask == 1].tolist() for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)] == [
        sft.chat_tokens(chat) for chat in chats
    ]
    theirs = model.generate(**rows, max_new_tokens=32, do_sample=False)[:, rows["input_ids"].shape[1] :]
    ours = sft.generate([sft.chat_tokens(chat) for chat in chats], max_tokens=32, temperature=0)
    for row, one in zip(theirs.tolist(), ours, strict=True):
        assert row[: len(one.tokens)] == one.tokens
        assert not one.ended or set(row[len(one.tokens) :]) <= {tokenizer.pad_token_id}
    plain = model.generate(**tokenizer(SENTENCES[0][:12], return_tensors="pt"), max_new_tokens=24, do_sample=False)[0]
    asked = sft.encode(SENTENCES[0][:12])
    assert plain.tolist() == asked + sft.generate([asked], max_tokens=24, temperature=0)[0].tokens


def test_scores_are_those_of_transformers(run, folders):
    """A ragged batch, padded by transformers; its classifiers have no bias, which config.json holds."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders / "reward")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folders / "reward", dtype=torch.float32)
    texts = ["Yes.", "It is black. " * 3, "No, it is not."]
    chats = [
        [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        for q, a in zip(QUESTIONS[:3], texts, strict=True)
    ]
    rows = tokenizer.apply_chat_template(chats, return_dict=True, return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = model(**rows).logits[:, 0].numpy() + model.config.score_bias
    ours = load_once(run / "reward").score(chats)
    assert np.ptp(ours) > 0.1 and np.abs(ours - theirs).max() < 1e-5


def test_a_reward_models_bias_and_gain_survive_and_are_told(run, folders, tmp_path, capsys):
    reward = load_once(run / "reward")
    shifted = {**reward.params, "bias": reward.params["bias"] + 1.25}
    with jax.set_mesh(reward.mesh):
        config = reward.config.model_copy(update={"vocab": reward.vocab})
        write_folder(tmp_path / "shifted", "scalar", config, shifted, reward.tokenizer, "F32", 10**9, gain=0.25)
    back = jaxgpt.load(f"hf:{tmp_path / 'shifted'}")
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    assert back.score(chat) == pytest.approx(reward.score(chat) + 1.25, abs=1e-6)
    card = (tmp_path / "shifted" / "README.md").read_text()
    assert "config.score_bias" in card and "config.score_gain" in card
    import_folder(tmp_path / "shifted", Import(out=str(tmp_path / "out")))
    assert (reward.gain, back.gain, jaxgpt.load(tmp_path / "out").gain) == (1.0, 0.25, 0.25)


def test_nothing_half_written_remains(run, folders, tmp_path):
    broken = shutil.copytree(folders / "sft", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(UserError, match="cut short"):
        import_folder(broken, Import(out=str(tmp_path / "out")))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        import_folder(broken, Import(out=str(tmp_path / "out")))
    with pytest.raises(UserError, match="is there already; name another folder"):
        export(run, broken, Export(stage="sft"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_a_model_that_no_class_computes_is_not_exported(run, tmp_path):
    sft = load_once(run / "sft")
    config = sft.config.model_copy(update={"vocab": sft.vocab, "logit_softcap": 30.0})
    with jax.set_mesh(sft.mesh), pytest.raises(UserError, match=r"model.logit_softcap is 30.0, and it has null"):
        write_folder(tmp_path / "x", "language", config, sft.params, sft.tokenizer, "F32", 10**9)
    assert not list(tmp_path.iterdir())


def test_a_family_without_a_classifier_says_so(run, tmp_path):
    reward = load_once(run / "reward")
    palm = {"vocab": reward.vocab, "residual": "parallel", "norm": {"type": "layernorm", "eps": 1e-6}}
    positions = {"type": "rope", "pairing": "interleaved"}
    config = reward.config.model_validate({**reward.config.model_dump(), **palm, "positions": positions})
    with pytest.raises(
        UserError, match="is built as CohereForCausalLM, and transformers has no CohereForSequenceClass"
    ):
        write_folder(tmp_path / "x", "scalar", config, reward.params, reward.tokenizer, "F32", 10**9)


def test_the_wrong_kind_of_folder_is_refused(folders):
    with pytest.raises(UserError, match="reward holds a reward model; generate needs a language model"):
        jaxgpt.load(f"hf:{folders / 'reward'}").generate("x")
    with pytest.raises(UserError, match="a Hugging Face folder holds one model; leave the stage 'sft' out"):
        jaxgpt.load(f"hf:{folders / 'sft'}", "sft")
    assert Foreign.describe(folders / "reward").kind == "scalar"
