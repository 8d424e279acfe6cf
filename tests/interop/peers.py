"""Models of transformers, tiny and random, with every tensor perturbed; and the logits of both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.weights import read_params
from jaxgpt.mesh import make_mesh, put_batch
from jaxgpt.models.heads import language_model
from jaxgpt.models.net import Params

torch = pytest.importorskip("torch", reason="pip install torch: these tests compare with transformers")
transformers = pytest.importorskip("transformers")

VOCAB, TIME = 96, 40
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "bos_token_id": 1}
GPT_NEO = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 4, "num_heads": 4, "max_position_embeddings": 128}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    "llama-gqa-tied": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama3": ("LlamaConfig", {**SIZES, "num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama-linear": (
        "LlamaConfig",
        {**SIZES, "head_dim": 12, "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "vicuna": ("LlamaConfig", {**SIZES, "rms_norm_eps": 1e-5}),
    "mistral": ("MistralConfig", {**SIZES, "num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": (
        "Qwen2Config",
        {**SIZES, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen2-tied": ("Qwen2Config", {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, "num_key_value_heads": 2, "head_dim": 16}),
    "palm": ("CohereConfig", {**SIZES, "num_key_value_heads": 1, "head_dim": 16, "logit_scale": 1.0}),
    "gpt2": ("GPT2Config", {**GPT2, "eos_token_id": 2}),
    "gpt2-unscaled": ("GPT2Config", {**GPT2, "eos_token_id": 2, "scale_attn_weights": False, "n_inner": 40}),
    "gpt-neo": (
        "GPTNeoConfig",
        {**GPT_NEO, "eos_token_id": 2, "attention_types": [[["global", "local"], 2]], "window_size": 5},
    ),
    "gpt-neox": ("GPTNeoXConfig", SIZES),
    "gpt-neox-sequential": (
        "GPTNeoXConfig",
        {**SIZES, "use_parallel_residual": False, "rotary_pct": 0.5, "hidden_act": "gelu_fast"},
    ),
}


def random_peer(case: str, auto: str = "AutoModelForCausalLM", **more: Any) -> Any:
    """A model of transformers, every tensor with noise of its own."""
    kind, settings = CASES[case]
    config = getattr(transformers, kind)(**settings, **more)
    model = getattr(transformers, auto).from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    noise = torch.Generator().manual_seed(len(case))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.25)
    return model


def saved(model: Any, folder: Path, **how: Any) -> Path:
    """A folder that transformers itself wrote."""
    model.save_pretrained(folder, **how)
    return folder


def loaded(folder: Path, auto: str = "AutoModelForCausalLM") -> Any:
    """What transformers reads from a folder."""
    how = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    return getattr(transformers, auto).from_pretrained(folder, **how).eval()


def their_logits(model: Any, tokens_BT: np.ndarray, mask_BT: np.ndarray | None = None) -> np.ndarray:
    given = {"input_ids": torch.tensor(tokens_BT)}
    if mask_BT is not None:
        given["attention_mask"] = torch.tensor(mask_BT)
    with torch.no_grad():
        return model(**given).logits.numpy()


def mesh(**axes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "context": 1, "tensor": 1, **axes}))


def read(folder: Path) -> tuple[ModelConfig, Params]:
    """Our settings and parameters of a folder; call under `jax.set_mesh`."""
    foreign = Foreign.describe(folder)
    return foreign.model, read_params(foreign, language_model(foreign.model, foreign.model.vocab).abstract)


def our_logits(model: ModelConfig, params: Params, tokens_BT: np.ndarray) -> np.ndarray:
    net = language_model(model, model.vocab)

    @jax.jit
    def logits(params: Params, rows: dict[str, jax.Array]) -> jax.Array:
        lm = net.bind(params)
        return lm.logits(lm.hidden(rows["tokens"], rows["segments"], rows["positions"]))

    tokens = tokens_BT.astype(np.int32)
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    rows = {"tokens": tokens, "segments": np.ones_like(tokens), "positions": positions}
    return np.asarray(jax.device_get(logits(params, put_batch(rows, jax.sharding.get_mesh()))))
