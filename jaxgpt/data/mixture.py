"""The order in which training draws rows, and batches as a pure function of the step.

grain decides the order (its shuffle, anew in each epoch, and its mixing rule) over row numbers alone; rows are then
gathered many at a time. A host reads its own rows of each global batch, so the run does not depend on their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np

from jaxgpt.data.tokens import Rows
from jaxgpt.errors import UserError

Batch = dict[str, np.ndarray]

_BUFFER = 4  # batches read ahead
_ENDLESS = 1 << 40  # steps


class RowSource(Protocol):
    """Random access to rows; one with `gather(indices) -> Batch` gives many at once faster."""

    def __len__(self) -> int:
        """Number of rows."""
        ...

    def __getitem__(self, row: int) -> Batch:
        """One row: arrays by name, of the same shapes in every row."""
        ...


class Draws:
    """Rows in the order they are drawn: draw k is row `order[k]` of the sources laid end to end."""

    def __init__(self, sources: list[RowSource], order: grain.MapDataset):
        self.order = order
        self._sources = sources
        self._begins = np.cumsum([0, *(len(source) for source in sources)])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, draw: int) -> Batch:
        return {key: value[0] for key, value in self.gather(range(draw, draw + 1)).items()}

    def gather(self, draws: Sequence[int]) -> Batch:
        """The rows of these draws, ascending, stacked; draws beyond the end are rows of zeros, which no loss counts."""
        known = [int(self.order[draw]) for draw in draws if draw < len(self)]
        rows = np.array(known or [0], np.int64)
        source = np.searchsorted(self._begins, rows, side="right") - 1
        batch: Batch = {}
        for number in np.unique(source):
            where = np.flatnonzero(source == number)
            part = _gather(self._sources[number], rows[where] - self._begins[number])
            for key, value in part.items():
                if key not in batch:
                    batch[key] = np.zeros((len(draws), *value.shape[1:]), value.dtype)
                batch[key][where] = value
        if not known:
            return {key: np.zeros_like(value) for key, value in batch.items()}
        return batch


def mixture(sources: Mapping[str, RowSource], weights: Mapping[str, float], seed: int) -> Draws:
    """Endless draws from weighted sources: each row of a source once per epoch, shares held at every point of the run.

    Weights count to a hundredth of the smallest; `describe` tells the shares that come of them.
    """
    parts: list[grain.MapDataset] = []
    begin = 0
    for name, rows in sources.items():
        if not len(rows):
            raise UserError(f"source {name} has no rows")
        numbers = grain.MapDataset.range(begin, begin + len(rows))
        parts.append(numbers.seed(_seed(seed, name)).shuffle().repeat())
        begin += len(rows)
    order = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, _proportions(sources, weights))
    return Draws(list(sources.values()), order)


def single(rows: RowSource, seed: int, epochs: int | None = None) -> Draws:
    """Draws from one source, shuffled anew in each epoch, which has each row once; endless where `epochs` is None."""
    draws = mixture({"rows": rows}, {"rows": 1.0}, seed)
    return draws if epochs is None else Draws([rows], draws.order[: epochs * len(rows)])


def ordered(*sources: RowSource) -> Draws:
    """Each row once, in order, for evaluation; the last batch is filled with rows of zeros."""
    return Draws(list(sources), grain.MapDataset.range(sum(map(len, sources))))


class Batches:
    """`batches[step]` is this host's rows of the global batch of a step: pure, and the same for any number of hosts."""

    def __init__(self, draws: Draws, batch: int, rows: Sequence[int] | np.ndarray | None = None):
        """`rows` of the global batch are this host's, ascending; all of them where None."""
        self.draws = draws
        self.batch = batch
        self._rows = range(batch) if rows is None else [int(row) for row in rows]

    def __len__(self) -> int:
        return -(-len(self.draws) // self.batch)

    def __getitem__(self, step: int) -> Batch:
        return self.draws.gather([step * self.batch + row for row in self._rows])

    def iterate(self, start: int = 0) -> Iterator[Batch]:
        """Batches from step `start` on, read ahead by a thread of grain's; the iterator has `close()`."""
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BUFFER)
        return iter(grain.MapDataset.source(_From(self, start)).to_iter_dataset(options))


class _From:
    """Batches counted from a step."""

    def __init__(self, batches: Batches, start: int):
        self._batches = batches
        self._start = start

    def __len__(self) -> int:
        return max(min(len(self._batches), _ENDLESS) - self._start, 0)

    def __getitem__(self, step: int) -> Batch:
        return self._batches[self._start + step]

    def __repr__(self) -> str:
        return f"batches from step {self._start}"


@dataclass(frozen=True)
class SourceUse:
    """What a run makes of one source."""

    name: str
    tokens: int
    """Tokens in the source."""
    share: float
    """Share of the run's rows, as drawn."""
    drawn: int
    """Rows drawn in the run."""
    epochs: float
    """Passes over the source's rows at the end of the run."""


def describe(sources: Mapping[str, Rows], weights: Mapping[str, float], steps: int, batch: int) -> list[SourceUse]:
    """Exact use of every source after `steps` global batches, by the rule of the mixture itself."""
    left = total = steps * batch
    proportions = _proportions(sources, weights)
    remaining = sum(proportions)
    report = []
    for (name, rows), proportion in zip(sources.items(), proportions, strict=True):
        others = left * (remaining - proportion) // remaining
        drawn = left - others
        share = drawn / total if total else proportion / sum(proportions)
        report.append(SourceUse(name, len(rows.shard), share, drawn, drawn / len(rows)))
        left, remaining = others, remaining - proportion
    return report


def _proportions(sources: Mapping[str, RowSource], weights: Mapping[str, float]) -> list[int]:
    """Whole numbers with smallest 100, which grain takes unchanged (it truncates others: 0.045 / 0.02 becomes 2.24)."""
    least = min(weights[name] for name in sources)
    return [round(100 * weights[name] / least) for name in sources]


def _gather(source: RowSource, rows: np.ndarray) -> Batch:
    gather = getattr(source, "gather", None)
    if gather is not None:
        return gather(rows)
    found = [source[int(row)] for row in rows]
    return {key: np.stack([row[key] for row in found]) for key in found[0]}


def _seed(seed: int, name: str) -> int:
    """Unrelated shuffles for sources whose seeds would differ by a few: grain adds the epoch to the seed."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
