"""What the families' config.json files share: reading a setting, rotary positions, windows, the LLaMA-like shape.

Defaults are those of the classes in transformers, for keys that a file leaves out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxgpt.config.schema import ModelConfig, RopePositions
from jaxgpt.errors import UserError, nearest

Json = dict[str, Any]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
"""Their names of an activation without a gate, and ours; the first one of each is written."""
GATES = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
"""Of an activation with a gate."""


class Given:
    """The settings of a config.json; `where` begins every message."""

    def __init__(self, values: Mapping[str, Any], where: str):
        self.values, self.where = values, where

    def __call__(self, key: str, default: Any = None) -> Any:
        """A setting; null is as if it were not there."""
        found = self.values.get(key)
        return default if found is None else found

    def need(self, key: str) -> Any:
        """A setting without a default. Raises UserError where it is not there."""
        if self.values.get(key) is None:
            raise UserError(f"{self.where}: {key} is not there.{nearest(key, self.values)}")
        return self.values[key]

    def only(self, key: str, default: Any) -> None:
        """Raises UserError where a setting is not its default, the one value that we have."""
        if self(key, default) != default:
            raise UserError(f"{self.where}: {key} is {self(key)!r}, which jaxgpt does not have; expected {default!r}")

    def named(self, key: str, default: str, table: Mapping[str, str]) -> str:
        """Our name of an activation. Raises UserError where we do not have it."""
        found = self(key, default)
        if found not in table:
            raise UserError(
                f"{self.where}: {key} is {found!r}, which jaxgpt does not have here; expected {', '.join(table)}"
            )
        return table[found]


def their_name(table: Mapping[str, str], ours: str) -> str:
    """Their name of one of our activations; any where they have none, which reading it back shows."""
    return next((theirs for theirs, known in table.items() if known == ours), next(iter(table)))


def written_std(model: ModelConfig) -> float:
    """Deviation of initial weights as one number, which is all that config.json has for it."""
    return 0.02 if model.init_std == "fan_in" else model.init_std


def read_rope(given: Given, base: float = 10_000.0, fraction: float = 1.0, pairing: str = "half") -> Json:
    """Rotary positions, from the keys of transformers 5 or the older ones."""
    rope = given("rope_scaling") or given("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = None
    if kind in ("linear", "llama3"):
        scaling = {"type": kind, "factor": rope["factor"]}
    elif kind != "default":
        raise UserError(
            f"{given.where}: rotary positions are scaled by {kind!r}, which jaxgpt does not have; expected 'default', "
            "'linear' or 'llama3'"
        )
    if scaling is not None and kind == "llama3":
        scaling |= {key: rope[key] for key in ("low_freq_factor", "high_freq_factor")}
        scaling["original_context"] = rope.get("original_max_position_embeddings", given("max_position_embeddings"))
    partial = rope.get("partial_rotary_factor") or given("partial_rotary_factor") or given("rotary_pct")
    return {
        "type": "rope",
        "base": rope.get("rope_theta") or given("rope_theta") or given("rotary_emb_base") or base,
        "fraction": partial or fraction,
        "pairing": pairing,
        "scaling": scaling,
    }


def write_rope(model: ModelConfig, partial: bool = False) -> Json:
    """Rotary positions in the keys of transformers 5, and in those of version 4 and other readers."""
    positions = model.positions
    if not isinstance(positions, RopePositions):
        return {}
    rope: Json = {"rope_type": "default", "rope_theta": positions.base}
    if positions.scaling is not None:
        rope |= {"rope_type": positions.scaling.type, "factor": positions.scaling.factor}
        if positions.scaling.type == "llama3":
            rope |= {
                "low_freq_factor": positions.scaling.low_freq_factor,
                "high_freq_factor": positions.scaling.high_freq_factor,
                "original_max_position_embeddings": positions.scaling.original_context,
            }
    written: Json = {"rope_theta": positions.base}
    if partial:
        rope["partial_rotary_factor"] = positions.fraction
        written |= {"partial_rotary_factor": positions.fraction, "rotary_pct": positions.fraction}
        written |= {"rotary_emb_base": positions.base}
    if positions.scaling is not None:
        written["rope_scaling"] = rope
    return written | {"rope_parameters": rope}


def read_windows(given: Given, window: int | None, full: int) -> list[int | None]:
    """How far each layer looks back: by layer_types, or all but the first `full` layers over `window` tokens."""
    layers = given.need("num_hidden_layers")
    types = given("layer_types", ["full_attention"] * full + ["sliding_attention"] * (layers - full))
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(f"{given.where}: layer_types has {unknown[0]!r}, which jaxgpt does not have")
    return [window if kind == "sliding_attention" else None for kind in types[:layers]]


def layer_windows(model: ModelConfig) -> list[int | None]:
    """How far every layer looks back; None where that is to the beginning of the context."""
    windows = model.attention.windows
    sizes = [windows[i % len(windows)] for i in range(model.layers)]
    return [None if size is None or size >= model.context else size for size in sizes]


def write_windows(model: ModelConfig) -> Json:
    """Windows of one size, layer by layer."""
    sizes = layer_windows(model)
    types = ["full_attention" if size is None else "sliding_attention" for size in sizes]
    window = next((size for size in sizes if size is not None), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": types,
        "max_window_layers": types.index("sliding_attention") if window is not None else model.layers,
    }


def read_decoder(given: Given, kv_heads: int | None = None) -> Json:
    """What the LLaMA-like families share."""
    heads = given.need("num_attention_heads")
    groups = given("num_key_value_heads", kv_heads or heads)
    return {
        "vocab": given.need("vocab_size"),
        "width": given.need("hidden_size"),
        "layers": given.need("num_hidden_layers"),
        "context": given.need("max_position_embeddings"),
        "norm": {"type": "rmsnorm", "eps": given("rms_norm_eps", 1e-6)},
        "positions": read_rope(given),
        "attention": {"heads": heads, "kv_heads": groups, "head_dim": given("head_dim")},
        "mlp": {"type": given.named("hidden_act", "silu", GATES), "width": given.need("intermediate_size")},
        "tied": given("tie_word_embeddings", False),
        "init_std": given("initializer_range", 0.02) or 0.02,
    }


def write_decoder(model: ModelConfig) -> Json:
    """What the LLaMA-like families share."""
    return {
        "vocab_size": model.vocab,
        "hidden_size": model.width,
        "num_hidden_layers": model.layers,
        "max_position_embeddings": model.context,
        "rms_norm_eps": model.norm.eps,
        "num_attention_heads": model.attention.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": their_name(GATES, model.mlp.type),
        "intermediate_size": model.hidden,
        "tie_word_embeddings": model.tied,
        "initializer_range": written_std(model),
        **write_rope(model),
    }
