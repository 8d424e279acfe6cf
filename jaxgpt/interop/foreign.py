"""A model in a Hugging Face folder: its family, its settings as ours, and what it brings to a run that starts from it.

Reads files. Nothing here needs jax.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from jaxgpt.config.load import Sections
from jaxgpt.config.schema import ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.interop.families import family_of
from jaxgpt.interop.family import NOT_ARCHITECTURE, Family, differences
from jaxgpt.interop.folder import CONFIG, Folder, read_config
from jaxgpt.interop.tensor_files import map_bytes
from jaxgpt.runs import FOREIGN, RANDOM, STAGES, find_stage, is_foreign

SAMPLED = 4096
"""Bytes at either end of each tensor that tell one folder from another of the same shapes."""


@dataclass(frozen=True)
class Foreign:
    """A Hugging Face folder that one of our families describes."""

    path: Path
    config: dict[str, Any]
    """Its config.json."""
    family: Family
    model: ModelConfig
    """What config.json says, as our settings."""
    kind: str
    """ "language", or "scalar" for a classifier with one label."""

    @classmethod
    def describe(cls, path: str | Path) -> Foreign:
        """Reads config.json alone; `path` may begin with "hf:".

        Raises UserError where there is none, or it describes a model that we do not have.
        """
        path = Path(str(path).removeprefix(FOREIGN)).expanduser()
        config = read_config(path)
        where = str(path / CONFIG)
        family = family_of(config, where)
        named, known = config.get("architectures") or [family.causal], family.classes()
        kind = known.get(str(named[0])) if isinstance(named, list) and len(named) == 1 else None
        if kind is None:
            raise UserError(f"{where}: architectures is {named!r:.60}, expected one of {', '.join(known)}")
        return cls(path, config, family, family.model(config, where), kind)

    @property
    def gain(self) -> float:
        """What a reward model's scores were multiplied by after training; 1 where that is not told."""
        return float(self.config.get("score_gain", 1.0))

    @property
    def sections(self) -> Sections:
        """The sections `model` and `tokenizer` of a run that starts from here."""
        model = self.model.model_dump(mode="json", exclude=set(NOT_ARCHITECTURE))
        return {"model": model, "tokenizer": {"path": str(self.path)}}

    def check_same(self, model: ModelConfig) -> None:
        """Raises UserError where a run's model is another one."""
        problems = differences(model, self.model)
        if problems:
            shown = "".join(f"\n  {problem}" for problem in problems)
            raise UserError(
                f"{self.path} is of another architecture; leave the model section out (model=null), and the folder's "
                f"is taken:{shown}"
            )

    def mark(self) -> str:
        """16 hex digits by which another folder, or other weights in this one, are told apart: of all settings and
        shapes and of a sample of every tensor."""
        digest = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, tensor in sorted(Folder.open(self.path).tensors.items()):
            digest.update(f"{name} {tensor.shape} {tensor.dtype}".encode())
            raw = map_bytes(tensor)
            digest.update(np.concatenate([raw[:SAMPLED], raw[-SAMPLED:]]).tobytes())
        return digest.hexdigest()[:16]


def beginnings(init: str) -> Sections | None:
    """The sections `model` and `tokenizer` of what `init` names outside the run; None where that is of this run.

    Raises UserError where there is no such folder, or it cannot be read.
    """
    if is_foreign(init):
        return Foreign.describe(init).sections
    if init in STAGES or init == RANDOM or "{run}" in init:
        return None
    stage = find_stage(Path(init))
    try:
        made = yaml.safe_load((stage / "config.yaml").read_text(encoding="utf-8"))
        return {"model": dict(made["model"]), "tokenizer": {"path": str(stage.parent / "tokenizer")}}
    except (OSError, yaml.YAMLError, LookupError, TypeError) as error:
        raise UserError(f"{stage}: its config.yaml does not say what model it holds") from error
