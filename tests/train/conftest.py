"""Compiled programs are kept between the tests of this room: most of them run the same ones."""

from functools import partial

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lorafusion_jax.train import programs

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


@pytest.fixture
def shared_programs(monkeypatch):
    """Lets trainers share compiled programs, as if each had found them in a cache."""
    monkeypatch.setattr(programs, "_compile", _compile_once)


_compile, _known = programs._compile, {}


def _compile_once(program, args):
    step = program.step
    static = (step.func, *step.args) if isinstance(step, partial) else (step,)
    shapes = tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(args))
    key = (static, jax.tree.structure(args), shapes)
    if key not in _known:
        _known[key] = _compile(program, args)
    return _known[key]
