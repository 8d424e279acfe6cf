"""The source of every stage that learns from the policy's own responses: rollouts, and minibatches of them.

A rollout is: prompts, sampled responses, their scores, what the models say of them, and what the stage's `estimate`
makes of it all. Everything runs on the devices but graders of text.

Letters: B episodes, P prompt length, N response length, T = P + N.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxgpt.advantages import episode_kl, missing_eos
from jaxgpt.config.schema import RolloutConfig
from jaxgpt.data.mixture import Batches, Draws
from jaxgpt.data.prompts import PromptRows
from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.mesh import batch_spec, fetch, host_rows, put_batch
from jaxgpt.models.net import Params, joined
from jaxgpt.sampling import bucket, generate
from jaxgpt.stages.episodes import Actors, masked_mean
from jaxgpt.stages.judge import Judge, Scores, score_figures
from jaxgpt.train.loop import Drawn
from jaxgpt.train.state import State
from jaxgpt.train.step import Batch

WIDTH = 16
"""Prompts are padded to 1, 2, 3, 4, 6, 8 ... times so many tokens while responses are sampled: few programs."""


class Estimated(NamedTuple):
    """What a stage learns from in a rollout."""

    batch: Batch
    """Rows to draw minibatches from; "mask" [.., N] is 0 where nothing is learned."""
    figures: dict[str, jax.Array]
    extras: dict[str, jax.Array]
    """The state's extras from now on."""


class Estimate(Protocol):
    """From measured and scored episodes to what is learned; traced, so no I/O."""

    def __call__(self, measured: Batch, scores_B: jax.Array, extras: dict[str, jax.Array]) -> Estimated:
        """`scores_B` is the reward of each episode after clipping and the rule for missing ends."""
        ...


