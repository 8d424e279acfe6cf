"""Supervised fine-tuning: the next token of conversations, counted on what the assistant says and its end token."""

from __future__ import annotations

import jax
import numpy as np

from jaxgpt.config.schema import SftConfig
from jaxgpt.data.conversations import PackedConversations, load_conversations
from jaxgpt.data.mixture import Batches, ordered, single
from jaxgpt.mesh import check_batch, check_time, host_rows, put_whole
from jaxgpt.models.heads import language_model
from jaxgpt.optim import adamw, schedule
from jaxgpt.stages.pretrain import language_loss, lower_nll, mean_of
from jaxgpt.stages.run import FromData, Run, held_out
from jaxgpt.stages.trained import trained
from jaxgpt.train.loop import Drawn, Stage
from jaxgpt.train.state import State


class WithSeeds:
    """A source whose batches carry a dropout seed for each row, a function of the run's seed, the step and the row."""

    def __init__(self, source: FromData, rows: int, seed: int, mesh: jax.sharding.Mesh):
        self._source, self._rows, self._seed, self._mesh = source, rows, seed, mesh

    def __call__(self, step: int, state: State) -> Drawn:
        """The batch of a step."""
        drawn = self._source(step, state)
        seeds = np.random.SeedSequence([self._seed, step]).generate_state(self._rows)
        return drawn._replace(batch={**drawn.batch, **put_whole({"seeds": seeds}, self._mesh)})


def load(run: Run, config: SftConfig) -> tuple[PackedConversations, PackedConversations | None]:
    """The training and held-out conversations, packed. Raises UserError naming the record that cannot be used."""
    assert config.data is not None
    data, fields = config.data, (config.data.prompt_field, config.data.completion_field)

    def rows(given: str | tuple[str, ...]) -> PackedConversations:
        examples = load_conversations(run.paths(given), run.tokenizer, config.context, *fields)
        return PackedConversations(examples, config.context)

    return rows(data.path), None if data.eval_path is None else rows(data.eval_path)


def stage(run: Run, config: SftConfig) -> Stage:
    """Supervised fine-tuning as a value; call under `jax.set_mesh`."""
    check_batch(run.mesh, config.batch // config.accumulate, "sft.batch / sft.accumulate")
    check_time(run.mesh, config.context, "sft.context")
    c = run.config.model
    model = trained(
        lambda lora: language_model(c, run.vocab, config.dropout, lora),
        lambda: run.start_language("sft"),
        config.lora,
        run.key("sft"),
    )
    rows, test = load(run, config)
    source = FromData(Batches(single(rows, run.config.seed), config.batch, host_rows(run.mesh, config.batch)), run.mesh)
    evaluate = None
    if test is not None:
        still = language_model(c, run.vocab, lora=config.lora)  # without dropout
        fixed = Batches(ordered(test), config.batch, host_rows(run.mesh, config.batch))
        evaluate = mean_of(language_loss(still), held_out(fixed, config.eval_batches, run.mesh))
    notes = [*model.notes, f"{rows.count:,} conversations in {len(rows):,} rows, {rows.efficiency:.1%} filled"]
    if rows.cut:
        notes.append(f"{rows.cut:,} of them are longer than sft.context={config.context} and lose their end")
    return Stage(
        name="sft",
        init=model.first,
        abstract=model.abstract,
        loss=language_loss(model.net),
        source=source if config.dropout == 0.0 else WithSeeds(source, config.batch, run.config.seed, run.mesh),
        tx=adamw(config.optimizer, config.steps),
        schedule=schedule(config.optimizer, config.steps),
        steps=config.steps,
        tokens_per_step=config.batch * config.context,
        evaluate=evaluate,
        quality=lower_nll,
        frozen=model.frozen,
        finish=lambda state: model.whole(state.params),
        beside=lambda state: model.beside(state.params),
        notes=tuple(notes),
        close=source.close,
    )
