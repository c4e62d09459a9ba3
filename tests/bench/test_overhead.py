"""What of a step is no work, and how long it compiles: parts that are made slow are found."""

import json
import subprocess
import time
from types import SimpleNamespace

import numpy as np
import pytest

from lorafusion_jax.bench import compile_time, schedule, training
from lorafusion_jax.bench.compile_time import compile_times
from lorafusion_jax.bench.overhead import Overhead, measure_overhead, run_loop
from lorafusion_jax.bench.schedule import jobs_of
from lorafusion_jax.bench.shapes import model_shape
from lorafusion_jax.errors import ResourceError
from lorafusion_jax.models.hf_weights import random_base

COUNT = 6


@pytest.fixture(scope="module")
def packed():
    """Our system on a tiny model, compiled and warm."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "MOMENTS", dict.fromkeys(("xsum", "cnn", "wikisum"), (60, 20)))
        jobs = jobs_of("xsum", 4, 0, jobs=2, batches=4)
    config = model_shape("tiny", 1)
    setup = training.Setup(config, random_base(config), jobs, 128, 16, 4, 0.1, "none", False)
    found = training.compile_packed(setup, "e")
    assert len(found.plan) >= COUNT
    found.program.run([found.make(index) for index in range(2)])
    return found


class Slowed:
    """The program with something to wait for in its steps or updates, or in making batches."""

    def __init__(self, packed, step=0.0, update=0.0, make=0.0):
        self.program, self.seconds = packed.program, {"step": step, "update": update, "make": make}
        self.packed, self.ends = packed, 0
        self.wait = packed.program.wait

    def step(self, batch):
        time.sleep(self.seconds["step"])
        return self.program.step(batch)

    def update(self, batch_end):
        self.ends += 1
        time.sleep(self.seconds["update"])
        return self.program.update(batch_end)

    def make(self, index):
        time.sleep(self.seconds["make"])
        return self.packed.make(index)

    def measure(self, **settings) -> Overhead:
        options = {"padding": 0.0, "plan_seconds": 0.0, "rounds": 1} | settings
        return measure_overhead(self, self.make, COUNT, **options)


@pytest.mark.slow
def test_each_part_is_charged_for_what_it_takes(packed):
    """50 ms more in one place are at least 40 ms more of that part, and of no other."""
    before = Slowed(packed).measure()
    ends = sum(bool(np.any(packed.make(index).batch_end)) for index in range(COUNT))
    slow = Slowed(packed, update=0.05).measure()
    assert slow.optimizer_ms - before.optimizer_ms > 40 * ends / COUNT
    assert slow.update_ms > 50 and slow.share > 0.2
    assert slow.optimizer_ms > max(slow.host_ms, slow.step_ms)
    late = Slowed(packed, make=0.05).measure()  # longer than all else: it cannot hide
    assert late.host_ms > max(25, 2 * late.optimizer_ms) and late.share > 0.5
    slow = Slowed(packed, step=0.05).measure()
    assert slow.step_ms > 50 and slow.host_ms < late.host_ms
    # Packing that is faster than the step costs nothing: the thread is ahead.
    assert Slowed(packed, step=0.05, make=0.02).measure().host_ms < late.host_ms / 2


def test_padding_and_planning_are_parts_too(packed):
    found = Slowed(packed, step=0.02).measure(padding=0.25, plan_seconds=0.004)
    assert found.padding_ms == pytest.approx(found.step_ms / 4) and found.plan_ms == 4.0
    parts = found.padding_ms + found.optimizer_ms + found.host_ms + found.plan_ms
    assert found.share == pytest.approx(parts / (found.loop_ms + 4.0)) and found.share > 0.2
    assert found.columns()["overhead"] == found.share
    met = Overhead(100.0, 97.0, 1.5, 1.0, 0.5, 0.2, 9.0)  # dispatch that is hidden does not count
    assert met.share < 0.04 < met._replace(host_ms=2.0).share  # the bar tells them apart


def test_the_loop_runs_every_microbatch_once_and_in_order(packed):
    program = Slowed(packed)
    made, run = [], []
    make, step = program.make, program.step
    program.step = lambda batch: run.append(np.asarray(batch.tokens)) or step(batch)

    def noted(index):
        made.append(index)
        return make(index)

    assert run_loop(program, noted, COUNT) > 0
    assert made == list(range(COUNT))
    for index, tokens in enumerate(run):
        np.testing.assert_array_equal(tokens, packed.make(index).tokens)
    with pytest.raises(ZeroDivisionError):  # of the thread
        run_loop(program, lambda index: make(index + 0 // (3 - index)), COUNT)


def test_compile_times_are_of_two_processes_that_share_a_cache(monkeypatch):
    seen = []

    def run(words, *, env, **_):
        seen.append((words, env["JAX_COMPILATION_CACHE_DIR"], env["JAX_ENABLE_COMPILATION_CACHE"]))
        text = "noise\n" + json.dumps({"compile_seconds": 9.0 / len(seen)})
        return SimpleNamespace(returncode=0, stdout=text, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    found = compile_times(["--model", "tiny"])
    assert found == {"compile_cold_seconds": 9.0, "compile_cached_seconds": 4.5}
    assert seen[0] == seen[1] and seen[0][2] == "true"
    assert seen[0][0][-3:] == ["--model", "tiny", compile_time.COMPILE_ONLY]
    failed = SimpleNamespace(returncode=1, stdout="", stderr="a\nout of memory")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ResourceError, match="out of memory"):
        compile_times([])


@pytest.mark.slow
def test_the_cache_saves_most_of_the_compilation(monkeypatch):
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    words = "--lengths xsum --model tiny --capacity 2048 --batches 1 --dtype float32 --tile 16"
    found = compile_times(words.split())
    assert 0 < found["compile_cached_seconds"] < found["compile_cold_seconds"]
