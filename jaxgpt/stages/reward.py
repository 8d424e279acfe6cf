"""The reward model: a score for each response, learned from people's rankings, all pairs of a prompt at once.

Letters: B prompts, K responses of one prompt, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import P

from jaxgpt.config.schema import RewardConfig
from jaxgpt.data.conversations import load_demonstrations
from jaxgpt.data.mixture import Batches, ordered, single
from jaxgpt.data.rankings import WIDTH, RankingRows, load_split
from jaxgpt.losses import Metrics, best_of_k, centring, plackett_luce, ranking
from jaxgpt.mesh import BATCH, check_batch, host_rows, put_whole
from jaxgpt.models.heads import ScalarModel, scalar_model
from jaxgpt.models.net import Net, Params
from jaxgpt.optim import adamw, schedule
from jaxgpt.runs import RANDOM, demonstrations
from jaxgpt.sampling import right_padded
from jaxgpt.stages.normalization import folded, references, standardization, whole_batches
from jaxgpt.stages.pretrain import mean_of
from jaxgpt.stages.run import FromData, Run, held_out
from jaxgpt.stages.trained import trained
from jaxgpt.train.loop import Stage
from jaxgpt.train.state import State
from jaxgpt.train.step import Batch, Loss, Terms


class Data(NamedTuple):
    """What a reward model learns from."""

    rows: RankingRows
    test: RankingRows | None
    """Held-out rankings."""
    demonstrations: list[np.ndarray]
    """Token ids of conversations that set the offset of the scores; empty unless that is asked for."""
    long: int
    """Demonstrations that did not fit the context."""


def last_token(scores_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    """The score at one token of each row, [B]; an index outside the row gives 0."""
    here_BT = jnp.arange(scores_BT.shape[1]) == index_B[:, None]
    return jnp.sum(jnp.where(here_BT, scores_BT, 0.0), axis=1)


def score_rows(model: ScalarModel, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Scores of right-padded rows, read at each one's last token, [B] float32."""
    time_T = jnp.arange(tokens_BT.shape[1])
    segments_BT = (time_T < lengths_B[:, None]).astype(jnp.int32)
    positions_BT = jnp.zeros_like(tokens_BT) + time_T.astype(jnp.int32)
    return last_token(model(tokens_BT, segments_BT, positions_BT), lengths_B - 1)


def score_rankings(model: ScalarModel, batch: Batch) -> jax.Array:
    """Scores of every response of a ranking batch, [B, K] float32; each response is read once."""
    tokens_BKT, lengths_BK = batch["tokens"], batch["lengths"]
    B, K, T = tokens_BKT.shape
    tokens = tokens_BKT.reshape(B * K, T, out_sharding=P(BATCH, None))
    lengths = lengths_BK.reshape(B * K, out_sharding=P(BATCH))
    return score_rows(model, tokens, lengths).reshape(B, K, out_sharding=P(BATCH, None))


