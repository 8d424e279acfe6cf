"""The reward model: a score for each response, learned from people's rankings, all pairs of a prompt at once.

Letters: B prompts, K responses of one prompt, T time.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import P

from jaxgpt.config.schema import RewardConfig
from jaxgpt.data.mixture import Batches, ordered, single
from jaxgpt.data.rankings import RankingRows, check_split, load_rankings
from jaxgpt.losses import Ratio, ranking
from jaxgpt.mesh import BATCH, check_batch
from jaxgpt.models.heads import ScalarModel, scalar_model
from jaxgpt.models.net import Net, Params
from jaxgpt.optim import adamw, schedule
from jaxgpt.runs import RANDOM
from jaxgpt.stages.pretrain import mean_of
from jaxgpt.stages.run import FromData, Run, held_out
from jaxgpt.stages.trained import trained
from jaxgpt.train.loop import Stage
from jaxgpt.train.state import State
from jaxgpt.train.step import Batch, Loss

NORMALIZED_OVER = 512
"""Training prompts whose responses set the score's mean and deviation."""


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


def ranking_loss(net: Net) -> Loss:
    """Bradley-Terry over all pairs of each ranking, nats per prompt."""

    def loss(params: Params, batch: Batch) -> tuple[Ratio, dict[str, Ratio]]:
        return ranking(score_rankings(net.bind(params), batch), batch["ranks"], batch["lengths"] > 0)

    return loss


def normalized(run: Run, net: Net, rows: RankingRows, batch: int, params: Params) -> Params:
    """The same ranking with scores of mean 0 and deviation 1 over training responses: the linear head takes both in."""

    @jax.jit
    def sums(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        scores_BK, valid_BK = score_rankings(net.bind(params), batch), batch["lengths"] > 0
        known_BK = jnp.where(valid_BK, scores_BK, 0.0)
        return jnp.sum(valid_BK), jnp.sum(known_BK), jnp.sum(jnp.square(known_BK))

    fixed = Batches(ordered(rows), batch, run.hosts)
    parts = [jax.device_get(sums(params, b)) for b in held_out(fixed, -(-NORMALIZED_OVER // batch), run.mesh)]
    count, total, squares = (math.fsum(float(part[i]) for part in parts) for i in range(3))
    mean = total / count
    deviation = max(math.sqrt(max(squares / count - mean**2, 0.0)), 1e-6)
    return {**params, "head_D": params["head_D"] / deviation, "bias": (params["bias"] - mean) / deviation}


def load(run: Run, config: RewardConfig) -> tuple[RankingRows, RankingRows | None]:
    """The training and held-out rankings. Raises UserError naming the record that cannot be used."""
    assert config.data is not None
    data = config.data
    rows = load_rankings(run.paths(data.path), run.tokenizer, config.context, config.responses)
    if data.eval_path is None:
        return rows, None
    test = load_rankings(run.paths(data.eval_path), run.tokenizer, config.context, config.responses)
    check_split(rows, test)
    return rows, test


def stage(run: Run, config: RewardConfig) -> Stage:
    """Reward modelling as a value; call under `jax.set_mesh`."""
    check_batch(run.mesh, config.batch // config.accumulate, "reward.batch / reward.accumulate")
    plain, init, key = scalar_model(run.config.model, run.vocab), run.parent("reward"), run.key("reward")

    def start() -> Params:
        fresh = jax.jit(plain.init)(key)
        return fresh if init == RANDOM else {**fresh, "backbone": run.load_language(init)["backbone"]}

    model = trained(lambda lora: scalar_model(run.config.model, run.vocab, lora), start, config.lora, key)
    rows, test = load(run, config)
    source = FromData(Batches(single(rows, run.config.seed), config.batch, run.hosts), run.mesh)
    evaluate = None
    if test is not None:
        fixed = Batches(ordered(test), config.batch, run.hosts)
        evaluate = mean_of(ranking_loss(model.net), held_out(fixed, config.eval_batches, run.mesh))

    def finish(state: State) -> Params:
        params = model.whole(state.params)
        return normalized(run, plain, rows, config.batch, params) if config.normalize else params

    return Stage(
        name="reward",
        init=model.first,
        abstract=model.abstract,
        loss=ranking_loss(model.net),
        source=source,
        tx=adamw(config.optimizer, config.steps),
        schedule=schedule(config.optimizer, config.steps),
        steps=config.steps,
        tokens_per_step=config.batch * config.responses * config.context,
        evaluate=evaluate,
        quality=lambda figures: figures["accuracy"],
        frozen=model.frozen,
        finish=finish,
        beside=lambda state: model.beside(state.params),
        notes=(
            *model.notes,
            f"{len(rows):,} rankings, {config.steps * config.batch / len(rows):.2f} epochs",
        ),
        close=source.close,
    )
