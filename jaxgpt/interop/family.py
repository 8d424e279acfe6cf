"""What a family of models is, and when two models compute the same.

A family holds a model where the config.json that it writes, read again, describes the same model; nothing else decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from jaxgpt.config.load import flat
from jaxgpt.config.schema import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.interop.names import Names
from jaxgpt.interop.settings import Given, Json, layer_windows

STRANGE = (
    "sliding_window",
    "layer_types",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "quantization_config",
)
"""Keys of config.json that change what a model computes, and that most families do not have."""
NOT_ARCHITECTURE = ("init_std", "embedding_std", "dtype", "scan_layers", "remat")
"""Settings of a model that do not change what its parameters mean."""


@dataclass(frozen=True)
class Family:
    """One model class of transformers."""

    type: str
    """model_type of config.json."""
    causal: str
    """The class of language models."""
    classifier: str | None
    """The class that gives a score; None where there is none."""
    base: str
    """What the names of the inner model's tensors begin with."""
    tensors: Names
    read: Callable[[Given], Json]
    """config.json to the fields of a ModelConfig."""
    write: Callable[[ModelConfig], Json]
    """What config.json says of a model, as far as the family can say it."""
    reads: tuple[str, ...] = ()
    """Keys of STRANGE that the family has."""

    def classes(self) -> dict[str, str]:
        """What `architectures` can name, and what such a folder holds: "language" or "scalar"."""
        title = self.causal.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        known = {self.causal: "language", f"{title}Model": "language"}
        return known | ({self.classifier: "scalar"} if self.classifier is not None else {})

    def model(self, config: Mapping[str, Any], where: str) -> ModelConfig:
        """Our settings of a config.json. Raises UserError for one that we do not have; `where` begins the message."""
        given = Given(config, where)
        for key in STRANGE:
            plain = key == "layer_types" and set(given(key, ())) <= {"full_attention"}
            if key not in self.reads and not plain:
                given.only(key, None)
        try:
            return ModelConfig(**self.read(given))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"])) or "model"
            raise UserError(f"{where}: {key}: {first['msg']} (found {first['input']!r:.60})") from error
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise UserError(f"{where}: not as {self.causal} has it ({type(error).__name__}: {error})") from error

    def lacks(self, model: ModelConfig) -> list[str]:
        """What the family cannot say of a model: "model.attention.softcap is 30.0, and it has null"."""
        try:
            return differences(model, self.model(self.write(model), self.causal))
        except UserError as error:
            return [str(error)]


def architecture(model: ModelConfig) -> dict[str, Any]:
    """What the parameters of a model mean, every default written out: equal for models that compute the same."""
    full = model.model_dump(mode="json", exclude=set(NOT_ARCHITECTURE))
    full["attention"] |= {
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "scale": model.attention.scale or model.head_dim**-0.5,
        "windows": layer_windows(model),
    }
    full["mlp"]["width"] = model.hidden
    full["shared_norm"] = model.residual == "parallel" and model.shared_norm
    return full


def differences(model: ModelConfig, other: ModelConfig) -> list[str]:
    """Where two models differ, with the values of both."""
    ours, theirs = (flat(architecture(m)) for m in (model, other))
    keys = [key for key in dict.fromkeys((*ours, *theirs)) if ours.get(key) != theirs.get(key)]
    return [f"model.{'.'.join(key)} is {_shown(ours.get(key))}, and it has {_shown(theirs.get(key))}" for key in keys]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        period = next(n for n in range(1, len(value) + 1) if value == (value[:n] * len(value))[: len(value)])
        return f"[{', '.join(_shown(one) for one in value[:period])}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
