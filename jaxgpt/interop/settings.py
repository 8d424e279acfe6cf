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


MOST_LAYERS = 10_000


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
            expected = "leaving it out" if default is None else repr(default)
            raise UserError(
                f"{self.where}: {key} is {self(key)!r:.60}, which jaxgpt does not have here; expected {expected}"
            )

    def count(self, key: str, default: int | None = None, least: int = 1, most: int = 10**9) -> int:
        """A whole number. Raises UserError for anything else, or where it is not there and has no default."""
        found = self.need(key) if default is None else self(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            raise UserError(f"{self.where}: {key} is {found!r:.60}, expected a whole number from {least} to {most:,}")
        return found

    def flag(self, key: str, default: bool) -> bool:
        """true or false. Raises UserError for anything else."""
        found = self(key, default)
        if not isinstance(found, bool):
            raise UserError(f"{self.where}: {key} is {found!r:.60}, expected true or false")
        return found

    def part(self, key: str) -> Given:
        """The settings below a key; none where it is not there. Raises UserError where it is something else."""
        found = self(key, {})
        if not isinstance(found, Mapping):
            raise UserError(f"{self.where}: {key} is {found!r:.60}, expected a JSON object")
        return Given(found, f"{self.where}: {key}")

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
    """Rotary positions, from the keys of transformers 5 or the older ones.

    `fraction` is what a family rotates by default; only one that rotates a part reads how much.
    """
    rope = given.part("rope_scaling" if given("rope_scaling") else "rope_parameters")
    kind = rope("rope_type", rope("type", "default"))
    scaling: Json | None = None
    if kind in ("linear", "llama3"):
        scaling = {"type": kind, "factor": rope.need("factor")}
    elif kind != "default":
        raise UserError(
            f"{given.where}: rotary positions are scaled by {kind!r}, which jaxgpt does not have; expected 'default', "
            "'linear' or 'llama3'"
        )
    if scaling is not None and kind == "llama3":
        scaling |= {key: rope.need(key) for key in ("low_freq_factor", "high_freq_factor")}
        trained = rope("original_max_position_embeddings", given("max_position_embeddings"))
        scaling["original_context"] = given("original_max_position_embeddings", trained)
    if fraction < 1.0:
        old = given("partial_rotary_factor", given("rotary_pct", fraction))
        fraction = rope("partial_rotary_factor", old)
    return {
        "type": "rope",
        "base": rope("rope_theta", given("rope_theta", given("rotary_emb_base", base))),
        "fraction": fraction,
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
    layers = given.count("num_hidden_layers", most=MOST_LAYERS)
    types = given("layer_types", ["full_attention"] * min(full, layers) + ["sliding_attention"] * (layers - full))
    if len(types) != layers:
        raise UserError(f"{given.where}: layer_types has {len(types)} entries for {layers} layers")
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UserError(f"{given.where}: layer_types has {unknown[0]!r}, which jaxgpt does not have")
    return [window if kind == "sliding_attention" else None for kind in types]


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


def read_std(given: Given) -> float:
    """Deviation of initial weights; one that is not above 0 is of no use to us."""
    return given("initializer_range", 0.02) or 0.02


def read_decoder(given: Given, kv_heads: int | None = None) -> Json:
    """What the LLaMA-like families share."""
    heads = given.count("num_attention_heads")
    return {
        "vocab": given.count("vocab_size"),
        "width": given.count("hidden_size"),
        "layers": given.count("num_hidden_layers", most=MOST_LAYERS),
        "context": given.count("max_position_embeddings"),
        "norm": {"type": "rmsnorm", "eps": given("rms_norm_eps", 1e-6)},
        "positions": read_rope(given),
        "attention": {
            "heads": heads,
            "kv_heads": given.count("num_key_value_heads", kv_heads or heads),
            "head_dim": given("head_dim"),
        },
        "mlp": {"type": given.named("hidden_act", "silu", GATES), "width": given.count("intermediate_size")},
        "tied": given.flag("tie_word_embeddings", False),
        "init_std": read_std(given),
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
