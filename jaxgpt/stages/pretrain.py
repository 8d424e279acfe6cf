"""Pretraining: the next token of a weighted mixture of text. Its loss and evaluation are also those of fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import jax

from jaxgpt.config.schema import PretrainConfig
from jaxgpt.data.mixture import Batches, describe, mixture, ordered
from jaxgpt.data.tokens import Rows, Shard
from jaxgpt.errors import UserError
from jaxgpt.losses import Ratio, next_token
from jaxgpt.mesh import check_batch, check_time, host_rows
from jaxgpt.models.heads import language_model
from jaxgpt.models.net import Net, Params
from jaxgpt.optim import adamw, schedule
from jaxgpt.stages.run import FromData, Run, held_out
from jaxgpt.train.loop import Stage
from jaxgpt.train.step import Batch, Loss


def language_loss(net: Net) -> Loss:
    """Mean negative log-likelihood of the batch's unmasked targets, nats per token."""

    def loss(params: Params, batch: Batch) -> tuple[Ratio, dict[str, Ratio]]:
        lm = net.bind(params)
        given = (batch[name] for name in ("tokens", "segments", "positions", "targets"))
        return next_token(lm.logp(*given, batch.get("seeds")), batch["mask"])

    return loss


def mean_of(loss: Loss, batches: Sequence[Mapping[str, jax.Array]]) -> Callable[[Params], dict[str, float]]:
    """An evaluation: every metric of a loss as one mean over fixed batches."""
    measure = jax.jit(lambda params, batch: loss(params, batch)[1])

    def evaluate(params: Params) -> dict[str, float]:
        # one after the other: simulated devices that have two programs to meet in may wait for each other for ever
        parts = [jax.block_until_ready(measure(params, batch)) for batch in batches]
        total = parts[0]
        for part in parts[1:]:
            total = {name: total[name] + part[name] for name in total}
        return {name: float(ratio.mean) for name, ratio in total.items()}

    return evaluate


def lower_nll(figures: dict[str, float]) -> float:
    """Quality of an evaluation by its validation loss."""
    return -figures["nll"]


def sources(run: Run, context: int) -> dict[str, Rows]:
    """The training rows of each source of the mixture."""
    return {name: Rows(Shard.open(run.folder / "tokens" / name, "train"), context) for name in run.config.data.named}


def text_batches(run: Run, context: int, batch: int) -> Batches:
    """Batches of the mixture of text, by step."""
    weights = {name: source.weight for name, source in run.config.data.named.items()}
    return Batches(mixture(sources(run, context), weights, run.config.seed), batch, host_rows(run.mesh, batch))


def stage(run: Run, config: PretrainConfig) -> Stage:
    """Pretraining as a value; call under `jax.set_mesh`."""
    check_batch(run.mesh, config.batch // config.accumulate, "pretrain.batch / pretrain.accumulate")
    check_time(run.mesh, config.context, "pretrain.context")
    net = language_model(run.config.model, run.vocab)
    weights = {name: source.weight for name, source in run.config.data.named.items()}
    evaluate = None
    if run.config.data.val_fraction > 0:
        shards = [Shard.open(run.folder / "tokens" / name, "val") for name in weights]
        rows = [Rows(shard, config.context, partial=True) for shard in shards if len(shard) > 1]
        if not rows:
            raise UserError(
                "there is no held-out text: data.val_split=document holds out whole documents, and each source has "
                "only one; set data.val_split=tail, or data.val_fraction=0 for no validation"
            )
        fixed = Batches(ordered(*rows), config.batch, host_rows(run.mesh, config.batch))
        evaluate = mean_of(language_loss(net), held_out(fixed, config.eval_batches, run.mesh))
    source = FromData(text_batches(run, config.context, config.batch), run.mesh)
    return Stage(
        name="pretrain",
        init=lambda: run.start_language("pretrain"),
        abstract=net.abstract,
        loss=language_loss(net),
        source=source,
        tx=adamw(config.optimizer, config.steps),
        schedule=schedule(config.optimizer, config.steps),
        steps=config.steps,
        tokens_per_step=config.batch * config.context,
        evaluate=evaluate,
        quality=lower_nll,
        notes=tuple(
            f"{use.name}: {use.tokens:,} tokens, {use.share:.1%} of the rows, {use.epochs:.2f} epochs"
            for use in describe(sources(run, config.context), weights, config.steps, config.batch)
        ),
        close=source.close,
    )
