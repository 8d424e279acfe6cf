"""A held-out evaluation of a policy while it learns: what its reward stands for, on prompts that are not trained on.

Letters: B episodes, P prompt length, N response length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxgpt.config.schema import GoldConfig, RolloutConfig
from jaxgpt.data.prompts import PromptRows, load_prompts
from jaxgpt.graders import check_records
from jaxgpt.mesh import host_rows, put_batch
from jaxgpt.models.net import Params, joined
from jaxgpt.runs import parents
from jaxgpt.sampling import bucket
from jaxgpt.stages.episodes import Actors
from jaxgpt.stages.judge import Judge
from jaxgpt.stages.roles import Roles
from jaxgpt.stages.rollouts import WIDTH, join, reference_kl, respond, reward
from jaxgpt.stages.run import Run
from jaxgpt.train.step import Batch

REPORTED = ("gold", "gold_error", "gold_start", "win_rate", "win_rate_error", "score", "kl", "length", "eos_rate")
"""An evaluation's figures, in order."""


def gold_rows(run: Run, config: RolloutConfig, name: str) -> PromptRows | None:
    """The held-out prompts; None where none are asked for.

    Raises UserError naming the record that cannot be used, or that lacks what a gold score asks for.
    """
    gold = config.gold
    if gold is None:
        return None
    rows = load_prompts(run.paths(gold.data.path), run.tokenizer, config.prompt_length, f"{name}.prompt_length")
    check_records(config.rewards, rows, f"{name}.rewards")
    check_records(gold.rewards, rows, f"{name}.gold.rewards")
    return rows


def held_out(run: Run, config: RolloutConfig, name: str, roles: Roles, ends: tuple[int, ...]) -> Gold | None:
    """The held-out evaluation of a stage, where there is one; `ends` are the tokens that end a response."""
    rows = gold_rows(run, config, name)
    if config.gold is None or rows is None:
        return None
    scored = config.model_copy(update={"rewards": config.gold.rewards})
    models = [run.load_reward(init) for role, init in parents(run.config, name).items() if role.startswith("gold ")]
    return Gold(
        config=config,
        actors=dataclasses.replace(roles.actors, critic=None),
        judge=Judge(scored, models, rows, run.tokenizer, f"{name}.gold"),
        reward=Judge(config, roles.rewards, rows, run.tokenizer, name),
        prompts=rows,
        beside=roles.beside,
        start=lambda: {"policy": joined(roles.policy.frozen(), roles.policy.first())},
        mesh=run.mesh,
        key=run.key("gold"),
        ends=ends,
        pad=run.tokenizer.pad,
    )


