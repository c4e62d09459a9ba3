"""What is stuck ends, what is queued is bounded, what is used does not grow."""

import gc
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from lorafusion_jax.errors import DataError, ResourceError
from lorafusion_jax.train import checkpoint, loop, metrics
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.goodput import Goodput
from lorafusion_jax.train.watchdog import Watchdog
from tests.reliability.nursery import nursery
from tests.train.test_trainer import final_state, trainer

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("shared_programs")

ENGINE = """
import os, sys, time
import jax, jax.numpy as jnp
from functools import partial
from pathlib import Path
from jax.sharding import Mesh, PartitionSpec as P
from lorafusion_jax.train.outcome import Outcomes
from lorafusion_jax.train.schedule import Schedule
from lorafusion_jax.train.spike import SpikeGuard
from lorafusion_jax.train.watchdog import Watchdog
from lorafusion_sched import Microbatch, Plan, Problem

STEPS, SETTLE, STUCK, FOLDER = int(sys.argv[1]), sys.argv[2] == "1", sys.argv[3] == "1", sys.argv[4]
mesh = Mesh(jax.devices(), ("d",))
plan = Plan(microbatches=(Microbatch((), 16),) * STEPS, tile=16, distance=1, width=1)
schedule = Schedule(Problem(jobs=(), capacities=(16,), tile=16), plan, {}, {}, {}, 0)
queue = Outcomes({}, schedule, {}, {}, SpikeGuard({}, {}, 2), lambda event: None, lambda: 0)

def wait(x):
    if STUCK and x.ravel()[0] == 3:
        time.sleep(600)
    return x

@jax.jit
@partial(jax.shard_map, mesh=mesh, in_specs=P("d"), out_specs=P("d"))
def step(x):
    if STUCK:
        x = jax.pure_callback(wait, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
    y = jnp.sin(x) @ jnp.ones((64, 64)) + jax.lax.psum(x.sum(), "d")
    return x + jax.lax.psum(y.sum(), "d") * 0 + (0 if STUCK else 1)

x = jax.device_put(jnp.arange(8.0)[:, None] * jnp.ones((1, 64)), jax.NamedSharding(mesh, P("d")))
with Watchdog(12.0 if STUCK else None, Path(FOLDER) / "stacks.txt") as watchdog:
    for index in range(STEPS):
        x = step(x)
        if SETTLE:
            queue.dispatched(index, x, None)
        watchdog.beat()
    x.block_until_ready()
print("steps", int(x[0, 0]))
"""


def engine(tmp_path, *arguments):
    flags = (
        "--xla_force_host_platform_device_count=8 "
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=5 "
        "--xla_cpu_collective_call_terminate_timeout_seconds=12"
    )
    if "stuck" in arguments:
        flags = "--xla_force_host_platform_device_count=8"
    env = {k: v for k, v in os.environ.items() if k not in ("NPROC", "XLA_FLAGS")} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sched"), *filter(None, sys.path)]),
        "XLA_FLAGS": flags,
        "JAX_PLATFORMS": "cpu",
    }
    code = textwrap.dedent(ENGINE)
    words = [str(arguments[0]), arguments[1], "1" if "stuck" in arguments else "0", str(tmp_path)]
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, env=env, timeout=200
    )


