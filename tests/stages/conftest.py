"""One small run for all tests here, and one cache of compiled programs, since stages are built again and again."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from small_run import make_data


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder of the runs; every run's data, tokenizer and tokens are there, and no stage is trained."""
    return make_data(tmp_path_factory.mktemp("runs"))
