"""Compiled programs are kept between the tests of this room: most of them run the same ones."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="package", autouse=True)
def compiled_programs(tmp_path_factory):
    """Turns the persistent compilation cache on, in a folder of this test run."""
    settings = {**_SETTINGS, "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled"))}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
