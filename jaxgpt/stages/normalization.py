"""Shift and scale of a reward model's scores: r' = gain r + offset, measured once and folded into the linear head.

A ranking leaves the offset of the scores free, and their scale is what data and training made it. Ziegler et al. 2019
set both on samples of the policy, mean 0 and deviation 1; InstructGPT shifts so that demonstrations score 0 on average.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax import P

from jaxgpt.config.schema import RewardConfig
from jaxgpt.data.chat import render
from jaxgpt.data.mixture import single
from jaxgpt.data.rankings import RankingRows
from jaxgpt.mesh import put_whole
from jaxgpt.models.heads import language_model
from jaxgpt.models.net import Params
from jaxgpt.sampling import generate, left_padded
from jaxgpt.stages.run import Run
from jaxgpt.train.step import Batch

LEAST = 1e-6
"""The smallest deviation that scores are divided by."""
AT_ONCE = 64
"""Rows in one forward pass, in whole batches of the stage."""


def standardization(scores: np.ndarray, scale: bool) -> tuple[float, float]:
    """(gain, offset) with which the scores have mean 0 and, where `scale`, deviation 1 (over n); else the gain is 1."""
    scores = np.asarray(scores, np.float64)
    gain = 1.0 / max(float(scores.std()), LEAST) if scale else 1.0
    return gain, -gain * float(scores.mean())


def folded(params: Params, gain: float, offset: float) -> Params:
    """A reward model whose scores are gain * score + offset."""
    return {**params, "head_D": params["head_D"] * gain, "bias": params["bias"] * gain + offset}


def references(
    run: Run, config: RewardConfig, rows: RankingRows, demonstrations: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Token ids of the conversations whose scores set the normalization: of config.normalize_over rankings,
    demonstrations or samples, drawn by the run's seed."""
    if config.normalize == "policy":
        return policy_samples(run, config, rows)
    if config.normalize == "demonstrations":
        return [demonstrations[i] for i in _some(run, len(demonstrations), config.normalize_over)]
    chosen = [rows.rankings[i] for i in _some(run, len(rows), config.normalize_over)]
    return [ids for ranking in chosen for ids in ranking.ids]


def policy_samples(run: Run, config: RewardConfig, rows: RankingRows) -> list[np.ndarray]:
    """Training prompts with responses of the model that training starts from, sampled at temperature 1, token ids.

    A response is as long as the longest ranked one at most, and is cut where its prompt leaves less room.
    """
    rankings = list({ranking.prompt: ranking for ranking in rows.rankings}.values())
    asked = [np.array(render(run.tokenizer, r.messages, add_generation_prompt=True)[0], np.int32) for r in rankings]
    longest = max(len(ids) - len(ask) for ask, r in zip(asked, rankings, strict=True) for ids in r.ids)
    new = max(min(longest, config.context - min(map(len, asked))), 1)
    order = _some(run, len(asked), len(asked))
    chosen = [asked[order[i % len(order)]] for i in range(config.normalize_over)]
    batch, width = whole_batches(config), max(map(len, chosen))
    lm, pad, ends = language_model(run.config.model, run.vocab), run.tokenizer.pad, run.tokenizer.ends

    @jax.jit
    def respond(params: Params, given: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.numpy_dtype_promotion("strict"):
            out = generate(
                lm.bind(params), given["tokens"], given["segments"], key, new=new, temperature=1.0, ends=ends, pad=pad
            )
        return jax.sharding.reshard(out.tokens_BN, P(None, None)), jax.sharding.reshard(out.lengths_B, P(None))

    policy, key = run.load_language(run.parent("reward")), run.key("samples")
    found: list[np.ndarray] = []
    for begin in range(0, len(chosen), batch):
        part = [chosen[i % len(chosen)] for i in range(begin, begin + batch)]
        given = put_whole(left_padded(part, batch, width, pad), run.mesh)
        tokens_BN, lengths_B = jax.device_get(respond(policy, given, jax.random.fold_in(key, begin)))
        found += [
            np.concatenate([prompt, tokens[:length]])[: config.context]
            for prompt, tokens, length in zip(part, tokens_BN, lengths_B, strict=True)
        ]
    return found[: len(chosen)]


def whole_batches(config: RewardConfig) -> int:
    """About AT_ONCE rows, as a multiple of the stage's batch, which the mesh divides."""
    return config.batch * max(1, AT_ONCE // config.batch)


def _some(run: Run, count: int, most: int) -> list[int]:
    """Up to `most` of so many rows, by the run's seed."""
    order = single(range(count), run.config.seed, epochs=1).order
    return [int(order[i]) for i in range(min(most, count))]