@pytest.mark.crash
@pytest.mark.scenario("G4")
def test_five_hundred_steps_on_eight_devices_of_few_cores(tmp_path):
    """Without NPROC, which the tests otherwise set: the queue's bound is what prevents the hang."""
    done = engine(tmp_path, 500, "1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["steps", "500"]


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.scenario("G4")
@pytest.mark.skipif(os.cpu_count() > 7, reason="needs fewer cores than devices")
def test_without_the_bound_they_dead_lock(tmp_path):
    """The twin."""
    assert engine(tmp_path, 500, "0").returncode != 0


@pytest.mark.crash
@pytest.mark.scenario("G3")
def test_a_stuck_collective_ends_with_the_stacks_of_all_threads(tmp_path):
    start = time.monotonic()
    done = engine(tmp_path, 3, "1", "stuck")
    assert done.returncode == 6, done.stderr[-2000:]
    assert time.monotonic() - start < 120
    stacks = (tmp_path / "stacks.txt").read_text()
    assert "the same command goes on" in stacks and "in wait" in stacks


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.scenario("G3")
def test_a_listener_or_loader_that_blocks_ends_the_run_and_it_goes_on_later(tmp_path):
    with nursery(tmp_path) as runs:
        output = tmp_path / "run"
        runs.run(tmp_path / "whole")
        child = runs.start(output, slow_at="StepDone", dwell=600, watchdog=8.0)
        assert child.end() == 6
        assert "in at" in (output / "stacks.txt").read_text()  # where it blocks
        runs.run(output)
        assert final_state(output) == final_state(tmp_path / "whole")


@pytest.mark.scenario("G3")
def test_the_watchdog_sleeps_while_something_happens(tmp_path):
    ends = []
    with Watchdog(0.4, tmp_path / "stacks.txt", end=ends.append) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.beat()
        assert not ends
        time.sleep(0.8)
        assert ends == [6]
    assert "test_hangs.py" in (tmp_path / "stacks.txt").read_text()
    with Watchdog(None, tmp_path / "none.txt", end=ends.append):
        pass
    assert ends == [6]


# tensorstore 0.1.86 keeps half a kilobyte of each array that orbax saves or reads back (strings of
# `KvStore.Spec.to_json`); there are 200 arrays here.
KEPT_BY_TENSORSTORE = 200 * 512


def growth(tmp_path, leak: int) -> dict[str, int]:
    """What a run of 520 steps uses 500 microbatches later than at its 100th.

    Looked at after saves, so that none is under way. Python's memory is counted by tracemalloc, to
    the byte, less what tensorstore is known to keep; the resident memory also shows what the
    device's runtime would keep.
    """
    with nursery(tmp_path) as runs:
        child = runs.run(tmp_path / "run", steps=520, save_every=65, count=True, leak=leak)
    counts = [json.loads(x.partition(" ")[2]) for x in child.seen if x.startswith("counters")]
    counts = [count for count in counts if count["microbatch"] >= 100]
    early, late = counts[0], min(counts[-3:], key=lambda count: count["python"])
    assert late["microbatch"] - early["microbatch"] >= 500 and late["programs"] <= 3 * 2
    grown = {name: late[name] - early[name] for name in late}
    grown["python"] -= counts.index(late) * KEPT_BY_TENSORSTORE
    for name in ("files", "threads"):  # of pools that come and go
        most = max(count[name] for count in counts[:3])
        least = min(count[name] for count in counts[-3:])
        grown[name] = least - most
    return grown


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.scenario("G2")
def test_nothing_grows_over_five_hundred_steps(tmp_path):
    grown = growth(tmp_path, 0)
    for name in ("files", "threads", "arrays", "programs"):
        assert grown[name] <= 0, f"{name}: {grown}"
    assert grown["objects"] < 500 and grown["resident"] < 32 << 20, grown
    assert grown["python"] < 300_000, grown


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.scenario("G2")
def test_a_kilobyte_lost_with_every_microbatch_is_seen(tmp_path):
    """The twin."""
    grown = growth(tmp_path, 1024)
    assert grown["python"] > 300_000, grown


def objects_left_by_saves(folder) -> int:
    """Objects that eight saves of 20 arrays leave behind."""
    checkpoints = Checkpoints(folder)
    checkpoints.prepare()
    leaves = {f"leaf {number}": np.full((2, 8), number, np.float32) for number in range(20)}

    def save(steps: range) -> int:
        for step in steps:
            checkpoints.write(step, leaves, {})
        gc.collect()
        return len(gc.get_objects())

    before = save(range(4))
    return save(range(4, 12)) - before


@pytest.mark.scenario("G2")
def test_a_save_leaves_no_objects_behind(tmp_path):
    assert objects_left_by_saves(tmp_path / "checkpoints") < 200


@pytest.mark.scenario("G2")
def test_what_orbax_leaves_with_every_look_at_the_record_would_be_seen(tmp_path, monkeypatch):
    """The twin: so it was, and grew by megabytes an hour."""
    monkeypatch.setattr(
        checkpoint,
        "_read_record",
        lambda path: ocp.checkpointables_metadata(str(path)).custom_metadata,
    )
    assert objects_left_by_saves(tmp_path / "checkpoints") > 1000


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.scenario("G7")
def test_the_parts_of_the_time_add_up():
    clock = Clock()
    goodput = Goodput(clock)
    clock.now = 5
    goodput.enter("redone")
    clock.now = 6
    goodput.enter("train")
    clock.now = 10
    with goodput.during("save"):
        clock.now = 11
        with goodput.during("evaluate"):
            clock.now = 13
    clock.now = 20
    parts = goodput.seconds()
    assert parts == {"start": 5, "redone": 1, "train": 4 + 7, "save": 1, "evaluate": 2}
    assert sum(parts.values()) == clock.now


@pytest.mark.scenario("G5")
def test_what_a_loader_raises_ends_the_run_and_it_goes_on_later(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    trainer(whole).fit()
    real = loop.Run._pack

    def broken(run, want):
        if want.index == 5:
            raise DataError("the disk has gone", path="data.jsonl", line=7)
        return real(run, want)

    monkeypatch.setattr(loop.Run, "_pack", broken)
    with pytest.raises(DataError, match=r"data\.jsonl:7: the disk has gone") as error:
        trainer(tmp_path / "run").fit()
    assert error.value.exit_code == 2
    monkeypatch.setattr(loop.Run, "_pack", real)
    trainer(tmp_path / "run").fit()
    assert final_state(tmp_path / "run") == final_state(whole)


@pytest.mark.scenario("G5")
def test_a_sample_of_another_length_than_planned_is_noticed(tmp_path, monkeypatch):
    from lorafusion_jax.data.dataset import Dataset

    real = Dataset.__getitem__
    monkeypatch.setattr(
        Dataset, "__getitem__", lambda data, i: tuple(part[:-1] for part in real(data, i))
    )
    with pytest.raises(DataError, match=r"sample \d+ of \w+ has \d+ tokens, \d+ were planned"):
        trainer(tmp_path / "run").fit()


def test_out_of_memory_is_explained_with_what_was_planned(tmp_path, monkeypatch):
    """The device's error, raised where it would be; a GPU has to show the rest."""
    import jax

    def full(run, index):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    real = loop.Run._train
    monkeypatch.setattr(loop.Run, "_train", lambda run, i: full(run, i) if i == 5 else real(run, i))
    with pytest.raises(ResourceError) as error:
        trainer(tmp_path / "run").fit()
    text = str(error.value)
    assert error.value.exit_code == 5
    assert all(x in text for x in ("Out of memory allocating 9", "tokens_per_microbatch", "remat"))
    monkeypatch.setattr(loop.Run, "_train", real)
    results = trainer(tmp_path / "run").fit()
    assert np.isfinite(results["sql"].eval_loss)


@pytest.mark.scenario("A6")
def test_a_disk_that_is_full_of_metrics_ends_the_run_and_it_goes_on_later(tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    trainer(whole).fit()
    real, left = metrics.JsonLines.write, [12]

    class Full:
        name = str(tmp_path / "metrics.jsonl")

        def write(self, text):
            raise OSError(28, "No space left on device")

        close = flush = lambda self: self.write("")  # what is buffered does not fit either

    def write(lines, line):
        left[0] -= 1
        if left[0] < 0:
            lines._file.close()
            lines._file = Full()
        real(lines, line)

    monkeypatch.setattr(metrics.JsonLines, "write", write)
    with pytest.raises(ResourceError, match=r"bytes could not be written to .*metrics\.jsonl") as e:
        trainer(tmp_path / "run").fit()
    assert e.value.exit_code == 5
    monkeypatch.undo()
    trainer(tmp_path / "run").fit()
    assert final_state(tmp_path / "run") == final_state(whole)
