"""One small run for all tests here."""

import pytest
from small_run import make_data


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The folder of the runs; every run's data, tokenizer and tokens are there, and no stage is trained."""
    return make_data(tmp_path_factory.mktemp("runs"))
