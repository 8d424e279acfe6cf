"""The tensors of each family: our array, their tensor, and how the one lies in the other (see layout.py).

`{}` in a tensor's name is the number of the layer. An array that a model does not have (a bias, say) has no tensor
either, so one table serves all variants of a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Place(NamedTuple):
    """Where an array lies among their tensors."""

    name: str
    """The tensor's name; what other versions called it follows after a bar, read and never written."""
    layout: str


Names = Mapping[str, Place]

HEAD = {"head_D": Place("score.weight", "1 D")}
"""The score of a classifier with one label, in every family that has one."""

LLAMA: Names = HEAD | {
    "backbone/embed_VD": Place("model.embed_tokens.weight", "V D"),
    "backbone/blocks/attention_norm/scale_D": Place("model.layers.{}.input_layernorm.weight", "D"),
    "backbone/blocks/attention/q_DHK": Place("model.layers.{}.self_attn.q_proj.weight", "HK D"),
    "backbone/blocks/attention/k_DGK": Place("model.layers.{}.self_attn.k_proj.weight", "GK D"),
    "backbone/blocks/attention/v_DGK": Place("model.layers.{}.self_attn.v_proj.weight", "GK D"),
    "backbone/blocks/attention/o_HKD": Place("model.layers.{}.self_attn.o_proj.weight", "D HK"),
    "backbone/blocks/attention/q_bias_HK": Place("model.layers.{}.self_attn.q_proj.bias", "HK"),
    "backbone/blocks/attention/k_bias_GK": Place("model.layers.{}.self_attn.k_proj.bias", "GK"),
    "backbone/blocks/attention/v_bias_GK": Place("model.layers.{}.self_attn.v_proj.bias", "GK"),
    "backbone/blocks/attention/o_bias_D": Place("model.layers.{}.self_attn.o_proj.bias", "D"),
    "backbone/blocks/attention/q_scale_K": Place("model.layers.{}.self_attn.q_norm.weight", "K"),
    "backbone/blocks/attention/k_scale_K": Place("model.layers.{}.self_attn.k_norm.weight", "K"),
    "backbone/blocks/mlp_norm/scale_D": Place("model.layers.{}.post_attention_layernorm.weight", "D"),
    "backbone/blocks/mlp/gate_DF": Place("model.layers.{}.mlp.gate_proj.weight", "F D"),
    "backbone/blocks/mlp/up_DF": Place("model.layers.{}.mlp.up_proj.weight", "F D"),
    "backbone/blocks/mlp/down_FD": Place("model.layers.{}.mlp.down_proj.weight", "D F"),
    "backbone/blocks/mlp/gate_bias_F": Place("model.layers.{}.mlp.gate_proj.bias", "F"),
    "backbone/blocks/mlp/up_bias_F": Place("model.layers.{}.mlp.up_proj.bias", "F"),
    "backbone/blocks/mlp/down_bias_D": Place("model.layers.{}.mlp.down_proj.bias", "D"),
    "backbone/norm/scale_D": Place("model.norm.weight", "D"),
    "unembed_VD": Place("lm_head.weight", "V D"),
}
"""Also Mistral, Qwen2 and Qwen3, and Cohere, whose block has no second norm."""

GPT2: Names = HEAD | {
    "backbone/embed_VD": Place("transformer.wte.weight", "V D"),
    "backbone/positions_TD": Place("transformer.wpe.weight", "T D"),
    "backbone/blocks/attention_norm/scale_D": Place("transformer.h.{}.ln_1.weight", "D"),
    "backbone/blocks/attention_norm/bias_D": Place("transformer.h.{}.ln_1.bias", "D"),
    "backbone/blocks/attention/q_DHK": Place("transformer.h.{}.attn.c_attn.weight", "D qHK"),
    "backbone/blocks/attention/k_DGK": Place("transformer.h.{}.attn.c_attn.weight", "D kGK"),
    "backbone/blocks/attention/v_DGK": Place("transformer.h.{}.attn.c_attn.weight", "D vGK"),
    "backbone/blocks/attention/q_bias_HK": Place("transformer.h.{}.attn.c_attn.bias", "qHK"),
    "backbone/blocks/attention/k_bias_GK": Place("transformer.h.{}.attn.c_attn.bias", "kGK"),
    "backbone/blocks/attention/v_bias_GK": Place("transformer.h.{}.attn.c_attn.bias", "vGK"),
    "backbone/blocks/attention/o_HKD": Place("transformer.h.{}.attn.c_proj.weight", "HK D"),
    "backbone/blocks/attention/o_bias_D": Place("transformer.h.{}.attn.c_proj.bias", "D"),
    "backbone/blocks/mlp_norm/scale_D": Place("transformer.h.{}.ln_2.weight", "D"),
    "backbone/blocks/mlp_norm/bias_D": Place("transformer.h.{}.ln_2.bias", "D"),
    "backbone/blocks/mlp/up_DF": Place("transformer.h.{}.mlp.c_fc.weight", "D F"),
    "backbone/blocks/mlp/up_bias_F": Place("transformer.h.{}.mlp.c_fc.bias", "F"),
    "backbone/blocks/mlp/down_FD": Place("transformer.h.{}.mlp.c_proj.weight", "F D"),
    "backbone/blocks/mlp/down_bias_D": Place("transformer.h.{}.mlp.c_proj.bias", "D"),
    "backbone/norm/scale_D": Place("transformer.ln_f.weight", "D"),
    "backbone/norm/bias_D": Place("transformer.ln_f.bias", "D"),
    "unembed_VD": Place("lm_head.weight", "V D"),
}

