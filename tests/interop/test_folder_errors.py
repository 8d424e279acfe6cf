"""A folder that cannot be read exactly is refused in words: which tensor or setting, what was found, what was expected.

Folders here are written by the safetensors library, not by ours.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxgpt.config.load import load
from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.interop.families import FAMILIES, family_for
from jaxgpt.interop.folder import Folder
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.layout import tensor_shape
from jaxgpt.interop.tensor_files import write_tensors
from jaxgpt.interop.weights import parts_of, read_params, sizes_of
from jaxgpt.mesh import make_mesh
from jaxgpt.models.heads import language_model

ROOT = Path(__file__).parents[2]
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def abstract(model: ModelConfig):
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))):
        return language_model(model, model.vocab).abstract


def read(folder: Path):
    foreign = Foreign.describe(folder)
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1, tensor=1))):
        return read_params(foreign, language_model(foreign.model, foreign.model.vocab).abstract)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A whole folder in two shards."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    foreign = Foreign.describe(tmp_path)
    parts = parts_of(foreign.family, abstract(foreign.model))
    shapes = {name: tensor_shape(found[0].layout, sizes_of(foreign.model)) for name, found in parts.items()}
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(shapes)}
    draw = np.random.default_rng(0)
    for file in set(where.values()):
        save_file(
            {n: draw.normal(size=shapes[n]).astype(np.float32) for n in shapes if where[n] == file}, tmp_path / file
        )
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert read(tmp_path)
    return tmp_path


def change(folder: Path, **settings) -> Path:
    (folder / "config.json").write_text(json.dumps({**LLAMA, **settings}))
    return folder


def check_refused(folder: Path, *said: str) -> None:
    with pytest.raises(UserError) as error:
        read(folder)
    for text in said:
        assert text in str(error.value), str(error.value)


def test_a_missing_shard_is_named(folder):
    (folder / "model-00002-of-00002.safetensors").unlink()
    check_refused(folder, "shard model-00002-of-00002.safetensors is missing (10 of 21 tensors, 2 shards)")


def test_a_truncated_file_names_the_tensor_that_is_cut(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-100])
    check_refused(folder, "model-00001-of-00002.safetensors: cut short: ", f"and the file has {len(whole) - 100}")
    shard.write_bytes(whole[:50])
    check_refused(folder, "cut short: its header has")
    shard.write_bytes(b"not one")
    check_refused(folder, "not a safetensors file")


def test_a_tensor_of_another_shape_is_named_with_both(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if "down_proj" in name)
    save_file({**tensors, name: np.zeros((16, 23), np.float32)}, shard)
    check_refused(folder, f"{name} is [16, 23] in model-00001-of-00002.safetensors, expected [16, 24]")


def test_tensors_too_few_or_too_many_are_named(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    lost = next(name for name in tensors if "down_proj" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, shard)
    check_refused(folder, f"tensor {lost} should be in model-00001-of-00002.safetensors, and is not there")
    save_file({**tensors, "model.layers.0.self_attn.q_proj.bias": np.zeros(16, np.float32)}, shard)
    check_refused(folder, "model.layers.0.self_attn.q_proj.bias has no place in LlamaForCausalLM with these settings")
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}, shard)
    assert read(folder), "buffers of older versions are passed over"


def test_settings_that_transformers_ignores_are_ignored(folder):
    """transformers' Llama turns whole heads whatever partial_rotary_factor says, and initial weights are loaded."""
    plain = Foreign.describe(folder).model
    assert Foreign.describe(change(folder, partial_rotary_factor=0.5, initializer_range=0.0)).model == plain
    assert Foreign.describe(change(folder, layer_types=["full_attention"] * 2)).model == plain


def test_the_context_of_pretraining_is_taken_from_the_top_level_first(folder):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    told = {"rope_scaling": {**scaling, "original_max_position_embeddings": 16}}
    assert Foreign.describe(change(folder, **told)).model.positions.scaling.original_context == 16
    told["original_max_position_embeddings"] = 8
    assert Foreign.describe(change(folder, **told)).model.positions.scaling.original_context == 8


def test_fewer_layers_than_tensors_is_no_silent_cut(folder):
    check_refused(change(folder, num_hidden_layers=1), "model.layers.1.mlp.down_proj.weight has no place")
    check_refused(
        change(folder, num_hidden_layers=3), "model.layers.2.input_layernorm.weight is not there, expected [16]"
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"model_type": "lama"},
            "is of model_type 'lama', which jaxgpt does not read. Did you mean 'llama'? Known: llama",
        ),
        ({"model_type": None}, "has no model_type. Known: "),
        ({"hidden_act": "relu6"}, "hidden_act is 'relu6', which jaxgpt does not have here; expected silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "scaled by 'yarn', which jaxgpt does not have"),
        ({"rope_scaling": {"rope_type": "linear"}}, "config.json: rope_scaling: factor is not there"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear', expected a JSON object"),
        ({"rope_theta": 0}, "positions.rope.base: Input should be greater than 0"),
        ({"sliding_window": 8}, "sliding_window is 8, which jaxgpt does not have here; expected leaving it out"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types is ['sliding_attention', 'sliding_attention']"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0, which jaxgpt does not have"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}, which jaxgpt does not have"),
        ({"model_type": ["llama"]}, "is of model_type ['llama'], which jaxgpt does not read"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected a whole number from 1 to 10,000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a whole number from 1 to 10,000"),
        ({"attention_bias": "false"}, "attention_bias is 'false', expected true or false"),
        ({"architectures": [3]}, "architectures is [3], expected one of LlamaForCausalLM, LlamaModel"),
        ({"architectures": ["Qwen2ForCausalLM"]}, "architectures is ['Qwen2ForCausalLM'], expected one of Llama"),
        (
            {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]},
            "layer_types has 1 entries for 2 layers",
        ),
        (
            {
                "model_type": "gpt_neo",
                "architectures": ["GPTNeoForCausalLM"],
                "num_layers": 2,
                "num_heads": 2,
                "attention_types": [[["local"], 10**10]],
            },
            "attention_types has 10000000000 entries for 2 layers",
        ),
        ({"hidden_size": None}, "config.json: hidden_size is not there"),
        ({"num_attention_heads": 3}, "width 16 is not a multiple of attention.heads 3"),
        ({"num_attention_heads": "two"}, "num_attention_heads is 'two', expected a whole number"),
        ({"architectures": ["LlamaForTokenClassification"]}, "expected one of LlamaForCausalLM, LlamaModel, Ll"),
        ({"model_type": "gpt2", "architectures": None}, "config.json: n_embd is not there"),
    ],
)
def test_settings_that_jaxgpt_lacks_are_named(folder, settings, said):
    check_refused(change(folder, **settings), said)


