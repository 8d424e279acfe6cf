"""Adapters in PEFT's format: W + alpha / r B A, with their names and layouts, is the merged model's export."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_run import make_run, random_params

from jaxgpt.cli import main
from jaxgpt.config.schema import LoraConfig, ModelConfig
from jaxgpt.interop.adapters import write_adapters
from jaxgpt.interop.export import choose_family
from jaxgpt.interop.weights import write_weights
from jaxgpt.mesh import AXES
from jaxgpt.models.heads import language_model
from jaxgpt.models.lora import merged, split

TINY = {"vocab": 40, "width": 24, "layers": 2, "context": 32, "attention": {"heads": 4, "head_dim": 6}}
BIASED = {"type": "layernorm", "bias": True, "eps": 1e-5}
ALL = ("q", "k", "v", "o", "up", "gate", "down")
MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"attention": {"heads": 4, "kv_heads": 2, "head_dim": 6}, "tied": False},
    "CohereForCausalLM": {
        "attention": {"heads": 4, "kv_heads": 1},
        "norm": {"type": "layernorm"},
        "positions": {"type": "rope", "pairing": "interleaved"},
        "residual": "parallel",
    },
    "GPT2LMHeadModel": {
        "norm": BIASED,
        "positions": {"type": "learned"},
        "attention": {"heads": 4, "qkv_bias": True, "out_bias": True},
        "mlp": {"type": "gelu_tanh", "bias": True},
    },
    "GPTNeoXForCausalLM": {
        "norm": BIASED,
        "positions": {"type": "rope", "fraction": 0.5},
        "attention": {"heads": 4, "qkv_bias": True, "out_bias": True},
        "mlp": {"type": "gelu", "bias": True},
        "residual": "parallel",
        "shared_norm": False,
        "tied": False,
    },
}


def adapted(weights: dict[str, np.ndarray], folder: Path) -> dict[str, np.ndarray]:
    """What PEFT makes of a model's tensors and a folder of adapters, in float64."""
    config, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    result, used = {name: tensor.astype(np.float64) for name, tensor in weights.items()}, set()
    for name in weights:
        module = name.removesuffix(".weight")
        a, b = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
        target = [key for key in config["target_modules"] if module == key or module.endswith(f".{key}")]
        assert bool(target) == (a in tensors) == (b in tensors), name
        if target:
            r = config["rank_pattern"].get(target[0], config["r"])
            alpha = config["alpha_pattern"].get(target[0], config["lora_alpha"])
            assert tensors[a].shape[0] == tensors[b].shape[1] == r
            delta = alpha / r * tensors[b].astype(np.float64) @ tensors[a].astype(np.float64)
            result[name] += delta.T if config["fan_in_fan_out"] else delta
            used |= {a, b}
    assert used == tensors.keys()
    return result


def exported(name: str, targets: tuple[str, ...], home: Path) -> None:
    """base/, merged/ and adapters/ of a random model of a class."""
    model = ModelConfig(**TINY | MODELS[name])
    lora = LoraConfig(rank=3, alpha=5.0, targets=tuple(t for t in targets if t != "gate" or model.gated))
    family = choose_family(model, "language")
    assert family.causal == name
    with jax.set_mesh(jax.make_mesh((1, 2, 1, 2), AXES, devices=jax.devices()[:4])):
        params = random_params(language_model(model, 40, lora=lora), seed=0)
        adapters, base = split(params)
        for part, tree in (("base", base), ("merged", jax.jit(merged, static_argnums=1)(params, lora))):
            (home / part).mkdir()
            write_weights(home / part, family, model, tree, "F32", 10**9)
            settings = {"architectures": [name], "model_type": family.type, **family.write(model)}
            (home / part / "config.json").write_text(json.dumps(settings))
        write_adapters(home / "adapters", model, lora, adapters, "F32", None)


@pytest.mark.parametrize("targets", [("q", "v"), ALL], ids=["two", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_base_and_adapters_are_the_merged_model(name, targets, tmp_path):
    exported(name, targets, tmp_path)
    base, whole = (load_file(tmp_path / part / "model.safetensors") for part in ("base", "merged"))
    found = adapted(base, tmp_path / "adapters")
    changed = {tensor for tensor in whole if not np.array_equal(whole[tensor], base[tensor])}
    assert len(changed) == sum("lora_A" in t for t in load_file(tmp_path / "adapters" / "adapter_model.safetensors"))
    for tensor, value in whole.items():
        np.testing.assert_allclose(found[tensor], value, rtol=0, atol=1e-6, err_msg=tensor)


@pytest.mark.parametrize("name", MODELS)
def test_peft_computes_what_the_merged_model_does(name, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft: this test compares with it")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    exported(name, ALL, tmp_path)

    def load(part: str):
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / part, dtype=torch.float32)

    tokens = torch.arange(20)[None]
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(load("base"), tmp_path / "adapters")(tokens).logits
        np.testing.assert_allclose(found, load("merged")(tokens).logits, rtol=0, atol=1e-5)


def test_a_stage_that_was_trained_whole_has_none(tmp_path_factory, tmp_path, capsys):
    run = make_run(tmp_path_factory.getbasetemp() / "adapters_run")
    assert main(["export", str(run), str(tmp_path / "x"), "adapters=true", "stage=sft"]) == 2
    assert re.search(
        r"run/sft: no adapters there, it was trained whole. No stage of .* has any", capsys.readouterr().err
    )
    assert not list(tmp_path.iterdir())
