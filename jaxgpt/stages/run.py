"""A run's folder and what its stages share: tokenizer, mesh, vocabulary, and parameters handed from one to the next.

Reads files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxgpt.config.schema import Config, LoraConfig, ModelConfig, PretrainConfig
from jaxgpt.data.mixture import Batches
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.interop.family import NOT_ARCHITECTURE
from jaxgpt.interop.foreign import Foreign
from jaxgpt.interop.weights import read_params
from jaxgpt.mesh import check_model, put_batch
from jaxgpt.models.heads import language_model, scalar_model
from jaxgpt.models.net import Net, Params
from jaxgpt.runs import KINDS, RANDOM, is_foreign, parents, resolved, result_folder, run_folder
from jaxgpt.train.checkpoint import load_params, params_meta
from jaxgpt.train.loop import Drawn
from jaxgpt.train.state import State


def vocabulary(config: ModelConfig, tokenizer: Tokenizer, model: Path | None = None, pieces: Path | None = None) -> int:
    """Rows of the embedding. Raises UserError where the setting is smaller than the tokenizer.

    `model` is the folder that the setting was read from, and `pieces` where the tokenizer came from; unset for a run's.
    """
    if config.vocab is None:
        return -(-tokenizer.size // 128) * 128
    if config.vocab < tokenizer.size:
        found = f"the tokenizer {f'from {pieces} ' if pieces else ''}has {tokenizer.size} pieces"
        if model is not None:
            raise UserError(
                f"{model}: the model has {config.vocab} rows of embeddings, and {found}; expected at most "
                f"{config.vocab}: give the tokenizer that the model was trained with"
            )
        raise UserError(
            f"model.vocab is {config.vocab}, and {found}; unset it, or take the tokenizer that the model was "
            "trained with"
        )
    return config.vocab


@dataclasses.dataclass(frozen=True)
class Run:
    """What the stages of a run share."""

    config: Config
    folder: Path
    tokenizer: Tokenizer
    mesh: jax.sharding.Mesh
    vocab: int

    @classmethod
    def open(cls, config: Config, tokenizer: Tokenizer, mesh: jax.sharding.Mesh) -> Run:
        """Checks that the mesh divides the model. Raises UserError where it does not."""
        vocab = vocabulary(config.model, tokenizer)
        check_model(mesh, config.model, vocab)
        return cls(config, run_folder(config), tokenizer, mesh, vocab)

    def key(self, name: str) -> jax.Array:
        """The root of a stage's randomness."""
        return jax.random.fold_in(jax.random.key(self.config.seed), _number(name))

    def paths(self, given: str | tuple[str, ...]) -> list[str]:
        """Paths of the config, with {run} put in."""
        return resolved(self.config, given)

    def parent(self, name: str, role: str = "start") -> str:
        """What a stage starts from in a role."""
        return parents(self.config, name)[role]

    def meta(self, kind: str) -> dict[str, Any]:
        """What stands beside finished parameters, so that they can be loaded without the run's config."""
        return {
            "kind": kind,
            "model": self.config.model.model_dump(mode="json"),
            "vocab": self.vocab,
            "tokenizer": self.tokenizer.hash,
        }

    def adapted(self, name: str) -> dict[str, Any]:
        """What stands there more where a stage trains adapters: their settings, and the model they are for."""
        section, base = getattr(self.config, name), self.parent(name)
        if isinstance(section, PretrainConfig) or section.lora is None:
            return {}
        place = base if base == RANDOM or is_foreign(base) else str(result_folder(self.config, base))
        return {"lora": section.lora.model_dump(mode="json"), "base": place}

    def start_language(self, name: str) -> Params:
        """The language model that a stage starts from, on the mesh: a finished one, or a random one."""
        init = self.parent(name)
        if init == RANDOM:
            return jax.jit(language_model(self.config.model, self.vocab).init)(self.key(name))
        return self.load_language(init)

    def load_language(self, init: str) -> Params:
        """A finished language model's parameters, on the mesh."""
        return self._load(init, "language", language_model(self.config.model, self.vocab))

    def reward_net(self, init: str, lora: LoraConfig | None = None) -> Net:
        """A finished reward model's computation; it may be of another size than the run's model."""
        if is_foreign(init):
            model = Foreign.describe(self.paths(init)[0]).model
            runtime = {name: getattr(self.config.model, name) for name in NOT_ARCHITECTURE}
            model, vocab = model.model_copy(update={**runtime, "vocab": None}), model.vocab or self.vocab
        else:
            folder = result_folder(self.config, init, "scalar") / "params"
            meta = params_meta(folder)
            _check_kind(folder, meta.get("kind"), "scalar")
            model, vocab = ModelConfig.model_validate(meta["model"]), int(meta["vocab"])
        check_model(self.mesh, model, vocab)
        return scalar_model(model, vocab, lora)

    def load_reward(self, init: str) -> tuple[Net, Params]:
        """A finished reward model: its computation, and its parameters on the mesh."""
        net = self.reward_net(init)
        return net, self._load(init, "scalar", net)

    def check_language(self, init: str) -> None:
        """Raises UserError where `init` names no finished language model that fits the run; reads no parameters."""
        self._check(init, "language")

    def _check(self, init: str, kind: str) -> Foreign | Path:
        """Where finished parameters of a kind lie."""
        if is_foreign(init):
            foreign = Foreign.describe(self.paths(init)[0])
            _check_kind(foreign.path, foreign.kind, kind)
            _check_tokenizer(foreign.path, Tokenizer.load(foreign.path).model_hash, self.tokenizer.model_hash, self)
            if kind == "language":
                foreign.check_same(self.config.model)
            return foreign
        folder = result_folder(self.config, init, kind) / "params"
        meta = params_meta(folder)
        _check_kind(folder, meta.get("kind"), kind)
        _check_tokenizer(folder, meta.get("tokenizer"), self.tokenizer.hash, self)
        return folder

    def _load(self, init: str, kind: str, net: Net) -> Params:
        found = self._check(init, kind)
        if isinstance(found, Foreign):
            return read_params(found, net.abstract)
        return load_params(found, net.abstract)


def _check_kind(folder: Path, found: str | None, wanted: str) -> None:
    if found != wanted:
        raise UserError(f"{folder} holds {KINDS.get(str(found), 'something else')}; {KINDS[wanted]} is needed")


def _check_tokenizer(folder: Path, found: str | None, ours: str, run: Run) -> None:
    if found != ours:
        raise UserError(f"{folder} was trained with another tokenizer than {run.folder / 'tokenizer'}")


def _number(name: str) -> int:
    return int.from_bytes(name.encode()[:4].ljust(4), "big") % 2**31


class FromData:
    """A stage's source over files: batches read ahead from wherever the run is, and put on the devices."""

    def __init__(self, batches: Batches, mesh: jax.sharding.Mesh):
        self._batches, self._mesh = batches, mesh
        self._next: int | None = None
        self._ahead: Any = None

    def __call__(self, step: int, state: State) -> Drawn:
        """The batch of a step; asking in order is what is fast."""
        if step != self._next:
            self.close()
            self._ahead = self._batches.iterate(step)
        self._next = step + 1
        return Drawn(put_batch(next(self._ahead), self._mesh), state.extras)

    def close(self) -> None:
        """Ends the reading ahead."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def held_out(batches: Batches, most: int, mesh: jax.sharding.Mesh) -> list[Mapping[str, jax.Array]]:
    """The first batches of an ordered set, on the devices, for evaluations."""
    return [put_batch(batches[n], mesh) for n in range(min(most, len(batches)))]