GPT_NEO: Names = GPT2 | {
    "backbone/blocks/attention/q_DHK": Place("transformer.h.{}.attn.attention.q_proj.weight", "HK D"),
    "backbone/blocks/attention/k_DGK": Place("transformer.h.{}.attn.attention.k_proj.weight", "GK D"),
    "backbone/blocks/attention/v_DGK": Place("transformer.h.{}.attn.attention.v_proj.weight", "GK D"),
    "backbone/blocks/attention/o_HKD": Place("transformer.h.{}.attn.attention.out_proj.weight", "D HK"),
    "backbone/blocks/attention/o_bias_D": Place("transformer.h.{}.attn.attention.out_proj.bias", "D"),
    "backbone/blocks/mlp/up_DF": Place("transformer.h.{}.mlp.c_fc.weight", "F D"),
    "backbone/blocks/mlp/down_FD": Place("transformer.h.{}.mlp.c_proj.weight", "D F"),
}
"""GPT-2's names, with matrices the other way round and the attention's apart."""

GPT_NEOX: Names = HEAD | {
    "backbone/embed_VD": Place("gpt_neox.embed_in.weight", "V D"),
    "backbone/blocks/attention_norm/scale_D": Place("gpt_neox.layers.{}.input_layernorm.weight", "D"),
    "backbone/blocks/attention_norm/bias_D": Place("gpt_neox.layers.{}.input_layernorm.bias", "D"),
    "backbone/blocks/attention/q_DHK": Place("gpt_neox.layers.{}.attention.query_key_value.weight", "HqK D"),
    "backbone/blocks/attention/k_DGK": Place("gpt_neox.layers.{}.attention.query_key_value.weight", "GkK D"),
    "backbone/blocks/attention/v_DGK": Place("gpt_neox.layers.{}.attention.query_key_value.weight", "GvK D"),
    "backbone/blocks/attention/q_bias_HK": Place("gpt_neox.layers.{}.attention.query_key_value.bias", "HqK"),
    "backbone/blocks/attention/k_bias_GK": Place("gpt_neox.layers.{}.attention.query_key_value.bias", "GkK"),
    "backbone/blocks/attention/v_bias_GK": Place("gpt_neox.layers.{}.attention.query_key_value.bias", "GvK"),
    "backbone/blocks/attention/o_HKD": Place("gpt_neox.layers.{}.attention.dense.weight", "D HK"),
    "backbone/blocks/attention/o_bias_D": Place("gpt_neox.layers.{}.attention.dense.bias", "D"),
    "backbone/blocks/mlp_norm/scale_D": Place("gpt_neox.layers.{}.post_attention_layernorm.weight", "D"),
    "backbone/blocks/mlp_norm/bias_D": Place("gpt_neox.layers.{}.post_attention_layernorm.bias", "D"),
    "backbone/blocks/mlp/up_DF": Place("gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", "F D"),
    "backbone/blocks/mlp/up_bias_F": Place("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", "F"),
    "backbone/blocks/mlp/down_FD": Place("gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", "D F"),
    "backbone/blocks/mlp/down_bias_D": Place("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", "D"),
    "backbone/norm/scale_D": Place("gpt_neox.final_layer_norm.weight", "D"),
    "backbone/norm/bias_D": Place("gpt_neox.final_layer_norm.bias", "D"),
    "unembed_VD": Place("embed_out.weight|lm_head.weight", "V D"),
}