@dataclasses.dataclass
class Gold:
    """Responses to the first prompts of a file, sampled with the same random numbers each time, and their gold scores.

    It needs no more memory than a rollout, but for the start's parameters, which are loaded once and let go.
    """

    config: RolloutConfig
    actors: Actors
    """Policy and reference."""
    judge: Judge
    """Of the gold score."""
    reward: Judge
    """Of the stage's own reward."""
    prompts: PromptRows
    beside: Callable[[], dict[str, Params]]
    """Parameters beside the policy's, as a rollout has them: "reference", where there is one."""
    start: Callable[[], Params]
    """The policy's parameters as they were at first, as {"policy"}."""
    mesh: jax.sharding.Mesh
    key: jax.Array
    ends: tuple[int, ...]
    pad: int

    def __post_init__(self) -> None:
        assert self.config.gold is not None
        gold: GoldConfig = self.config.gold
        self._each, asked = gold.responses, min(gold.prompts, len(self.prompts))
        self._count = asked * gold.responses
        self._respond = jax.jit(self._responses)
        self._measure = jax.jit(self._measured)
        self._join, self._figures = jax.jit(join), jax.jit(functools.partial(_figures, asked))
        self._first: jax.Array | None = None

    def __call__(self, params: Params) -> dict[str, float]:
        """Figures of the policy: mean gold score and win rate against the start (ties are half a win), each with its
        standard error over prompts; the start's gold score; the stage's own score, KL from the reference where there is
        one, length and rate of ends."""
        if self._first is None:
            self._first = self._ask(self.start())["gold"]
        found = self._ask(params)
        found["win_rate"] = _wins(found["gold"], self._first)
        figures = self._figures({**found, "gold_start": self._first})
        return {name: float(figures[name]) for name in REPORTED if name in figures}

    def _ask(self, params: Params) -> Batch:
        """Every response's "gold", "score", "length", "eos_rate", "row", "weight", and "kl" where there is a reference;
        [B]."""
        if self.actors.reference is not None:
            params = {**params, "reference": self.beside()["reference"]}
        parts = []
        for chunk, prompts in enumerate(self._prompts()):
            given = put_batch(prompts, self.mesh)
            episodes = self._respond(params["policy"], given, jax.random.fold_in(self.key, chunk))
            scores = {"gold": self.judge(episodes, self.mesh)["total"], "row": given["row"], "weight": given["weight"]}
            own = self.reward(episodes, self.mesh)["total"]
            parts.append({**self._measure(params, episodes, own), **scores})
        return self._join(tuple(parts))

    def _prompts(self) -> Iterator[dict[str, np.ndarray]]:
        """The prompts in chunks of one size, this host's rows; the last chunk is filled up with rows of weight 0."""
        rows = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        size = min(self.config.rollout_batch or self.config.episodes, -(-self._count // rows) * rows)
        here = host_rows(self.mesh, size)
        longest = max(len(self.prompts.prompts[row]) for row in range(self._count // self._each))
        width = min(bucket(longest, WIDTH), self.config.prompt_length)
        for begin in range(0, self._count, size):
            mine = begin + here
            numbers = (mine % self._count // self._each).astype(np.int32)
            asked = [self.prompts[row] for row in numbers.tolist()]
            yield {
                "tokens": np.stack([row["tokens"][-width:] for row in asked]),
                "segments": np.stack([row["segments"][-width:] for row in asked]),
                "row": numbers,
                "weight": (mine < self._count).astype(np.float32),
            }

    def _responses(self, policy: Params, prompts: Batch, key: jax.Array) -> Batch:
        return respond(self.config, self.actors, policy, prompts, key, self.ends, self.pad)

    def _measured(self, params: Params, episodes: Batch, own_B: jax.Array) -> Batch:
        found = {"length": jnp.sum(episodes["mask"], axis=1), "eos_rate": episodes["ended"].astype(jnp.float32)}
        found["score"] = reward(self.config, own_B, episodes["ended"])
        if self.actors.reference is not None:
            with jax.numpy_dtype_promotion("strict"):
                found["kl"] = reference_kl(self.actors.measure(params, episodes))
        return found


@jax.jit
def _wins(gold_B: jax.Array, first_B: jax.Array) -> jax.Array:
    return (gold_B > first_B).astype(jnp.float32) + 0.5 * (gold_B == first_B).astype(jnp.float32)


def _figures(asked: int, found: Batch) -> dict[str, jax.Array]:
    """Means over the responses to `asked` prompts, and standard errors over prompts of what is compared."""
    weight_B = found["weight"]
    count = jnp.sum(weight_B)
    of_BM = (found["row"][:, None] == jnp.arange(asked)) * weight_B[:, None]

    def mean(x_B: jax.Array) -> jax.Array:
        return jnp.sum(x_B * weight_B) / count

    figures = {name: mean(x_B) for name, x_B in found.items() if name not in ("row", "weight")}
    for name in ("gold", "win_rate"):
        mean_M = jnp.einsum("bm,b->m", of_BM, found[name], out_sharding=P(None)) * asked / count
        spread = jnp.sum(jnp.square(mean_M - figures[name])) / max(asked - 1, 1)
        figures[f"{name}_error"] = jnp.sqrt(spread / asked)
    return figures
