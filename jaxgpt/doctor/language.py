"""Checks of language models: packed documents do not see each other, and decoding is the forward pass.

Letters: B rows, T time, D model width, N new tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgpt.doctor.check import Check, below, zero
from jaxgpt.doctor.trial import Trial
from jaxgpt.losses import token_logp
from jaxgpt.mesh import local_rows, put_batch
from jaxgpt.models.heads import language_model
from jaxgpt.models.net import Params
from jaxgpt.models.transformer import Place
from jaxgpt.sampling import bucket, generate, left_padded
from jaxgpt.stages.episodes import response_hidden
from jaxgpt.train.step import Batch

NAMES = ("tokens", "targets", "mask", "segments", "positions")
NEW = 16
"""Tokens that are decoded."""
MASKS = (
    "documents of a row see each other: look at model.attention (kernel, windows), and report it if the settings are "
    "ordinary; until then train with one document a row"
)


class Packed(NamedTuple):
    """A row of several documents, and which of them have something to learn."""

    row: dict[str, np.ndarray]
    documents: list[int]


def packed_row(trial: Trial) -> Packed | None:
    """The first row of the trial's batch with two documents that have something to learn."""
    batch = {name: local_rows(trial.drawn.batch[name]) for name in NAMES}
    for i in range(len(batch["tokens"])):
        row = {name: x[i] for name, x in batch.items()}
        documents = np.unique(row["segments"][(row["segments"] > 0) & (row["mask"] > 0)]).tolist()
        if len(documents) > 1:
            return Packed(row, documents)
    return None


def packing(trial: Trial) -> list[Check]:
    """Documents in one row against the same documents alone, through the stage's own loss; and the gradient between."""
    found = packed_row(trial)
    if found is None:
        return [Check("packing isolation", "no row holds two documents")]
    size = trial.drawn.batch["tokens"].shape[0]

    @jax.jit
    def total(params: Params, batch: Batch) -> jax.Array:
        with jax.numpy_dtype_promotion("strict"):
            return trial.stage.loss(params, batch)[1]["nll"].mean

    def nll(row: dict[str, np.ndarray]) -> float:
        rows = {name: np.zeros((size, *x.shape), x.dtype) for name, x in row.items()}
        for name, x in row.items():
            rows[name][0] = x
        return float(total(trial.params, put_batch(rows, trial.run.mesh)))

    gaps = [abs(nll(_only(found.row, d)) - nll(_alone(found.row, d))) for d in found.documents]
    leak, own = _gradients(trial, found, size)
    return [
        below("packed - alone, nats a token", max(gaps), trial.bar(1e-4, 0.05), MASKS),
        zero("gradient into other documents", leak, MASKS),
        Check("gradient into the own document", f"{own:.2g}", "above 0", own > 0, "the document learns nothing"),
    ]


def _only(row: dict[str, np.ndarray], document: int) -> dict[str, np.ndarray]:
    """The row with one document's targets counted."""
    return {**row, "mask": row["mask"] * (row["segments"] == document)}


def _alone(row: dict[str, np.ndarray], document: int) -> dict[str, np.ndarray]:
    """The document at the beginning of an empty row."""
    here = row["segments"] == document
    alone = {name: np.zeros_like(x) for name, x in row.items()}
    for name, x in row.items():
        alone[name][: here.sum()] = x[here]
    alone["segments"] = np.minimum(alone["segments"], 1)
    return alone


def _gradients(trial: Trial, found: Packed, size: int) -> tuple[float, float]:
    """Largest |gradient| of the last document's loss by embeddings of others, and by its own."""
    net = language_model(trial.run.config.model, trial.run.vocab)
    params, document = trial.stage.finish(trial.state), found.documents[-1]
    row = _only(found.row, document)
    batch = put_batch({name: np.repeat(x[None], size, axis=0) for name, x in row.items()}, trial.run.mesh)

    @jax.jit
    def largest(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        lm = net.bind(params)
        backbone, positions_BT = lm.backbone, batch["positions"]
        place = Place(batch["segments"], backbone.tables(positions_BT))

        def loss(x_BTD: jax.Array) -> jax.Array:
            logp_BT = token_logp(lm.logits(backbone.run(x_BTD, place)), batch["targets"])
            return -jnp.sum(logp_BT * batch["mask"])

        size_BT = jnp.max(jnp.abs(jax.grad(loss)(backbone.embed(batch["tokens"], positions_BT))), axis=-1)
        own_BT = batch["segments"] == document
        return jnp.max(jnp.where(own_BT, 0.0, size_BT)), jnp.max(jnp.where(own_BT, size_BT, 0.0))

    leak, own = largest(params, batch)
    return float(leak), float(own)


def decoding(trial: Trial, params: Params, ends: tuple[int, ...]) -> Check:
    """Log-probabilities of left-padded prompts' sampled tokens: of the cache, and of one forward pass."""
    net, pad = language_model(trial.run.config.model, trial.run.vocab), trial.run.tokenizer.pad
    batch = {name: local_rows(trial.drawn.batch[name]) for name in NAMES}
    prompts = [_asked({name: x[i] for name, x in batch.items()}) for i in range(len(batch["tokens"]))]
    new = min(NEW, trial.run.config.model.context // 2)
    most = trial.run.config.model.context - new
    prompts = [prompt[-most:] for prompt in prompts]
    width = min(bucket(max(map(len, prompts)), 16), most)
    rows = put_batch(left_padded(prompts, len(prompts), width, pad), trial.run.mesh)

    @jax.jit
    def gap(params: Params, rows: Batch, key: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("strict"):
            lm = net.bind(params)
            out = generate(lm, rows["tokens"], rows["segments"], key, new=new, temperature=1.0, ends=ends, pad=pad)
            real_BN = jnp.arange(new) < out.lengths_B[:, None]
            whole = {
                "tokens": jnp.concatenate([rows["tokens"], out.tokens_BN], axis=1),
                "segments": jnp.concatenate([rows["segments"], real_BN.astype(jnp.int32)], axis=1),
            }
            (logp_BN,) = lm.predicted(response_hidden(lm, whole, width), out.tokens_BN)
            return jnp.max(jnp.where(real_BN, jnp.abs(logp_BN - out.logp_BN), 0.0))

    figure = float(gap(params, rows, jax.random.key(0)))
    return below(
        "cached decoding - forward pass, nats", figure, trial.bar(1e-3),
        "sampling does not follow the model that is trained: look at model.attention.kernel and model.positions",
    )  # fmt: skip


def _asked(row: dict[str, np.ndarray]) -> np.ndarray:
    """The tokens of a row's first document up to where the assistant speaks; all of them where it never does."""
    first = row["segments"] == max(row["segments"][0], 1)
    tokens, mask = row["tokens"][first], row["mask"][first]
    stop = int(np.argmax(mask > 0)) + 1 if mask.any() else len(tokens)
    return tokens[:stop] if stop else row["tokens"][:1]
