"""Supervised fine-tuning: the next token of conversations, counted on what the assistant says and its end token."""

from __future__ import annotations

import jax
import numpy as np

from jaxgpt.config.schema import SftConfig
from jaxgpt.data.conversations import PackedConversations, load_conversations
from jaxgpt.data.mixture import Batches, ordered, single
from jaxgpt.errors import UserError
from jaxgpt.mesh import check_batch
from jaxgpt.models.heads import language_model
from jaxgpt.optim import adamw, schedule
from jaxgpt.stages.pretrain import check_context, language_loss, lower_nll, mean_of
from jaxgpt.stages.run import RANDOM, FromData, Run, held_out
from jaxgpt.train.loop import Drawn, Stage
from jaxgpt.train.state import State


class WithSeeds:
    """A source whose batches carry a dropout seed for each row, a function of the run's seed, the step and the row."""

    def __init__(self, source: FromData, rows: int, seed: int, mesh: jax.sharding.Mesh):
        self._source, self._rows, self._seed, self._mesh = source, rows, seed, mesh

    def __call__(self, step: int, state: State) -> Drawn:
        """The batch of a step."""
        drawn = self._source(step, state)
        first = jax.process_index() * self._rows // jax.process_count()
        rows = step * self._rows + first + np.arange(self._rows // jax.process_count(), dtype=np.uint64)
        seeds = ((rows + np.uint64(self._seed)) * np.uint64(0x9E3779B1) & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        spread = jax.make_array_from_process_local_data(
            jax.sharding.NamedSharding(self._mesh, jax.P(("data", "fsdp"))), seeds
        )
        return drawn._replace(batch={**drawn.batch, "seeds": spread})


def stage(run: Run, config: SftConfig) -> Stage:
    """Supervised fine-tuning as a value; call under `jax.set_mesh`."""
    if config.data is None:
        raise UserError("sft.data.path is not set: a JSONL file of conversations")
    check_batch(run.mesh, config.batch // config.accumulate, "sft.batch / sft.accumulate")
    check_context(run, config.context, "sft.context")
    net = language_model(run.config.model, run.vocab, config.dropout)
    hosts = (jax.process_index(), jax.process_count())

    def rows(given: str | tuple[str, ...]) -> PackedConversations:
        fields = (config.data.prompt_field, config.data.completion_field)
        return PackedConversations(
            load_conversations(run.paths(given), run.tokenizer, config.context, *fields), config.context
        )

    batches = Batches(single(rows(config.data.path), run.config.seed), config.batch, hosts)
    source = FromData(batches, run.mesh)
    evaluate = None
    if config.data.eval_path is not None:
        fixed = Batches(ordered(rows(config.data.eval_path)), config.batch, hosts)
        plain = language_model(run.config.model, run.vocab)
        evaluate = mean_of(language_loss(plain), held_out(fixed, config.eval_batches, run.mesh))
    init = config.init or ("pretrain" if run.config.pretrain is not None else RANDOM)
    key = run.key("sft")
    return Stage(
        name="sft",
        init=(lambda: jax.jit(net.init)(key)) if init == RANDOM else (lambda: run.load_language(init)),
        abstract=net.abstract,
        loss=language_loss(net),
        source=source if config.dropout == 0.0 else WithSeeds(source, config.batch, run.config.seed, run.mesh),
        tx=adamw(config.optimizer, config.steps),
        schedule=schedule(config.optimizer, config.steps),
        steps=config.steps,
        tokens_per_step=config.batch * config.context,
        evaluate=evaluate,
        quality=lower_nll,
    )
