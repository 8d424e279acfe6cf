"""Axis sizes, what does not divide, and how arrays lie on the mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.errors import UserError
from jaxgpt.mesh import AXES, BATCH, batch_spec, check_batch, check_model, gather, make_mesh, mesh_shape, put_batch


def config(data, fsdp, tensor, context=1) -> MeshConfig:
    return MeshConfig(data=data, fsdp=fsdp, context=context, tensor=tensor)


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((1, "auto", 1), 1, (1, 1, 1, 1)),
        ((1, "auto", 1), 8, (1, 8, 1, 1)),
        (("auto", 2, 2), 8, (2, 2, 1, 2)),
        ((2, 1, "auto"), 6, (2, 1, 1, 3)),
        ((2, "auto", 4), 8, (2, 1, 1, 4)),
        ((1, 1, 2, "auto"), 8, (1, 1, 4, 2)),
        ((1, "auto", 2, 2), 8, (1, 2, 2, 2)),
        ((1, 1, 1), 8, (1, 1, 1, 1)),
        ((3, 2, 1), 8, (3, 2, 1, 1)),
    ],
)
def test_auto_takes_the_devices_that_are_left(sizes, devices, shape):
    assert mesh_shape(config(*sizes), devices) == shape


def test_too_many_devices_asked_for():
    with pytest.raises(UserError) as error:
        mesh_shape(config(2, 3, 2), 8)
    assert str(error.value) == (
        "mesh.data=2, mesh.fsdp=3, mesh.context=1, mesh.tensor=2: 12 devices are asked for, and there are 8; "
        "lower an axis, or set one to auto and the others to 1"
    )
    with pytest.raises(UserError, match="16 devices are asked for, and there are 8"):
        mesh_shape(config(4, "auto", 4), 8)


def test_auto_leaves_no_remainder():
    with pytest.raises(UserError) as error:
        mesh_shape(config("auto", 3, 1), 8)
    assert str(error.value) == (
        "mesh.data=auto, mesh.fsdp=3, mesh.context=1, mesh.tensor=1: 8 devices do not divide by 3; the fixed "
        "axes may multiply to 1, 2, 4, 8"
    )


def test_a_mesh_has_all_axes_explicit_and_may_use_fewer_devices():
    mesh = make_mesh(config(1, 2, 1))
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Explicit,) * 4
    assert list(mesh.devices.flat) == jax.devices()[:2]


def test_a_batch_that_does_not_divide_is_told_with_sizes_that_do(mesh222):
    check_batch(mesh222, 8, "sft.batch")
    with pytest.raises(UserError) as error:
        check_batch(mesh222, 6, "sft.batch")
    assert str(error.value) == (
        "sft.batch: 6 rows do not divide over 4 devices (mesh.data=2 x mesh.fsdp=2); use 4 or 8"
    )
    with pytest.raises(UserError, match=r"use 4$"):
        check_batch(mesh222, 3, "sft.batch")


def test_every_dimension_that_does_not_divide_is_told_at_once():
    mesh = make_mesh(config(1, 2, 4))
    check_model(mesh, ModelConfig(width=64, attention={"heads": 8, "kv_heads": 4}), vocab=128)
    bad = ModelConfig(width=27, attention={"heads": 6, "kv_heads": 2, "head_dim": 4}, mlp={"width": 30})
    with pytest.raises(UserError) as error:
        check_model(mesh, bad, vocab=101)
    assert str(error.value).split("\n") == [
        "model.width is 27, which mesh.fsdp x mesh.context=2 does not divide; use a multiple of 2 (such as 28) or "
        "mesh.fsdp x mesh.context of 1",
        "model.attention.heads is 6, which mesh.tensor=4 does not divide; use a multiple of 4 (such as 8) or "
        "mesh.tensor of 1, 2, 3",
        "model.attention.kv_heads is 2, which mesh.tensor=4 does not divide; use a multiple of 4 (such as 4) or "
        "mesh.tensor of 1, 2",
        "model.mlp.width is 30, which mesh.tensor=4 does not divide; use a multiple of 4 (such as 32) or "
        "mesh.tensor of 1, 2, 3",
        "model.vocab is 101, which mesh.tensor=4 does not divide; use a multiple of 4 (such as 104) or "
        "mesh.tensor of 1",
    ]


def test_one_key_head_is_shared_by_all_tensor_devices():
    check_model(make_mesh(config(1, 1, 8)), ModelConfig(attention={"heads": 8, "kv_heads": 1}), vocab=128)


def test_gather_joins_fsdp_alone_and_casts(mesh222):
    weight = np.arange(32, dtype=np.float32).reshape(4, 8)
    with jax.set_mesh(mesh222):
        sharded = jax.device_put(weight, NamedSharding(mesh222, P("fsdp", "tensor")))
        joined = jax.jit(gather, static_argnums=1)(sharded, jnp.bfloat16)
    assert joined.sharding.spec == P(None, "tensor")
    assert joined.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(joined, np.float32), weight)


def test_the_gradient_of_gather_is_shards_of_the_sum_over_rows(mesh222):
    weight, x = np.ones((4, 6), np.float32), np.arange(32, dtype=np.float32).reshape(8, 4)
    with jax.set_mesh(mesh222):
        sharded = jax.device_put(weight, NamedSharding(mesh222, P("fsdp", "tensor")))
        rows = put_batch({"x": x}, mesh222)["x"]
        gradient = jax.jit(jax.grad(lambda w: jnp.sum(rows @ gather(w))))(sharded)
    assert gradient.sharding.spec == P("fsdp", "tensor")
    np.testing.assert_array_equal(gradient, np.repeat(x.sum(0)[:, None], 6, axis=1))


def test_rows_lie_over_data_and_fsdp(mesh222):
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(4, 3, 2), "seeds": np.arange(4, dtype=np.uint32)}
    placed = put_batch(batch, mesh222)
    assert placed["tokens"].sharding.spec == P(BATCH, None, None) == batch_spec(3)
    assert placed["seeds"].sharding.spec == P(BATCH)
    assert placed["seeds"].dtype == np.uint32
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)
        assert {shard.data.shape[0] for shard in placed[name].addressable_shards} == {1}
