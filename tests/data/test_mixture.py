"""The global batch is a function of the step: the same for any number of hosts and after any restart."""

import itertools

import grain
import numpy as np
import pytest

from jaxgpt.data.mixture import Batches, describe, mixture, ordered, single
from jaxgpt.data.tokens import Rows, Shard
from jaxgpt.errors import UserError

LLAMA = {"web": 67, "crawl": 15, "code": 4.5, "wiki": 4.5, "books": 4.5, "papers": 2.5, "answers": 2}
CONTEXT = 8


def rows(name, count):
    """A source of one document whose tokens are unlike those of the other sources."""
    number = list(LLAMA).index(name)
    tokens = np.arange(count * CONTEXT + 1) + number * 100_000
    return Rows(Shard(name, tokens, np.array([0]), 0), CONTEXT)


def sources(count=40):
    return {name: rows(name, count + 3 * i) for i, name in enumerate(LLAMA)}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_read_their_parts_of_the_same_batch(hosts):
    draws = mixture(sources(), LLAMA, seed=3)
    whole = Batches(draws, 16)
    held = np.random.default_rng(0).permutation(16).reshape(hosts, -1)  # rows as some TPU's devices lie
    held.sort(axis=1)
    parts = [Batches(draws, 16, rows) for rows in held]
    for step in (0, 1, 17, 1000):
        for part, rows in zip(parts, held, strict=True):
            assert equal(part[step], {key: value[rows] for key, value in whole[step].items()})


def test_iteration_may_start_anywhere():
    batches = Batches(mixture(sources(), LLAMA, seed=3), 8)
    for start in (0, 5, 123):
        iterator = batches.iterate(start)
        for step, batch in enumerate(itertools.islice(iterator, 6), start=start):
            assert equal(batch, batches[step])
        iterator.close()


def test_the_seed_decides_the_order():
    one, again, other = (Batches(mixture(sources(), LLAMA, seed), 32)[0] for seed in (1, 1, 2))
    assert equal(one, again)
    assert not equal(one, other)


def test_batches_are_rows_of_the_sources():
    named = sources()
    batch = Batches(mixture(named, LLAMA, seed=0), 64)[2]
    for at, token in enumerate(batch["tokens"][:, 0]):
        source = named[list(LLAMA)[token // 100_000]]
        assert equal(source[token % 100_000 // CONTEXT], {key: value[at] for key, value in batch.items()})


def test_every_row_comes_once_per_epoch_in_another_order():
    batches = Batches(single(rows("web", 30), seed=0), 10)
    epochs = [np.concatenate([batches[step]["tokens"][:, 0] for step in range(e, e + 3)]) for e in (0, 3, 6)]
    for epoch in epochs:
        assert sorted(epoch) == [CONTEXT * i for i in range(30)]
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_number_of_epochs_has_each_row_once_in_each():
    batches = Batches(single(rows("web", 10), seed=0, epochs=3), 8)
    endless = Batches(single(rows("web", 10), seed=0), 8)
    assert len(batches) == 4
    drawn = np.concatenate([batches[n]["tokens"] for n in range(4)])
    assert not drawn[30:].any()
    for epoch in range(3):
        part = drawn[10 * epoch : 10 * epoch + 10]
        assert len({row.tobytes() for row in part}) == 10
    assert not (drawn[:10] == drawn[10:20]).all()
    assert all((batches[n]["tokens"] == endless[n]["tokens"]).all() for n in range(3))


def test_sources_of_one_length_have_unrelated_orders():
    draws = mixture({"web": rows("web", 50), "code": rows("code", 50)}, {"web": 1, "code": 1}, seed=0)
    firsts = np.array([draws[k]["tokens"][0] for k in range(100)])
    web, code = firsts[firsts < 100_000], firsts[firsts >= 100_000] - 200_000
    assert sorted(web) == sorted(code)
    assert (web == code).mean() < 0.2


def drawn(batches, steps):
    tokens = np.concatenate([batches[step]["tokens"][:, 0] for step in range(steps)])
    return np.bincount(tokens // 100_000, minlength=len(LLAMA))


@pytest.mark.parametrize("scale", [1, 0.01])
@pytest.mark.parametrize("steps", [1, 7, 125])
def test_shares_and_epochs_are_reported_as_drawn(steps, scale):
    named = sources()
    weights = {name: weight * scale for name, weight in LLAMA.items()}
    report = describe(named, weights, steps, 16)
    counts = drawn(Batches(mixture(named, weights, seed=0), 16), steps)
    assert [use.drawn for use in report] == counts.tolist()
    assert [use.epochs for use in report] == [count / len(r) for count, r in zip(counts, named.values(), strict=True)]
    assert [use.tokens for use in report] == [len(r) * CONTEXT + 1 for r in named.values()]
    for use, weight in zip(report, LLAMA.values(), strict=True):
        assert abs(use.drawn - weight / 100 * steps * 16) < 2
    assert sum(use.share for use in report) == pytest.approx(1)


def test_shares_are_exact_over_a_whole_round():
    report = describe(sources(), LLAMA, steps=10, batch=200)
    assert [use.drawn for use in report] == [1340, 300, 90, 90, 90, 50, 40]


def test_ordered_gives_each_row_once_and_fills_with_zeros():
    batches = Batches(ordered(rows("web", 5), rows("code", 6)), 4)
    assert len(batches) == 3
    found = [batches[step] for step in range(3)]
    assert np.concatenate([batch["tokens"][:, 0] for batch in found]).tolist() == [
        *[CONTEXT * i for i in range(5)],
        *[200_000 + CONTEXT * i for i in range(6)],
        0,
    ]
    assert [batch["mask"].sum() for batch in found] == [32, 32, 24]
    halves = [Batches(ordered(rows("web", 5)), 8, range(2 * host, 2 * host + 2)) for host in range(4)]
    assert [half[0]["mask"].sum() for half in halves] == [16, 16, 8, 0]
    assert len(list(batches.iterate())) == 3


def test_any_random_access_rows_serve():
    records = [{"tokens": np.full(3, i, np.int32)} for i in range(10)]
    for source in (records, grain.MapDataset.source(records)):
        batch = Batches(single(source, seed=0), 10)[4]
        assert sorted(batch["tokens"][:, 0]) == list(range(10))
        assert batch["tokens"].shape == (10, 3)


def test_mistakes_are_told():
    with pytest.raises(UserError, match="source rows has no rows"):
        single([], 0)
