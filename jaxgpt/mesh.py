"""The device mesh: four named axes that always exist, so that no other code asks how many devices there are.

`data` and `fsdp` split the batch, `context` splits the sequence, `fsdp` and `context` also split parameters at rest,
`tensor` splits heads, feed-forward width and vocabulary. Axis types are Explicit: every array's sharding is part of its
type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import P
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding

from jaxgpt.config.schema import MeshConfig, ModelConfig
from jaxgpt.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
Axes = tuple[str, ...]
LAYOUT: Mapping[str, Axes] = {
    "rows": ("data", "fsdp"),
    "time": ("context",),  # in attention, feed-forward and head
    "stream": ("context", "tensor"),  # the time of the residual stream, between sub-layers
    "width": ("fsdp", "context"),  # of parameters at rest; joined where they are used
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "hidden": ("tensor",),
    "vocab": ("tensor",),
}
"""The mesh axes that split each dimension, of activations (the first three) and of parameters."""
BATCH = LAYOUT["rows"]
"""The mesh axes that the batch dimension is split over."""
TIME = LAYOUT["time"]


def spec_axes(x: jax.Array, dimension: int) -> Axes:
    """The mesh axes that split a dimension of an array."""
    axes = jax.typeof(x).sharding.spec[dimension]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def axis_size(*axes: str) -> int:
    """Along how many devices the axes of the mesh in use go."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def platform() -> str:
    """What the mesh in use is made of: cpu, gpu or tpu. Not always what this machine has: a program can be compiled
    for another."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, int, int, int]:
    """Sizes of (data, fsdp, context, tensor) on that many devices.

    Raises UserError where the axes ask for more devices than there are, or auto leaves a remainder.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != "auto")
    asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
    if fixed > devices:
        raise UserError(
            f"{asked}: {fixed} devices are asked for, and there are {devices}; lower an axis, or set one to auto and "
            "the others to 1"
        )
    if "auto" in sizes.values() and devices % fixed:
        good = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise UserError(f"{asked}: {devices} devices do not divide by {fixed}; the fixed axes may multiply to {good}")
    data, fsdp, context, tensor = (devices // fixed if size == "auto" else size for size in sizes.values())
    return data, fsdp, context, tensor


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The mesh over all (or, with fixed sizes, the first) of the devices, by default this run's.

    Where these are slices of a TPU that a slower network joins, `data` goes across slices and nothing else does.
    Raises UserError where `data` cannot.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(config, len(devices))
    used = list(devices)[: math.prod(shape)]
    slices = len({getattr(device, "slice_index", 0) for device in used})
    if slices == 1:
        try:
            return jax.make_mesh(shape, AXES, devices=used)
        except NotImplementedError as error:
            laid = ", ".join(f"mesh.{axis}={size}" for axis, size in zip(AXES, shape, strict=True))
            raise UserError(
                f"{laid}: cannot be laid on the torus of these {len(used)} TPU chips, where each axis takes whole "
                "dimensions; jaxgpt plan lists the meshes that can"
            ) from error
    if shape[0] % slices:
        raise UserError(
            f"mesh.data={shape[0]}: the devices are {slices} slices, and data alone goes from one to another; use a "
            f"multiple of {slices}"
        )
    inside, across = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
    laid = mesh_utils.create_hybrid_device_mesh(inside, across, used)
    return jax.sharding.Mesh(laid, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def check_batch(mesh: jax.sharding.Mesh, rows: int, name: str) -> None:
    """Raises UserError where the batch axes do not divide `rows`; `name` is the setting to mend."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        near = sorted({max(1, rows // ways) * ways, -(-rows // ways) * ways})
        raise UserError(
            f"{name}: {rows} rows do not divide over {ways} devices "
            f"(mesh.data={mesh.shape['data']} x mesh.fsdp={mesh.shape['fsdp']}); use {' or '.join(map(str, near))}"
        )


def check_time(mesh: jax.sharding.Mesh, tokens: int, name: str) -> None:
    """Raises UserError where sequences of `tokens` cannot be cut into two pieces a device along the context axis."""
    ways = 2 * mesh.shape["context"]
    if ways > 2 and tokens % ways:
        near = sorted({max(1, tokens // ways) * ways, -(-tokens // ways) * ways})
        raise UserError(
            f"{name}: {tokens} tokens do not divide into the {ways} pieces of mesh.context={mesh.shape['context']} "
            f"(two for each device); use {' or '.join(map(str, near))}"
        )


def check_model(mesh: jax.sharding.Mesh, model: ModelConfig, vocab: int) -> None:
    """Raises UserError naming every dimension of the model that the mesh does not divide, with values that would."""
    tensor = mesh.shape["tensor"]
    kv_ways = 1 if model.kv_heads == 1 else tensor
    wanted = [
        ("model.width", model.width, "mesh.fsdp x mesh.context", mesh.shape["fsdp"] * mesh.shape["context"]),
        ("model.attention.heads", model.attention.heads, "mesh.tensor", tensor),
        ("model.attention.kv_heads", model.kv_heads, "mesh.tensor", kv_ways),
        ("model.mlp.width", model.hidden, "mesh.tensor", tensor),
        ("model.vocab", vocab, "mesh.tensor", tensor),
    ]
    problems = [
        f"{name} is {size}, which {axes}={ways} does not divide; use a multiple of {ways} (such as "
        f"{-(-size // ways) * ways}) or {axes} of {', '.join(str(d) for d in _divisors(size) if d <= ways)}"
        for name, size, axes, ways in wanted
        if size % ways
    ]
    if problems:
        raise UserError("\n".join(problems))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def gather(weight: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The weight with the shards of its width joined, cast first; the transpose reduce-scatters its gradient."""
    weight = weight if dtype is None else weight.astype(dtype)
    kept = (tuple(a for a in spec_axes(weight, i) if a not in LAYOUT["width"]) or None for i in range(weight.ndim))
    return jax.sharding.reshard(weight, P(*kept))


def batch_spec(ndim: int) -> P:
    """The sharding of an array whose first dimension is the batch."""
    return P(BATCH, *(None,) * (ndim - 1))


def host_rows(mesh: jax.sharding.Mesh, rows: int) -> np.ndarray:
    """Which rows of a batch of so many this host's devices hold, ascending: all of them where there is one host."""
    held = NamedSharding(mesh, batch_spec(1)).addressable_devices_indices_map((rows,))
    parts = {index[0].indices(rows) for index in held.values()}
    return np.concatenate([np.arange(*part) for part in sorted(parts)])


def put_batch(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch (`host_rows`), as arrays over all devices."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    here = host_rows(mesh, ways)

    def put(rows: np.ndarray) -> jax.Array:
        sharding, size = NamedSharding(mesh, batch_spec(rows.ndim)), len(rows) // len(here)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            first = int(np.searchsorted(here, (index[0].start or 0) // size)) * size
            return rows[first : first + size]

        return jax.make_array_from_callback((size * ways, *rows.shape[1:]), sharding, part)

    if jax.process_count() == 1:
        return {key: jax.device_put(rows, NamedSharding(mesh, batch_spec(rows.ndim))) for key, rows in batch.items()}
    return {key: put(rows) for key, rows in batch.items()}


def put_whole(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """A batch that every host has whole, as arrays over all devices."""
    return put_batch({key: rows[host_rows(mesh, len(rows))] for key, rows in batch.items()}, mesh)


def fetch(tree: Any) -> Any:
    """Arrays over all devices, whole and as NumPy on every host; to be called by all. Waits for them."""

    def whole(x: jax.Array) -> np.ndarray:
        here = x.is_fully_addressable or x.is_fully_replicated
        return np.asarray(x if here else multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def local_rows(x: jax.Array) -> np.ndarray:
    """This host's rows of an array whose first dimension is the batch: what `put_batch` was given. Waits for it."""
    parts = {shard.index[0].start or 0: shard.data for shard in x.addressable_shards}
    return np.concatenate([np.asarray(parts[first]) for first in sorted(parts)])
