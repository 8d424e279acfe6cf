"""Checks of a reward model: a score depends on the response's own tokens, not on padding, filling or company.

Letters: B rankings, K responses, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.doctor.check import Check, below
from jaxgpt.doctor.trial import Trial
from jaxgpt.mesh import local_rows, put_batch
from jaxgpt.models.net import Net, Params
from jaxgpt.stages import reward
from jaxgpt.train.step import Batch

BAR = 1e-5
LOOSE = 0.05
"""The bar where the blocks compute in bfloat16."""


def invariance(trial: Trial, net: Net, params: Params) -> list[Check]:
    """Scores of the trial's rankings against those of the same rankings, padded and grouped in other ways."""
    batch = {name: local_rows(x) for name, x in trial.drawn.batch.items()}
    lengths_BK, T = batch["lengths"], batch["tokens"].shape[2]
    width, real_BK = int(lengths_BK.max()), lengths_BK > 0

    @jax.jit
    def score(params: Params, batch: Batch) -> jax.Array:
        with jax.numpy_dtype_promotion("strict"):
            return reward.score_rankings(net.bind(params), batch)

    def scores(tokens_BKT: np.ndarray, lengths_BK: np.ndarray = lengths_BK) -> np.ndarray:
        rows = {"tokens": tokens_BKT, "lengths": lengths_BK}
        return local_rows(score(params, put_batch(rows, trial.run.mesh)))

    def gap(other_BK: np.ndarray, base_BK: np.ndarray) -> float:
        found = np.abs(other_BK - base_BK)[real_BK]
        return float(np.max(found)) if np.isfinite(found).all() else float("nan")

    base_BK = scores(batch["tokens"])
    beyond_BKT = np.arange(T) >= lengths_BK[:, :, None]
    filled = np.where(beyond_BKT, np.int32(trial.run.tokenizer.eos), batch["tokens"])
    room = trial.run.config.model.context - width
    wide = T if width < T else width + min(room, 8)
    padded = np.zeros((*lengths_BK.shape, wide), np.int32)
    padded[:, :, : min(wide, T)] = batch["tokens"][:, :, :wide]
    narrow_BK = scores(batch["tokens"][:, :, :width]) if wide != width else base_BK
    turned_BK = scores(batch["tokens"][::-1], lengths_BK[::-1])[::-1]
    ways = trial.run.mesh.shape["data"] * trial.run.mesh.shape["fsdp"]
    alone_BK = np.repeat(base_BK[:1], len(base_BK), axis=0).copy()
    alone_BK[:] = base_BK
    alone_BK[0] = scores(np.repeat(batch["tokens"][:1], ways, axis=0), np.repeat(lengths_BK[:1], ways, axis=0))[0]
    bar = trial.bar(BAR, LOOSE)
    padding = (
        "a score must be read at the last real token and see nothing behind it: look at model.attention.kernel; with "
        "scores like these PPO learns to be short or long"
    )
    company = "a score must not depend on the other rows of its batch: look at model.attention.kernel and model.mlp"
    return [
        below(f"scores with {wide - width} pads more", gap(scores(padded), narrow_BK), bar, padding),
        below("scores with padding of other tokens", gap(scores(filled), base_BK), bar, padding),
        below("scores in another order", gap(turned_BK, base_BK), bar, company),
        below("scores of a ranking alone", gap(alone_BK, base_BK), bar, company),
        Check("scores, mean and deviation", f"{base_BK[real_BK].mean():.2f}, {base_BK[real_BK].std():.2f}"),
    ]


def in_rollouts(trial: Trial) -> list[Check]:
    """A reward model's score of left-padded episodes against that of the same tokens without padding in front."""
    judge, batch = trial.stage.source.judge, trial.drawn.batch
    if list(judge.params) != ["model"] or len(judge.params["model"]) > 1 or len(trial.config.rewards) > 1:
        return [Check("rollout's score - plain score", "asked of a single reward model alone")]
    net, params = trial.run.load_reward(trial.run.parent(trial.name, "reward 1"))
    found_B = local_rows(judge({name: batch[name] for name in ("tokens", "segments", "mask")}, trial.run.mesh)["model"])
    tokens_BT, real_BT = local_rows(batch["tokens"]), local_rows(batch["segments"]) > 0
    plain_BT, lengths_B = np.zeros_like(tokens_BT), real_BT.sum(axis=1).astype(np.int32)
    for row, tokens, real in zip(plain_BT, tokens_BT, real_BT, strict=True):
        row[: real.sum()] = tokens[real]

    @jax.jit
    def score(params: Params, batch: Batch) -> jax.Array:
        with jax.numpy_dtype_promotion("strict"):
            return reward.score_rows(net.bind(params), batch["tokens"], batch["lengths"])

    params = jax.tree.map(lambda like, leaf: leaf.astype(like.dtype), judge.params["model"][0], params)
    alone_B = local_rows(score(params, put_batch({"tokens": plain_BT, "lengths": lengths_B}, trial.run.mesh)))
    return [
        below(
            "rollout's score - plain score", float(jnp.max(jnp.abs(alone_B - found_B))), trial.bar(1e-4, LOOSE),
            "the reward model sees the left padding of rollouts, or reads another token than the last; with rewards "
            "like these PPO learns from noise",
        )
    ]  # fmt: skip