def score_sequences(run: Run, net: Net, params: Params, sequences: Sequence[np.ndarray], batch: int) -> np.ndarray:
    """Scores of conversations, token ids [n] each; float32. They are read `batch` at a time."""

    @jax.jit
    def scores(params: Params, rows: Batch) -> jax.Array:
        found_B = score_rows(net.bind(params), rows["tokens"], rows["lengths"])
        return jax.sharding.reshard(found_B, P(None))

    width = -(-max(map(len, sequences)) // WIDTH) * WIDTH
    parts = []
    for begin in range(0, len(sequences), batch):
        rows = right_padded(sequences[begin : begin + batch], batch, width)
        parts.append(jax.device_get(scores(params, put_whole(rows, run.mesh))))
    return np.concatenate(parts)[: len(sequences)]


def ranking_loss(config: RewardConfig, net: Net) -> Loss:
    """The config's loss on each ranking, nats, and with it, where that has a weight, the centring of the scores."""

    def loss(params: Params, batch: Batch) -> tuple[Terms, Metrics]:
        scores_BK, ranks_BK, valid_BK = score_rankings(net.bind(params), batch), batch["ranks"], batch["lengths"] > 0
        match config.loss:
            case "ranking":
                term, metrics = ranking(
                    scores_BK, ranks_BK, valid_BK, margin_B=batch["margin"] + config.margin,
                    label_smoothing=config.label_smoothing, ties=config.ties, weighting=config.weighting,
                )  # fmt: skip
            case "best_of_k":
                term, metrics = best_of_k(scores_BK, ranks_BK, valid_BK)
            case "plackett_luce":
                term, metrics = plackett_luce(scores_BK, ranks_BK, valid_BK)
        if config.centring == 0.0:
            return term, metrics
        centre = centring(scores_BK, valid_BK)
        return (term, centre.scaled(config.centring)), {**metrics, "centring": centre}

    return loss


def load(run: Run, config: RewardConfig) -> Data:
    """The rankings and demonstrations. Raises UserError naming the record that cannot be used."""
    assert config.data is not None
    rows, test = load_split(
        config.data, run.paths, run.tokenizer, config.context, config.responses, "reward", config.ties
    )
    if config.normalize != "demonstrations":
        return Data(rows, test, [], 0)
    given = demonstrations(run.config)
    assert given is not None
    fields = (given.prompt_field, given.completion_field)
    return Data(rows, test, *load_demonstrations(run.paths(given.path), run.tokenizer, config.context, *fields))


def stage(run: Run, config: RewardConfig) -> Stage:
    """Reward modelling as a value; call under `jax.set_mesh`."""
    check_batch(run.mesh, config.batch // config.accumulate, "reward.batch / reward.accumulate")
    plain, init, key = scalar_model(run.config.model, run.vocab), run.parent("reward"), run.key("reward")

    def start() -> Params:
        fresh = jax.jit(plain.init)(key)
        return fresh if init == RANDOM else {**fresh, "backbone": run.load_language(init)["backbone"]}

    model = trained(lambda lora: scalar_model(run.config.model, run.vocab, lora), start, config.lora, key)
    data = load(run, config)
    rows, loss = data.rows, ranking_loss(config, model.net)
    draws = single(rows, run.config.seed, None if config.steps else config.epochs)
    batches = Batches(draws, config.batch, host_rows(run.mesh, config.batch))
    steps = config.steps or len(batches)
    source = FromData(batches, run.mesh)
    evaluate = None
    if data.test is not None:
        fixed = Batches(ordered(data.test), config.batch, host_rows(run.mesh, config.batch))
        evaluate = mean_of(loss, held_out(fixed, config.eval_batches, run.mesh))
    known: dict[str, Any] = {}

    def finish(state: State) -> Params:
        params = model.whole(state.params)
        if config.normalize == "none":
            return params
        over = references(run, config, rows, data.demonstrations)
        scores = score_sequences(run, plain, params, over, whole_batches(config))
        gain, offset = standardization(scores, scale=config.normalize != "demonstrations")
        known["normalization"] = {"of": config.normalize, "over": len(over), "gain": gain, "offset": offset}
        return folded(params, gain, offset)

    return Stage(
        name="reward",
        init=model.first,
        abstract=model.abstract,
        loss=loss,
        source=source,
        tx=adamw(config.optimizer, steps),
        schedule=schedule(config.optimizer, steps),
        steps=steps,
        tokens_per_step=config.batch * rows.responses * rows.context,
        evaluate=evaluate,
        quality=lambda figures: figures["accuracy"],
        frozen=model.frozen,
        finish=finish,
        beside=lambda state: model.beside(state.params),
        known=lambda: known,
        notes=(*model.notes, *_notes(config, data, steps)),
        close=source.close,
    )


def _notes(config: RewardConfig, data: Data, steps: int) -> tuple[str, ...]:
    rows = data.rows
    passes = steps * config.batch / len(rows) if config.steps else config.epochs
    held = "" if data.test is None else f", {len(data.test):,} held out"
    notes = [
        f"{len(rows):,} rankings{held}, {passes:.2f} epochs, up to {rows.responses} responses of {rows.context} tokens"
    ]
    if data.long:
        notes.append(f"{data.long:,} demonstrations are longer than reward.context={config.context} and are left out")
    if config.loss != "ranking" and any(ranking.margin for ranking in rows.rankings):
        notes.append(f"the records' margins do not count: reward.loss={config.loss} has none")
    return tuple(notes)
