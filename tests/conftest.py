"""Eight fake CPU devices for every test: set before jax is imported."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

from jaxgpt.mesh import AXES


def pytest_configure(config: pytest.Config) -> None:
    """Keeps compiled programs beside pytest's own cache: compilation is most of the tests' time.

    Only in this process: one that is killed while it writes could leave half a program. `--cache-clear` deletes them.
    """
    if hasattr(config, "cache"):
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("compiled")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def mesh222():
    """Two devices along each of data, fsdp and tensor, one along context; use as `with jax.set_mesh(mesh222):`."""
    return jax.make_mesh((2, 2, 1, 2), AXES)
