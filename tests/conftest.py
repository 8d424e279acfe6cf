"""Eight fake CPU devices for every test: set before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest


@pytest.fixture(scope="session")
def mesh222():
    """Two devices along each of data, fsdp and tensor; use as `with jax.set_mesh(mesh222):`."""
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
