"""The families of models: the classes of transformers, what their config.json says as our settings, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxgpt.config.schema import ModelConfig
from jaxgpt.errors import UserError, nearest
from jaxgpt.interop import names
from jaxgpt.interop.family import Family
from jaxgpt.interop.settings import (
    ACTIVATIONS,
    MOST_LAYERS,
    Given,
    Json,
    layer_windows,
    read_decoder,
    read_rope,
    read_std,
    read_windows,
    their_name,
    write_decoder,
    write_rope,
    write_windows,
    written_std,
)


def _read_llama(given: Given) -> Json:
    made, biased = read_decoder(given), given.flag("attention_bias", False)
    made["attention"] |= {"qkv_bias": biased, "out_bias": biased}
    made["mlp"]["bias"] = given.flag("mlp_bias", False)
    return made


def _write_llama(model: ModelConfig) -> Json:
    return write_decoder(model) | {"attention_bias": model.attention.qkv_bias, "mlp_bias": model.mlp.bias}


def _read_mistral(given: Given) -> Json:
    made = read_decoder(given, kv_heads=8)
    made["attention"]["windows"] = [given.values.get("sliding_window", 4096)]
    return made


def _write_mistral(model: ModelConfig) -> Json:
    return write_decoder(model) | {"sliding_window": layer_windows(model)[0]}


def _read_qwen2(given: Given) -> Json:
    made = read_decoder(given, kv_heads=32)
    window = given.values.get("sliding_window", 4096) if given.flag("use_sliding_window", False) else None
    made["attention"] |= {
        "qkv_bias": True,
        "windows": read_windows(given, window, given.count("max_window_layers", 28, least=0)),
    }
    return made


def _write_qwen2(model: ModelConfig) -> Json:
    return write_decoder(model) | write_windows(model)


def _read_qwen3(given: Given) -> Json:
    made, biased = _read_qwen2(given), given.flag("attention_bias", False)
    made["attention"] |= {"qkv_bias": biased, "out_bias": biased, "qk_norm": True}
    made["attention"]["head_dim"] = given("head_dim", 128)
    return made


def _write_qwen3(model: ModelConfig) -> Json:
    return _write_qwen2(model) | {"attention_bias": model.attention.qkv_bias}


def _read_gpt2(given: Given) -> Json:
    given.only("scale_attn_by_inverse_layer_idx", False)
    given.only("add_cross_attention", False)
    width, heads = given.count("n_embd"), given.count("n_head")
    return {
        "vocab": given.count("vocab_size"),
        "width": width,
        "layers": given.count("n_layer", most=MOST_LAYERS),
        "context": given.count("n_positions", given("n_ctx", 1024)),
        "norm": {"type": "layernorm", "eps": given("layer_norm_epsilon", 1e-5), "bias": True},
        "positions": {"type": "learned"},
        "attention": {
            "heads": heads,
            "qkv_bias": True,
            "out_bias": True,
            "scale": None if given.flag("scale_attn_weights", True) else 1.0,
        },
        "mlp": {
            "type": given.named("activation_function", "gelu_new", ACTIVATIONS),
            "width": given("n_inner", 4 * width),
            "bias": True,
        },
        "tied": given.flag("tie_word_embeddings", True),
        "init_std": read_std(given),
    }


def _write_gpt2(model: ModelConfig) -> Json:
    return {
        "vocab_size": model.vocab,
        "n_embd": model.width,
        "n_layer": model.layers,
        "n_positions": model.context,
        "n_ctx": model.context,  # llama.cpp reads this one
        "n_head": model.attention.heads,
        "n_inner": model.hidden,
        "scale_attn_weights": model.attention.scale != 1.0,
        "activation_function": their_name(ACTIVATIONS, model.mlp.type),
        "layer_norm_epsilon": model.norm.eps,
        "tie_word_embeddings": model.tied,
        "initializer_range": written_std(model),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def _read_gpt_neo(given: Given) -> Json:
    width = given.count("hidden_size")
    layers, types = given.count("num_layers", most=MOST_LAYERS), given.need("attention_types")
    told = sum(len(pattern) * times for pattern, times in types)
    if told != layers:
        raise UserError(f"{given.where}: attention_types has {told} entries for {layers} layers")
    kinds = [kind for pattern, times in types for kind in list(pattern) * times]
    window = {"global": None, "local": given("window_size", 256)}
    return {
        "vocab": given.count("vocab_size"),
        "width": width,
        "layers": layers,
        "context": given.count("max_position_embeddings"),
        "norm": {"type": "layernorm", "eps": given("layer_norm_epsilon", 1e-5), "bias": True},
        "positions": {"type": "learned"},
        "attention": {
            "heads": given.count("num_heads"),
            "out_bias": True,
            "scale": 1.0,
            "windows": [window[kind] for kind in kinds],
        },
        "mlp": {
            "type": given.named("activation_function", "gelu_new", ACTIVATIONS),
            "width": given("intermediate_size", 4 * width),
            "bias": True,
        },
        "tied": given.flag("tie_word_embeddings", True),
        "init_std": read_std(given),
    }


def _write_gpt_neo(model: ModelConfig) -> Json:
    sizes = layer_windows(model)
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_layers": model.layers,
        "max_position_embeddings": model.context,
        "num_heads": model.attention.heads,
        "attention_types": [[["global" if size is None else "local"], 1] for size in sizes],
        "window_size": next((size for size in sizes if size is not None), 256),
        "activation_function": their_name(ACTIVATIONS, model.mlp.type),
        "intermediate_size": model.hidden,
        "layer_norm_epsilon": model.norm.eps,
        "tie_word_embeddings": model.tied,
        "initializer_range": written_std(model),
        "classifier_dropout": 0.0,
    }


def _read_gpt_neox(given: Given) -> Json:
    biased = given.flag("attention_bias", True)
    return {
        "vocab": given.count("vocab_size"),
        "width": given.count("hidden_size"),
        "layers": given.count("num_hidden_layers", most=MOST_LAYERS),
        "context": given.count("max_position_embeddings"),
        "norm": {"type": "layernorm", "eps": given("layer_norm_eps", 1e-5), "bias": True},
        "positions": read_rope(given, fraction=0.25),
        "attention": {"heads": given.count("num_attention_heads"), "qkv_bias": biased, "out_bias": biased},
        "mlp": {
            "type": given.named("hidden_act", "gelu", ACTIVATIONS),
            "width": given.count("intermediate_size"),
            "bias": True,
        },
        "residual": "parallel" if given.flag("use_parallel_residual", True) else "sequential",
        "shared_norm": False,
        "tied": given.flag("tie_word_embeddings", False),
        "init_std": read_std(given),
    }


def _write_gpt_neox(model: ModelConfig) -> Json:
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "max_position_embeddings": model.context,
        "num_attention_heads": model.attention.heads,
        "attention_bias": model.attention.qkv_bias,
        "hidden_act": their_name(ACTIVATIONS, model.mlp.type),
        "intermediate_size": model.hidden,
        "layer_norm_eps": model.norm.eps,
        "use_parallel_residual": model.residual == "parallel",
        "tie_word_embeddings": model.tied,
        "initializer_range": written_std(model),
        "classifier_dropout": 0.0,
        **write_rope(model, partial=True),
    }


def _read_cohere(given: Given) -> Json:
    given.only("use_qk_norm", False)  # theirs is a layer norm of its own
    made, biased = read_decoder(given), given.flag("attention_bias", False)
    made["attention"] |= {"qkv_bias": biased, "out_bias": biased}
    return made | {
        "norm": {"type": "layernorm", "eps": given("layer_norm_eps", 1e-5)},
        "positions": read_rope(given, base=500_000.0, pairing="interleaved"),
        "residual": "parallel",
        "shared_norm": True,
        "tied": given.flag("tie_word_embeddings", True),
        "logit_scale": given("logit_scale", 0.0625),
    }


def _write_cohere(model: ModelConfig) -> Json:
    written = write_decoder(model)
    del written["rms_norm_eps"]
    return written | {
        "layer_norm_eps": model.norm.eps,
        "logit_scale": model.logit_scale,
        "attention_bias": model.attention.qkv_bias,
        "use_qk_norm": False,
    }


def _like_llama(kind: str, title: str, classifier: bool, read: Any, write: Any, reads: tuple[str, ...] = ()) -> Family:
    score = f"{title}ForSequenceClassification" if classifier else None
    return Family(kind, f"{title}ForCausalLM", score, "model.", names.LLAMA, read, write, reads)


FAMILIES = (
    _like_llama("llama", "Llama", True, _read_llama, _write_llama),
    _like_llama("mistral", "Mistral", True, _read_mistral, _write_mistral, ("sliding_window",)),
    _like_llama("qwen2", "Qwen2", True, _read_qwen2, _write_qwen2, ("sliding_window", "layer_types")),
    _like_llama("qwen3", "Qwen3", True, _read_qwen3, _write_qwen3, ("sliding_window", "layer_types")),
    _like_llama("cohere", "Cohere", False, _read_cohere, _write_cohere),
    Family(
        "gpt2", "GPT2LMHeadModel", "GPT2ForSequenceClassification", "transformer.", names.GPT2, _read_gpt2, _write_gpt2
    ),
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPTNeoForSequenceClassification",
        "transformer.",
        names.GPT_NEO,
        _read_gpt_neo,
        _write_gpt_neo,
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXForSequenceClassification",
        "gpt_neox.",
        names.GPT_NEOX,
        _read_gpt_neox,
        _write_gpt_neox,
    ),
)
"""In the order in which one is chosen to hold a model. PaLM is Cohere's with one key/value head; Vicuna is LLaMA."""


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json. Raises UserError where it is none of ours."""
    known, found = {family.type: family for family in FAMILIES}, config.get("model_type")
    if isinstance(found, str) and found in known:
        return known[found]
    what = "has no model_type" if found is None else f"is of model_type {found!r:.60}, which jaxgpt does not read"
    raise UserError(f"{where}: {what}.{nearest(str(found), known)} Known: {', '.join(known)}")


def family_for(model: ModelConfig) -> Family:
    """The family that holds a model. Raises UserError where there is none, with what the nearest one lacks."""
    lacking = {family.type: family.lacks(model) for family in FAMILIES}
    for family in FAMILIES:
        if not lacking[family.type]:
            return family
    near = min(FAMILIES, key=lambda family: len(lacking[family.type]))
    reasons = "".join(f"\n  {reason}" for reason in lacking[near.type])
    raise UserError(f"no class of transformers computes this model; {near.causal} comes nearest:{reasons}")
