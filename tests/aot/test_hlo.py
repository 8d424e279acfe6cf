"""Counts and sizes of exchanges, read from programs whose exchanges are known."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import P
from jax.sharding import NamedSharding

from jaxgpt.aot.hlo import Collective, collectives, computations, largest, runs
from jaxgpt.mesh import AXES

SIZES = dict(zip(AXES, (1, 2, 2, 2), strict=True))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(tuple(SIZES.values()), AXES)


def compiled(mesh: jax.sharding.Mesh, local, spec: P, out: P, shape: tuple[int, ...] = (8, 64)) -> str:
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        function = jax.jit(lambda x: jax.shard_map(local, in_specs=spec, out_specs=out)(x))
        return function.lower(x).compile().as_text()


@pytest.mark.parametrize("axes", [("fsdp",), ("context",), ("tensor",), ("fsdp", "context")], ids=str)
def test_a_gather_is_counted_by_the_axes_it_goes_along(mesh, axes):
    text = compiled(mesh, lambda x: jnp.sin(jax.lax.all_gather(x, axes, axis=0, tiled=True)), P(axes), P(axes))
    assert collectives(text, SIZES) == [Collective("all-gather", axes, 1, 8 * 64 * 4)]


def test_what_stands_in_a_loop_counts_as_often_as_it_runs(mesh):
    def local(x):
        def body(x, _):
            def inner(x, _):
                return jnp.sin(jax.lax.pcast(jax.lax.psum(x, "tensor"), "tensor", to="varying")), None

            return jax.lax.scan(inner, x, length=3)[0], None

        return jax.lax.scan(body, x, length=5)[0]

    found = collectives(compiled(mesh, local, P("tensor"), P("tensor")), SIZES)
    assert found == [Collective("all-reduce", ("tensor",), 15, 15 * 4 * 64 * 4)]


def test_a_scattered_sum_is_as_large_as_what_goes_into_it(mesh):
    def local(x):
        return jax.lax.psum_scatter(x, "context", scatter_dimension=1, tiled=True)

    text = compiled(mesh, local, P("context"), P(None, "context"))
    found = collectives(text, SIZES)
    assert [(one.axes, one.count) for one in found] == [(("context",), 1)]
    assert found[0].bytes == 4 * 64 * 4


def test_groups_are_read_in_every_form_that_xla_writes():
    line = "  %x.1 = f32[4]{0} all-gather(%p), channel_id=1, replica_groups=GROUPS, dimensions={0}\n"
    program = "ENTRY %main (p: f32[2]) -> f32[4] {\n" + line + "}\n"
    forms = {
        "{{0,1},{2,3},{4,5},{6,7}}": ("tensor",),
        "[4,2]<=[8]": ("tensor",),
        "[4,2]<=[2,2,2]T(0,2,1)": ("context",),
        "[2,4]<=[8]": ("context", "tensor"),
        "mesh['a'=2,'b'=4] {'a'}": ("fsdp",),
        "mesh['a'=2,'b'=2,'c'=2] {'a','c'}": ("fsdp", "tensor"),
        "something_new": ("?",),
    }
    for form, axes in forms.items():
        assert collectives(program.replace("GROUPS", form), SIZES) == [Collective("all-gather", axes, 1, 16)]


def test_parts_of_one_exchange_count_once_and_text_between_slices_is_told_apart():
    program = """
%part (p: f32[2]) -> f32[4] {
  ROOT %a.1 = f32[4]{0} all-gather(%p), channel_id=7, replica_groups={{0,1}}
}

ENTRY %main (p: f32[2]) -> f32[4] {
  %a.2 = f32[4]{0} fusion(%p), kind=kCustom, calls=%part
  %k.1 = f32[4]{0} custom-call(%p), custom_call_target="tpu_custom_call", frontend_attributes={x={
}}, metadata={op_name="kernel"}
  %s.1 = (f32[3]{0}, u32[], token[]) send(%p, %t), channel_id=9, frontend_attributes={h="xla_megascale_runtime"}
  %s.2 = (f32[3]{0}, u32[], token[]) send(%p, %t), channel_id=10
  ROOT %a.3 = f32[4]{0} all-gather(%p), channel_id=7, replica_groups={{0,1}}
}
"""
    assert set(computations(program)) == {"part", "ENTRY"} and runs(computations(program)) == {"ENTRY": 1, "part": 1}
    assert collectives(program, SIZES) == [
        Collective("all-gather", ("tensor",), 1, 16),
        Collective("send", ("data",), 1, 16),
    ]


def test_the_largest_buffer_is_one_that_the_program_makes(mesh):
    def local(x):
        table = jnp.outer(jnp.arange(512.0), jnp.sum(x, axis=0))  # [512, 64]
        return x + jnp.sort(table, axis=0)[:1]

    text = compiled(mesh, local, P(None, None), P(None, None))
    assert largest(text)[0] == (512 * 64 * 4, "f32[512,64]")
