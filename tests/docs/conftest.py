"""A tiny base model for the pages' readers."""

from pathlib import Path

import pytest

from tests.cli.conftest import write_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Returns the directory of a random two-layer Llama."""
    return write_model(tmp_path_factory.mktemp("base") / "tiny-llama")
