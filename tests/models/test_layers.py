"""Dropout, whose mask is the row's own, and norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformer_reference as reference
from jax import P
from jax.sharding import NamedSharding
from tiny_models import VOCAB, assert_close, drawn, exact, mesh_of, place, rows, tiny

from jaxgpt.mesh import BATCH, TIME, batch_spec
from jaxgpt.models.heads import language_model
from jaxgpt.models.layers import Dropout, dropout, scales

CONFIG = tiny(layers=4, attention={"windows": (None, 3)})  # two layers in one turn of the scan


def dropped(seeds, site: int, rate: float, shape=(8, 50, 40), mesh_shape=(2, 2, 2), slots=None) -> np.ndarray:
    """Dropout of ones."""
    mesh, slots = mesh_of(*mesh_shape), np.arange(shape[1], dtype=np.int32) if slots is None else slots

    def drop(ones, seeds):
        return dropout(ones, Dropout(rate, seeds, slots), jnp.int32(site))

    with jax.set_mesh(mesh):
        ones = jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, P(BATCH, TIME, None)))
        seeds = jax.device_put(np.asarray(seeds, np.uint32), NamedSharding(mesh, batch_spec(1)))
        return np.asarray(jax.jit(drop)(ones, seeds))


SEEDS = [7, 0, 3, 2**32 - 1, 7, 5, 6, 8]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_the_rate_is_the_share_of_zeros_and_the_mean_stays(rate):
    y = dropped(SEEDS, 0, rate)
    error = 4 * (rate * (1 - rate) / y[1:].size) ** 0.5
    assert np.mean(y == 0.0) == pytest.approx(rate, abs=error)
    np.testing.assert_allclose(np.unique(y), [0.0, 1 / (1 - rate)], rtol=1e-6)


def test_the_mask_is_the_row_seeds_the_places_and_the_sites_alone():
    y = dropped(SEEDS, 0, 0.5)
    np.testing.assert_array_equal(y[0], y[4])  # one seed, one mask
    assert len({row.tobytes() for row in y}) == 7
    np.testing.assert_array_equal(y[::-1], dropped(SEEDS[::-1], 0, 0.5))
    np.testing.assert_array_equal(y[:3], dropped(SEEDS[:3], 0, 0.5, (3, 50, 40), (1, 1, 1)))
    order = np.random.default_rng(0).permutation(50).astype(np.int32)
    np.testing.assert_array_equal(y[:, order], dropped(SEEDS, 0, 0.5, mesh_shape=(2, 1, 2, 2), slots=order))
    other = dropped(SEEDS, 1, 0.5)
    assert np.mean((y == 0.0) & (other == 0.0)) == pytest.approx(0.25, abs=0.02)


@pytest.fixture(scope="module")
def batch():
    return rows(8, 8) | {"seeds": np.arange(8, dtype=np.uint32)}


def hidden(batch, rate: float, *mesh_shape: int) -> np.ndarray:
    mesh = mesh_of(*mesh_shape)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("strict"):
        net = language_model(CONFIG, VOCAB, dropout=rate)
        run = jax.jit(lambda params, batch: net.bind(params).hidden(*batch))
        return np.asarray(run(drawn(net, mesh), place(batch, mesh)))


@pytest.fixture(scope="module")
def with_dropout(batch):
    return hidden(batch, 0.3)


def test_dropout_is_on_the_embedding_and_on_what_enters_the_residual_stream(batch, with_dropout):
    mesh = mesh_of()
    with jax.set_mesh(mesh):
        params = exact(drawn(language_model(CONFIG, VOCAB), mesh))
    for row in range(2):

        def drop(y: np.ndarray, site: int, row: int = row) -> np.ndarray:
            key = jax.random.fold_in(jax.random.key(int(batch["seeds"][row])), site)
            keys = (jax.random.fold_in(key, slot) for slot in range(len(y)))
            return y * np.stack([jax.random.bernoulli(one, 0.7, y.shape[1:]) for one in keys]) / 0.7

        inputs = (batch[key][row] for key in ("tokens", "segments", "positions"))
        assert_close(with_dropout[row], reference.hidden(CONFIG, params["backbone"], *inputs, drop=drop))


def test_a_model_drops_the_same_however_the_batch_is_cut(batch, with_dropout):
    halves = [hidden({key: value[part] for key, value in batch.items()}, 0.3) for part in (slice(0, 4), slice(4, 8))]
    assert_close(np.concatenate(halves), with_dropout)


def test_a_model_drops_the_same_on_every_mesh(batch, with_dropout):
    assert_close(hidden(batch, 0.3, 2, 2, 2), with_dropout)
    assert_close(hidden(batch, 0.3, 1, 2, 2, 2), with_dropout)


def test_without_seeds_or_without_rate_the_program_has_no_dropout(batch):
    def program(rate: float, batch) -> str:
        mesh = mesh_of()
        with jax.set_mesh(mesh):
            net = language_model(CONFIG, VOCAB, dropout=rate)
            run = jax.make_jaxpr(lambda params, *batch: net.bind(params).hidden(*batch))
            return str(run(net.abstract, *place(batch, mesh)))

    without_seeds = {key: value for key, value in batch.items() if key != "seeds"}
    assert program(0.3, without_seeds) == program(0.0, without_seeds)
    assert "random" in program(0.3, batch)
    assert "random" not in program(0.0, batch)


def test_norms_are_computed_in_float32():
    x = jnp.asarray([[300.0, 301.0, 1e-3]], jnp.bfloat16)
    y = scales(x, None, 1e-6)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), wide / np.sqrt((wide**2).mean() + 1e-6), rtol=2**-8)


def deviations(**changes) -> dict[str, float]:
    """Standard deviation of each initial matrix of a small model."""
    sizes = {"width": 64, "attention": {"heads": 4, "kv_heads": 1, "head_dim": 32}, "mlp": {"width": 160}}
    c = tiny(**sizes, tied=False, positions={"type": "learned"}, context=64, **changes)
    with jax.set_mesh(mesh_of()):
        params = jax.jit(language_model(c, 512).init)(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = (jax.tree_util.keystr(path[-1:], simple=True) for path, _ in leaves)
    return {name: float(np.std(leaf)) for name, (_, leaf) in zip(names, leaves, strict=True) if leaf.ndim > 1}


def test_initial_matrices_have_one_deviation_less_where_they_write_to_the_residual_stream():
    found = deviations(init_std=0.05)
    expected = dict.fromkeys(found, 0.05) | {"o_HKD": 0.025, "down_FD": 0.025, "scale_D": 0.0}
    assert found == pytest.approx(expected, rel=0.05)


def test_fan_in_is_one_over_the_root_of_each_matrix_inputs_and_embeddings_have_their_own():
    found = deviations(init_std="fan_in")
    inputs = {"o_HKD": 4 * 32, "down_FD": 160, "embed_VD": 1, "positions_TD": 1}
    expected = {name: inputs.get(name, 64) ** -0.5 for name in found} | {"scale_D": 0.0}
    assert found == pytest.approx(expected, rel=0.05)
    assert deviations(init_std="fan_in", embedding_std=0.3)["embed_VD"] == pytest.approx(0.3, rel=0.05)