@dataclasses.dataclass
class Rollouts:
    """New episodes of the current policy at each rollout boundary, then minibatches of them.

    Prompts, sampling and permutations are functions of the run's seed and the rollout's number; what changes beside
    the parameters (the KL coefficient) is in the state's extras. The episodes in hand are never saved: checkpoints
    stand on boundaries.
    """

    config: RolloutConfig
    actors: Actors
    judge: Judge
    estimate: Estimate
    frozen: Callable[[], dict[str, Params]]
    """Parameters beside the trained ones: "reference", and the parts of "policy" and "value" that nothing trains."""
    prompts: PromptRows
    draws: Draws
    """The order of the prompts."""
    mesh: jax.sharding.Mesh
    key: jax.Array
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    """Tokens that end a response."""
    rounds: int = 1
    """Rollouts that may be drawn for one; more than 1 replaces groups whose scores are all equal (DAPO)."""
    drift: Callable[[Mapping[str, Any], Batch], jax.Array] | None = None
    """How far the policy is from the rollout's; above config.stop_kl the rest of the epochs is left out."""
    limit: float = float("inf")
    """Of `drift`."""
    text: Batches | None = None
    """Rows of text that come with every minibatch, as "ptx"."""

    def __post_init__(self) -> None:
        self._respond = jax.jit(self._generate)
        self._measure = jax.jit(self._measured)
        self._learn = jax.jit(functools.partial(learnable, self.config, self.estimate))
        self._pick = jax.jit(pick)
        self._join = jax.jit(join)
        self._part = jax.jit(_part, static_argnums=(1, 2))
        self._drift = None if self.drift is None else jax.jit(self.drift)
        self._episodes: Batch | None = None
        self._going = jnp.float32(1.0)
        self._frozen: dict[str, Params] | None = None

    def __call__(self, step: int, state: State) -> Drawn:
        """The minibatch of an update; at a boundary after a rollout."""
        c = self.config
        rollout, update = divmod(step, c.updates_per_rollout)
        extras, figures, samples = state.extras, {}, ()
        if update == 0:
            self._episodes, figures, extras, samples = self._roll(rollout, state)
            self._going = jnp.float32(1.0)
        assert self._episodes is not None, f"update {step} stands inside a rollout that was not made"
        epoch, part = divmod(update, c.learned // c.batch)
        if part == 0 and epoch > 0 and self._drift is not None:
            drift = self._drift(self._all(state), self._episodes)
            self._going = self._going * (drift <= self.limit).astype(jnp.float32)
        seed = np.random.SeedSequence([*np.asarray(jax.random.key_data(self.key)).tolist(), rollout, epoch])
        order = np.random.default_rng(seed).permutation(c.learned).astype(np.int32)
        rows = jax.device_put(order[part * c.batch :][: c.batch], P())
        batch = self._pick(self._episodes, rows)
        if self.text is not None:
            batch["ptx"] = put_batch(self.text[step], self.mesh)
        if self._drift is not None:
            batch = self._masked(batch)
        return Drawn(batch, extras, figures, samples)

    def _masked(self, batch: Batch) -> Batch:
        """The batch with nothing to learn in it, once the policy has gone too far."""
        masked = {name: x * self._going for name, x in batch.items() if name.endswith("mask")}
        if "ptx" in batch:
            masked["ptx"] = {**batch["ptx"], "mask": batch["ptx"]["mask"] * self._going}
        return {**batch, **masked}

    def _all(self, state: State) -> dict[str, Any]:
        if self._frozen is None:
            self._frozen = self.frozen()
        return joined(self._frozen, state.params)

    def _roll(
        self, rollout: int, state: State
    ) -> tuple[Batch, dict[str, jax.Array], dict[str, jax.Array], tuple[Mapping[str, Any], ...]]:
        params = self._all(state)
        episodes, scores = self._scored(rollout, params["policy"])
        measured = self._join(tuple(self._measure(params, part) for part in self._parts(episodes)))
        found, kl_B = self._learn(measured, scores, state.extras)
        samples = self._samples(measured, scores, kl_B) if rollout % self.config.samples_every == 0 else ()
        return found.batch, found.figures, found.extras, samples

    def _scored(self, rollout: int, policy: Params) -> tuple[Batch, Scores]:
        """The episodes of a rollout with their scores; groups of equal scores make room for others, while there are."""
        rounds, full = [], 0
        groups = self.config.episodes // self.config.responses
        for number in range(self.rounds):
            parts, key = [], jax.random.fold_in(jax.random.fold_in(self.key, rollout), number)
            for chunk, prompts in enumerate(self._prompts(rollout * self.rounds + number)):
                given = put_batch(prompts, self.mesh)
                # one chunk after the other, as in `mean_of`
                parts.append(jax.block_until_ready(self._respond(policy, given, jax.random.fold_in(key, chunk))))
            scores = [jax.block_until_ready(self.judge(part, self.mesh)) for part in parts]
            rounds.append((self._join(tuple(parts)), self._join(tuple(scores))))
            if self.rounds == 1:
                return rounds[0]
            full += int(np.sum(self._varied(*rounds[-1])))
            if full >= groups:
                break
        episodes, scores = self._join(tuple(e for e, _ in rounds)), self._join(tuple(s for _, s in rounds))
        chosen = np.argsort(~self._varied(episodes, scores), kind="stable")[:groups]  # equal scores where others lack
        rows = (np.sort(chosen)[:, None] * self.config.responses + np.arange(self.config.responses)).reshape(-1)
        rows = jax.device_put(rows.astype(np.int32), P())
        return self._pick(episodes, rows), self._pick(scores, rows)

    def _varied(self, episodes: Batch, scores: Scores) -> np.ndarray:
        """Which groups have different rewards, [P] bool."""
        rewards_B = reward(self.config, scores["total"], episodes["ended"])
        return np.ptp(fetch(rewards_B).reshape(-1, self.config.responses), axis=1) > 0

    def _prompts(self, number: int) -> Iterator[dict[str, np.ndarray]]:
        """The prompts of a rollout, each as often as it is answered, in chunks of similar lengths; this host's rows."""
        c = self.config
        count = c.episodes // c.responses
        drawn = self.draws.gather(range(number * count, (number + 1) * count))
        order = np.argsort(drawn["segments"].sum(axis=1), kind="stable")
        order = np.repeat(order if c.rollout_batch is not None else np.arange(count), c.responses)
        size = c.rollout_batch or c.episodes
        here = host_rows(self.mesh, size)
        for begin in range(0, c.episodes, size):
            rows = order[begin : begin + size]
            width = min(bucket(int(drawn["segments"][rows].sum(axis=1).max()), WIDTH), c.prompt_length)
            mine = rows[here]
            yield {
                "tokens": drawn["tokens"][mine, -width:],
                "segments": drawn["segments"][mine, -width:],
                "row": drawn["row"][mine],
            }

    def _parts(self, episodes: Batch) -> Iterator[Batch]:
        size = self.config.rollout_batch or self.config.episodes
        if size == self.config.episodes:
            yield episodes
            return
        for begin in range(0, self.config.episodes, size):
            yield self._part(episodes, begin, size)

    def _generate(self, policy: Params, prompts: Batch, key: jax.Array) -> Batch:
        return respond(self.config, self.actors, policy, prompts, key, self.ends, self.tokenizer.pad)

    def _measured(self, params: Mapping[str, Any], episodes: Batch) -> Batch:
        with jax.numpy_dtype_promotion("strict"):
            return self.actors.measure(params, episodes)

    def _samples(self, measured: Batch, scores: Scores, kl_B: jax.Array) -> tuple[Mapping[str, Any], ...]:
        """The first episodes, to be read by people."""
        shown = {name: measured[name] for name in ("tokens", "segments", "mask", "ended")}
        first = self._part({**shown, "score": scores["total"], "kl": kl_B}, 0, self.config.batch)
        kept = fetch(first)
        return tuple(self._sample(kept, i) for i in range(min(self.config.samples, len(kept["mask"]))))

    def _sample(self, episodes: Mapping[str, np.ndarray], i: int) -> dict[str, Any]:
        prompt, length = self.config.prompt_length, int(episodes["mask"][i].sum())
        tokens, real = episodes["tokens"][i], episodes["segments"][i, :prompt] > 0
        ended = bool(episodes["ended"][i])
        return {
            "prompt": self.tokenizer.decode_visible(tokens[:prompt][real].tolist()),
            "response": self.tokenizer.decode(tokens[prompt : prompt + length - ended].tolist()),
            "score": round(float(episodes["score"][i]), 4),
            "kl": round(float(episodes["kl"][i]), 4),
            "length": length,
            "ended": ended,
        }


def learnable(
    config: RolloutConfig, estimate: Estimate, measured: Batch, scores: Scores, extras: dict[str, jax.Array]
) -> tuple[Estimated, jax.Array]:
    """What a stage learns from in measured and judged episodes, and each one's KL from the reference, nats [B]."""
    with jax.numpy_dtype_promotion("strict"):
        scores_B = reward(config, scores["total"], measured["ended"])
        found = estimate(measured, scores_B, extras)
        figures = objective_figures(measured, scores_B) | score_figures(scores)
        return found._replace(figures=figures | found.figures), reference_kl(measured)


def reward(config: RolloutConfig, scores_B: jax.Array, ended_B: jax.Array) -> jax.Array:
    """What a stage makes of scores [B]: clipped, and by its rule for responses that never end."""
    most, missing = config.reward_clip, config.missing_eos
    scores_B = scores_B if most is None else jnp.clip(scores_B, -most, most)
    return missing_eos(scores_B, ended_B, missing.how, missing.value)


def respond(
    config: RolloutConfig,
    actors: Actors,
    policy: Params,
    prompts: Batch,
    key: jax.Array,
    ends: tuple[int, ...],
    pad: int,
) -> Batch:
    """Episodes: sampled responses to left-padded prompts of any width; "row" of the prompts is kept. Traced."""
    with jax.numpy_dtype_promotion("strict"):
        out = generate(
            actors.policy.bind(policy), prompts["tokens"], prompts["segments"], key, new=config.response_length,
            temperature=config.temperature, ends=ends, pad=pad, after=config.stop_after,
        )  # fmt: skip
    real_BN = jnp.arange(config.response_length) < out.lengths_B[:, None]
    before = ((0, 0), (config.prompt_length - prompts["tokens"].shape[1], 0))
    tokens_BP = jnp.pad(prompts["tokens"], before, constant_values=pad)
    return {
        "tokens": jnp.concatenate([tokens_BP, out.tokens_BN], axis=1),
        "segments": jnp.concatenate([jnp.pad(prompts["segments"], before), real_BN.astype(jnp.int32)], axis=1),
        "mask": real_BN.astype(jnp.float32),
        "ended": out.done_B,
        "row": prompts["row"],
        "sampler_logp": out.logp_BN,
    }


def reference_kl(measured: Batch) -> jax.Array:
    """KL of the episodes from the reference, nats summed over a response, k1, [B]; 0 without a reference."""
    other_BN = measured.get("reference_logp", measured["logp"])
    return episode_kl(measured["logp"], other_BN, measured["mask"])


def objective_figures(measured: Batch, scores_B: jax.Array) -> dict[str, jax.Array]:
    """The figures that every rollout has, float32 scalars."""
    mask_BN = measured["mask"]
    lengths_B = jnp.sum(mask_BN, axis=1)
    figures = {
        "objective/scores": jnp.mean(scores_B),
        "objective/scores_std": jnp.std(scores_B),
        "objective/entropy": masked_mean(measured["entropy"], mask_BN),
        "objective/length": jnp.mean(lengths_B),
        "objective/eos_rate": jnp.mean(measured["ended"].astype(jnp.float32)),
        "val/sampler_gap": jnp.max(jnp.where(mask_BN > 0, jnp.abs(measured["logp"] - measured["sampler_logp"]), 0.0)),
    }
    if "reference_logp" in measured:
        pair = (measured["logp"], measured["reference_logp"], mask_BN)
        figures["objective/kl"] = jnp.mean(episode_kl(*pair))
        figures["objective/kl_k3"] = jnp.mean(episode_kl(*pair, kind="k3"))
    return figures


def pick(episodes: Batch, rows: jax.Array) -> Batch:
    """Rows of every array, split over the devices anew."""

    def take(x: jax.Array) -> jax.Array:
        return _whole(x).at[rows].get(out_sharding=batch_spec(x.ndim))

    return {name: take(x) for name, x in episodes.items()}


def _whole(x: jax.Array) -> jax.Array:
    return jax.sharding.reshard(x, P(*(None,) * x.ndim))


def join(parts: Sequence[Batch]) -> Batch:
    """Batches one behind the other."""
    if len(parts) == 1:
        return parts[0]
    return {
        name: jax.sharding.reshard(jnp.concatenate([_whole(part[name]) for part in parts]), batch_spec(x.ndim))
        for name, x in parts[0].items()
    }


def _part(episodes: Batch, begin: int, size: int) -> Batch:
    return pick(episodes, jnp.arange(begin, begin + size))
