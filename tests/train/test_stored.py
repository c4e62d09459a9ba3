"""Programs kept on disk: the same results, found again, and never those of something else."""

import os
import time
from functools import partial
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.train import stored
from lorafusion_jax.train.stored import Program
from tests.train import tiny


def step(factor, state, x):
    traced.append(factor)
    return {"sum": state["sum"] + factor * x}, x.sum()


traced: list = []
STATE = {"sum": jnp.arange(4.0)}
X = np.full(4, 2, np.float32)


def program(factor=3.0, **changes):
    values = {"donate": True, "like": lambda state, *_: (state, 0)} | changes
    return Program(partial(step, factor), **values)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps programs in a folder of the test's own; the step above counts as ours."""
    monkeypatch.setattr(stored, "_KNOWN", stored._KNOWN | {"tests"})
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path), True), strict=True):
        jax.config.update(name, value)
    traced.clear()
    yield tmp_path / "lowered"
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def run(made):
    compiled = made.compile((STATE, X))
    state, total = compiled(jax.tree.map(jnp.copy, STATE), X)
    return np.asarray(state["sum"]).tolist(), float(total), compiled


def test_a_second_process_need_not_trace(cache):
    first, second = run(program())[:2], run(program())[:2]
    assert first == second == ([6, 7, 8, 9], 8)
    assert len(traced) == 1 and len(list(cache.iterdir())) == 1


def test_the_first_argument_is_donated():
    compiled = run(program())[2]
    given = jax.tree.map(jnp.copy, STATE)
    compiled(given, X)
    assert given["sum"].is_deleted()


@pytest.mark.parametrize("what", ["static", "shape", "dtype", "sources", "setting", "structure"])
def test_another_program_is_not_taken(what, monkeypatch, cache):
    run(program())
    args = (STATE, X)
    if what == "static":
        assert run(program(5.0))[0] == [10, 11, 12, 13]
        args = None
    elif what == "shape":
        args = ({"sum": jnp.zeros(8)}, np.zeros(8, np.float32))
    elif what == "dtype":
        args = (STATE, np.zeros(4, np.int32))
    elif what == "sources":
        monkeypatch.setattr(stored, "_environment", lambda: "an edited file")
    elif what == "setting":
        with jax.default_matmul_precision("highest"):
            program().compile(args)
        args = None
    else:
        args = ({"sum": STATE["sum"], "more": ()}, X)
        with pytest.raises(AssertionError):
            program(like=lambda *_: 0).compile(args)
        return
    if args:
        program().compile(args)
    assert len(traced) == 2 and len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied"])
def test_a_damaged_file_is_written_anew(damage, cache):
    run(program())
    (path,) = cache.iterdir()
    text = bytearray(path.read_bytes())
    if damage == "flipped":
        text[len(text) // 2] ^= 1
    path.write_bytes({"cut": text[:-10], "flipped": text, "emptied": b""}[damage])
    assert run(program())[0] == [6, 7, 8, 9]
    assert len(traced) == 2
    assert run(program())[0] == [6, 7, 8, 9]
    assert len(traced) == 2


def test_what_nothing_has_taken_for_a_month_goes(cache):
    run(program())
    run(program(5.0))
    old, taken = sorted(cache.iterdir())
    for path in (old, taken):
        os.utime(path, times=(0, time.time() - 31 * 24 * 3600))
    assert stored._read(taken) is not None
    run(program(7.0))
    assert not old.exists() and taken.exists() and len(list(cache.iterdir())) == 2


def test_without_a_cache_nothing_is_kept(cache):
    jax.config.update("jax_enable_compilation_cache", False)
    assert run(program())[0] == [6, 7, 8, 9]
    assert not cache.exists()


@pytest.mark.parametrize("other", [pytest.Item, lambda: None], ids=["class", "function"])
def test_programs_with_code_of_others_are_not_kept(other, cache):
    """Its source is in no digest."""
    made = Program(partial(lambda _, *args: step(3.0, *args), other), program().like, True)
    assert not stored._is_known(partial(step, other)) and stored._is_known(partial(step, 3.0))
    assert run(made)[0] == [6, 7, 8, 9]
    assert not cache.exists()


def test_the_programs_of_training_are_kept(cache):
    """Everything that a model's static half names counts as known."""
    programs, _ = tiny._programs(1, jnp.float32)
    assert all(stored._is_known(made.step) for made in programs._steps.values())


@pytest.mark.parametrize("how", ["compile", "compile_anew"])
def test_options_reach_the_compiler(how):
    made = program(options={"no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        getattr(made, how)((STATE, X))


def test_a_folder_that_cannot_be_written_costs_nothing(monkeypatch, cache):
    monkeypatch.setattr(stored.os, "replace", Mock(side_effect=PermissionError))
    assert run(program())[0] == [6, 7, 8, 9]
    assert len(traced) == 1 and not list(cache.iterdir())


def test_a_bucket_is_no_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Program, "_compile_stored", Mock(side_effect=AssertionError))
    jax.config.update("jax_compilation_cache_dir", "gs://bucket/compiled")
    monkeypatch.setattr(Program, "compile_anew", lambda *_: "anew")
    assert program().compile((STATE, X)) == "anew"


def test_arguments_of_another_structure_are_refused():
    compiled = run(program())[2]
    with pytest.raises(TypeError, match="another structure"):
        compiled({"total": STATE["sum"]}, X)
