"""Direct preference optimization: the policy from rankings, without a reward model (DPO, IPO, cDPO; an SFT term).

The reference is the model that training starts from: a copy, or with adapters the base itself. Its log-probabilities
of the responses come with the batch.
Letters: B rankings, K responses of one prompt, T time.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import P

from jaxgpt.config.schema import DpoConfig
from jaxgpt.data.mixture import Batches, ordered, single
from jaxgpt.data.preferences import PreferenceRows, preferences
from jaxgpt.data.rankings import load_split
from jaxgpt.losses import Metrics, Ratio, dpo, sequence_logp
from jaxgpt.mesh import BATCH, check_batch, host_rows
from jaxgpt.models.heads import LanguageModel, language_model
from jaxgpt.models.net import Net, Params
from jaxgpt.optim import adamw, schedule
from jaxgpt.stages.pretrain import mean_of
from jaxgpt.stages.run import FromData, Run, held_out
from jaxgpt.stages.trained import trained
from jaxgpt.train.loop import Drawn, Stage
from jaxgpt.train.state import State
from jaxgpt.train.step import Batch, Loss, Terms


def response_logp(lm: LanguageModel, batch: Batch) -> jax.Array:
    """Log-probability of every target, nats, [B, K, T] float32; each response is read once."""
    B, K, T = batch["tokens"].shape
    tokens, targets, segments = (
        batch[name].reshape(B * K, T, out_sharding=P(BATCH, None)) for name in ("tokens", "targets", "segments")
    )
    positions = jnp.zeros_like(tokens) + jnp.arange(T, dtype=jnp.int32)
    logp = lm.logp(tokens, segments, positions, targets)
    return logp.reshape(B, K, T, out_sharding=P(BATCH, None, None))


def pair_weights(ranks_BK: jax.Array) -> jax.Array:
    """1 / n for each of a ranking's n pairs (i better than j), 0 elsewhere: a ranking weighs 1; float32 [B, K, K].

    Rank 0 says that there is no response.
    """
    rank_i, rank_j = ranks_BK[:, :, None], ranks_BK[:, None, :]
    better = ((rank_i > 0) & (rank_i < rank_j)).astype(jnp.float32)
    return better / jnp.maximum(jnp.sum(better, axis=(1, 2), keepdims=True), 1.0)


def preference_loss(net: Net, config: DpoConfig) -> Loss:
    """DPO's loss over all pairs of each ranking, mean over rankings; with sft_coef also the best response's nll.

    The batch has "reference" [B, K] beside what PreferenceRows gives.
    """
    mean = config.loss == "ipo" and config.length_normalized

    def loss(params: Params, batch: Batch) -> tuple[Terms, Metrics]:
        logp_BKT, mask_BKT, ranks_BK = response_logp(net.bind(params), batch), batch["mask"], batch["ranks"]
        policy_BK, weight_BKK = sequence_logp(logp_BKT, mask_BKT, mean), pair_weights(ranks_BK)
        chosen, ref_chosen = (_along(x, weight_BKK, 2) for x in (policy_BK, batch["reference"]))
        rejected, ref_rejected = (_along(x, weight_BKK, 1) for x in (policy_BK, batch["reference"]))
        pairs, metrics = dpo(
            chosen, rejected, ref_chosen, ref_rejected, config.beta,
            kind=config.loss, label_smoothing=config.label_smoothing, weight_B=weight_BKK,
        )  # fmt: skip
        if config.sft_coef == 0.0:
            return pairs, {"loss": pairs, **metrics}
        nll = Ratio.of(-logp_BKT, mask_BKT * _best(ranks_BK)[:, :, None])
        return (pairs, nll.scaled(config.sft_coef)), {"loss/dpo": pairs, "loss/sft": nll, **metrics}

    return loss


def _along(x_BK: jax.Array, like_BKK: jax.Array, axis: int) -> jax.Array:
    """[B, K] repeated along a new axis."""
    return jnp.expand_dims(x_BK, axis) + jnp.zeros_like(like_BKK)


def _best(ranks_BK: jax.Array) -> jax.Array:
    """1 for the responses of the lowest rank, float32 [B, K]."""
    there_BK = jnp.where(ranks_BK > 0, ranks_BK, jnp.iinfo(jnp.int32).max)
    return ((ranks_BK > 0) & (there_BK == jnp.min(there_BK, axis=1, keepdims=True))).astype(jnp.float32)


class WithReference:
    """A source whose batches carry the reference's log-probability of each response, nats, under "reference" [B, K]."""

    def __init__(self, source: FromData, net: Net, reference: Params, mean: bool):
        self._source, self._reference = source, reference

        def logp(params: Params, batch: Batch) -> jax.Array:
            with jax.numpy_dtype_promotion("strict"):
                return sequence_logp(response_logp(net.bind(params), batch), batch["mask"], mean)

        self._logp = jax.jit(logp)

    def __call__(self, step: int, state: State) -> Drawn:
        """The batch of a step."""
        drawn = self._source(step, state)
        return drawn._replace(batch=self.complete(drawn.batch))

    def complete(self, batch: Batch) -> Batch:
        """A batch with the reference's part."""
        return {**batch, "reference": self._logp(self._reference, batch)}


def load(run: Run, config: DpoConfig) -> tuple[PreferenceRows, PreferenceRows | None]:
    """The training and held-out rankings. Raises UserError naming the record that cannot be used."""
    assert config.data is not None
    rows = load_split(config.data, run.paths, run.tokenizer, config.context, config.responses, "dpo")
    train, test = (None if part is None else preferences(part, config.pairs) for part in rows)
    assert train is not None
    if test is not None:
        train.responses = test.responses = max(train.responses, test.responses)  # one program reads both
        train.context = test.context = max(train.context, test.context)
    return train, test


def stage(run: Run, config: DpoConfig) -> Stage:
    """DPO as a value; call under `jax.set_mesh`."""
    check_batch(run.mesh, config.batch // config.accumulate, "dpo.batch / dpo.accumulate")
    plain = language_model(run.config.model, run.vocab)
    model = trained(
        lambda lora: language_model(run.config.model, run.vocab, lora=lora),
        lambda: run.start_language("dpo"),
        config.lora,
        run.key("dpo"),
    )
    rows, test = load(run, config)
    loss = preference_loss(model.net, config)
    files = FromData(Batches(single(rows, run.config.seed), config.batch, host_rows(run.mesh, config.batch)), run.mesh)
    mean = config.loss == "ipo" and config.length_normalized
    reference = run.start_language("dpo") if config.lora is None else model.frozen()
    source = WithReference(files, plain, reference, mean)
    evaluate = None
    if test is not None:
        fixed = Batches(ordered(test), config.batch, host_rows(run.mesh, config.batch))
        batches = held_out(fixed, config.eval_batches, run.mesh)
        evaluate = mean_of(loss, [jax.block_until_ready(source.complete(batch)) for batch in batches])
    return Stage(
        name="dpo",
        init=model.first,
        abstract=model.abstract,
        loss=loss,
        source=source,
        tx=adamw(config.optimizer, config.steps),
        schedule=schedule(config.optimizer, config.steps),
        steps=config.steps,
        tokens_per_step=config.batch * rows.responses * rows.context,
        evaluate=evaluate,
        quality=lambda figures: figures["rewards/accuracies"],
        frozen=model.frozen,
        finish=lambda state: model.whole(state.params),
        beside=lambda state: model.beside(state.params),
        notes=(
            *model.notes,
            f"{len(rows):,} rankings, {rows.pairs:,} pairs, {config.steps * config.batch / len(rows):.2f} epochs",
        ),
        close=files.close,
    )
