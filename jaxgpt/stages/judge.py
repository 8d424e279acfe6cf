"""What a response is worth: reward models, alone or as ensembles, and graders of text, added up with their weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.config.schema import ModelReward, RolloutConfig
from jaxgpt.data.prompts import PromptRows
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.errors import UserError
from jaxgpt.graders import Grader, grader
from jaxgpt.mesh import local_rows, put_batch
from jaxgpt.models.net import Net, Params
from jaxgpt.stages.episodes import token_scores
from jaxgpt.stages.reward import last_token
from jaxgpt.train.step import Batch

Scores = dict[str, jax.Array]
"""A stage's rewards of each episode by name, before weights, [B] float32; their weighted sum is "total"."""


class Judge:
    """The rewards of a stage's config over finished episodes.

    A reward model reads an episode up to its last real token, in the batch's own padding; a grader gets the response as
    text, without its end token.
    """

    def __init__(
        self,
        config: RolloutConfig,
        models: Sequence[tuple[Net, Params]],
        prompts: PromptRows,
        tokenizer: Tokenizer,
        setting: str,
    ):
        self._terms = dict(zip(_names(config), config.rewards, strict=True))
        self._prompts, self._tokenizer, self._prompt = prompts, tokenizer, config.prompt_length
        self._nets: dict[str, tuple[Net, ...]] = {}
        self._graders: dict[str, Grader] = {}
        self.params: dict[str, tuple[Params, ...]] = {}
        """Parameters of the reward models."""
        given = iter(models)
        for number, (name, term) in enumerate(self._terms.items()):
            if isinstance(term, ModelReward):
                made = [next(given) for _ in term.folders]
                self._nets[name] = tuple(net for net, _ in made)
                self.params[name] = tuple(params for _, params in made)
            else:
                self._graders[name] = grader(term, f"{setting}.rewards[{number}]")
        self._score = jax.jit(self._by_models)
        self._sum = jax.jit(self._total)

    def __call__(self, episodes: Batch, mesh: jax.sharding.Mesh) -> Scores:
        """Judges episodes; their "row" is the number of the prompt. Raises UserError where a grader gives no number."""
        scores = self._score(self.params, {k: episodes[k] for k in ("tokens", "segments", "mask")})
        if self._graders:
            scores |= put_batch(self._by_graders(episodes), mesh)
        return self._sum(scores)

    def _by_models(self, params: dict[str, tuple[Params, ...]], episodes: Batch) -> Scores:
        last_B = self._prompt - 1 + jnp.sum(episodes["mask"], axis=1).astype(jnp.int32)
        found = {}
        with jax.numpy_dtype_promotion("strict"):
            for name, nets in self._nets.items():
                members = [
                    last_token(token_scores(net, one, episodes), last_B)
                    for net, one in zip(nets, params[name], strict=True)
                ]
                term = self._terms[name]
                assert isinstance(term, ModelReward)
                found[name] = _worst(members) if term.combine == "worst" else _mean(members)
        return found

    def _by_graders(self, episodes: Batch) -> dict[str, np.ndarray]:
        tokens, rows = local_rows(episodes["tokens"])[:, self._prompt :], local_rows(episodes["row"])
        lengths = local_rows(episodes["mask"]).sum(axis=1).astype(int)
        ended = local_rows(episodes["ended"])
        texts = [
            self._tokenizer.decode(row[: length - bool(end)].tolist())
            for row, length, end in zip(tokens, lengths, ended, strict=True)
        ]
        found = {}
        for name, grade in self._graders.items():
            values = np.zeros(len(texts), np.float32)
            for i, (row, text) in enumerate(zip(rows.tolist(), texts, strict=True)):
                try:
                    values[i] = grade(self._prompts.records[row], text, int(lengths[i]))
                except UserError as error:
                    raise UserError(f"{self._prompts.wheres[row]}: {error}") from error
            found[name] = values
        return found

    def _total(self, scores: Scores) -> Scores:
        weighted = [jnp.float32(term.weight) * scores[name] for name, term in self._terms.items()]
        return {**scores, "total": sum(weighted[1:], weighted[0])}


def _names(config: RolloutConfig) -> list[str]:
    """The rewards by their types, numbered where there are several of one."""
    types = [term.type for term in config.rewards]
    seen: Counter[str] = Counter()
    names = []
    for kind in types:
        seen[kind] += 1
        names.append(kind if types.count(kind) == 1 else f"{kind}{seen[kind]}")
    return names


def _mean(members: list[jax.Array]) -> jax.Array:
    return sum(members[1:], members[0]) / len(members)


def _worst(members: list[jax.Array]) -> jax.Array:
    worst_B = members[0]
    for member_B in members[1:]:
        worst_B = jnp.minimum(worst_B, member_B)
    return worst_B


def score_figures(scores: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The mean of each reward over the episodes, as "rewards/NAME"."""
    return {f"rewards/{name}": jnp.mean(value_B) for name, value_B in scores.items() if name != "total"}