def test_other_folders_are_told_apart(folder, tmp_path):
    check_refused(tmp_path / "nowhere", "no such folder")
    empty = tmp_path / "empty"
    empty.mkdir()
    check_refused(empty, "no config.json there, so it is no Hugging Face model folder")
    (empty / "adapter_config.json").write_text("{}")
    check_refused(empty, "It holds an adapter: merge it into its base model first")
    (empty / "config.json").write_text("{")
    check_refused(empty, "config.json: not JSON")
    (empty / "config.json").write_text(json.dumps(LLAMA))
    check_refused(empty, "no weights there: expected model.safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"")
    check_refused(empty, "only pytorch_model.bin there", "save_pretrained")


def test_quantized_weights_are_refused(folder):
    shard = folder / "model-00001-of-00002.safetensors"
    tensors = load_file(shard)
    name = next(name for name in tensors if "down_proj" in name)
    save_file({**tensors, name: np.zeros((16, 24), np.int8)}, shard)
    check_refused(folder, f"{name} is of type I8; weights are read as F64, F32, F16, BF16")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_our_files_are_read_by_the_safetensors_library(tmp_path, dtype):
    values = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "é": np.float32(1.5).reshape(()),
        "none": np.zeros((0, 2)),
    }
    write_tensors(tmp_path / "x.safetensors", {n: v.shape for n, v in values.items()}, dtype, values.__getitem__)
    there = load_file(tmp_path / "x.safetensors")
    assert {n: v.astype(np.float32).tolist() for n, v in there.items()} == {n: v.tolist() for n, v in values.items()}


def test_a_folder_has_a_mark_of_its_weights(folder):
    mark = Foreign.describe(folder).mark()
    assert mark == Foreign.describe(folder).mark() and len(mark) == 16
    shard = folder / "model-00002-of-00002.safetensors"
    name, tensor = sorted(load_file(shard).items())[0]
    save_file({**load_file(shard), name: tensor + 1}, shard)
    assert Foreign.describe(folder).mark() != mark


PUBLISHED = sorted(path.stem for path in (ROOT / "configs" / "model").glob("*.yaml") if path.stem != "tiny")


def published(name: str, *changes: str) -> ModelConfig:
    return load(ROOT / "configs" / "shakespeare.yaml", [f"model={name}", *changes]).config.model


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_model_has_a_family(name):
    """GPT-3's banded layers are in no class of transformers that also has its biases; dense, it is GPT-2."""
    model = published(name)
    if name.startswith("gpt3"):
        with pytest.raises(UserError, match=re.escape("model.attention.windows is [null, 256], and it has [null]")):
            family_for(model)
        model = published(name, "model.attention.windows=[null]")
    expected = {
        "gpt2": "gpt2",
        "gpt3": "gpt2",
        "gpt": "gpt_neox",
        "pythia": "gpt_neox",
        "palm": "cohere",
        "qwen2": "qwen2",
    }
    assert family_for(model).type == expected.get(name.partition("-")[0], "llama")


def test_banded_layers_without_biases_are_gpt_neo():
    model = published("gpt3-125m", "model.attention.qkv_bias=false", "model.attention.scale=1")
    assert family_for(model).type == "gpt_neo"


def test_the_tiny_model_is_a_llama():
    model = ModelConfig(**{**published("llama-7b").model_dump(), "tied": True})
    assert family_for(model).type == "llama"
    assert family_for(load(ROOT / "configs" / "meadow.yaml", ["model.vocab=1024"]).config.model).type == "llama"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["model.attention.softcap=30"],
            ["LlamaForCausalLM comes nearest", "model.attention.softcap is 30.0, and it has null"],
        ),
        (["model.attention.windows=[8, 16]"], ["model.attention.windows is [8, 16]"]),
        (["model.positions={type: none}"], ["model.positions.type is none, and it has rope"]),
        (["model.mlp.type=relu"], ["model.mlp.type is relu, and it has swiglu"]),
        (
            ["model.attention.qkv_bias=true", "model.attention.out_bias=false", "model.mlp.bias=true"],
            ["model.attention.out_bias is false, and it has true"],
        ),
    ],
)
def test_what_no_class_computes_is_named(changes, said):
    with pytest.raises(UserError) as error:
        family_for(published("llama-7b", "model.context=128", *changes))
    for text in said:
        assert text in str(error.value), str(error.value)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.type)
def test_no_two_arrays_share_a_place(family):
    places = list(family.tensors.values())
    assert len(set(places)) == len(places)


def test_opening_reads_headers_alone(folder):
    opened = Folder.open(folder)
    tensor = opened.tensors["model.norm.weight"]
    assert (tensor.shape, tensor.dtype) == ((16,), "F32")
    assert opened.read("model.norm.weight").dtype == np.float32
