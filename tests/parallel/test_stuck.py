"""A tick in which a stage is stuck ends the run with exit code 6, and says which tick and stage."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lorafusion_jax.parallel.run import TICKS, MeshRun
from lorafusion_jax.train.watchdog import Watchdog
from tests.reliability.test_hangs import ROOT

CHILD = """
import sys, time
from pathlib import Path
import jax
from lorafusion_jax.config import RunTrainConfig
from lorafusion_jax.parallel.pipeline import DeviceProgram
from lorafusion_jax.train import trainer as room
from lorafusion_jax.train.events import StepDone
from tests.parallel.test_run import trainer

folder, stuck = Path(sys.argv[1]), sys.argv[2] == "stuck"

class Late(room.Watchdog):  # compilation takes as long as it takes
    def __enter__(self):
        Late.made = super().__enter__()
        return self

def listen(event):
    if isinstance(event, StepDone):
        Late.made._limit = 20.0

room.Watchdog = Late
real = DeviceProgram.forward

def wait(y, stage, tick):
    if stuck and stage == 1 and tick == 20:
        time.sleep(600)
    return y

def forward(self, state, t):
    flow, y = real(self, state, t)
    shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
    return flow, jax.pure_callback(wait, shape, y, self.stage, t)

DeviceProgram.forward = forward
made = trainer(folder, (1, 2), names=("emoji",), listener=listen)
made._train = RunTrainConfig(watchdog=600.0)
made.fit()
print("done")
"""


def train(folder, *arguments):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "sched"), *filter(None, sys.path)]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "NPROC": "32",
    }
    command = [sys.executable, "-c", CHILD, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=400)


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.scenario("G3")
def test_a_stuck_stage_is_named(tmp_path):
    done = train(tmp_path / "run", "stuck")
    assert done.returncode == 6, done.stderr[-3000:]
    stacks = (tmp_path / "run" / "stacks.txt").read_text()
    assert "ticks 15 to 30 of the pipeline" in stacks, stacks[:600]
    assert "in wait" in stacks and "the same command goes on" in stacks


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.scenario("G3")
def test_without_the_stuck_stage_it_ends_well(tmp_path):
    """The twin."""
    done = train(tmp_path / "run", "free")
    assert done.returncode == 0 and "done" in done.stdout, done.stderr[-3000:]
    assert not (tmp_path / "run" / "stacks.txt").exists()


def waiting_run(ready: tuple[bool, ...], dispatching=None) -> SimpleNamespace:
    """What `waiting_for` reads: one call under way on a mesh of 2 x 2, some devices done."""
    mesh = SimpleNamespace(devices=np.arange(4).reshape(2, 2))
    shards = [
        SimpleNamespace(device=i, data=SimpleNamespace(is_ready=lambda i=i: ready[i]))
        for i in range(len(ready))
    ]
    report = SimpleNamespace(loss=SimpleNamespace(addressable_shards=shards))
    return SimpleNamespace(
        _calls=[(15, report)] if ready else [],
        _dispatching=dispatching,
        _engine=SimpleNamespace(pipeline=SimpleNamespace(mesh=mesh, stages=2)),
        _fed=40,
        _microbatches=(None,) * 99,
    )


def test_the_watchdog_says_what_a_run_waits_for(tmp_path):
    last = 15 + TICKS - 1
    one = MeshRun.waiting_for(waiting_run((True, False, True, False)))
    assert f"ticks 15 to {last} of the pipeline, not ended by stages [1] of 2" in one
    both = MeshRun.waiting_for(waiting_run((False, False, True, False)))
    assert "[0, 1]" in both and "microbatch 40 of 99" in both
    assert "being dispatched" in MeshRun.waiting_for(waiting_run((), dispatching=31))
    ends = []
    with Watchdog(0.2, tmp_path / "stacks.txt", end=ends.append) as watchdog:
        watchdog.waiting_for = lambda: MeshRun.waiting_for(waiting_run((True, False, True, False)))
        watchdog._thread.join(10)
    assert ends == [6] and "stages [1] of 2" in (tmp_path / "stacks.txt").read_text()
    # What cannot be said keeps nobody alive.
    with Watchdog(0.2, tmp_path / "stacks.txt", end=ends.append) as watchdog:
        watchdog.waiting_for = lambda: MeshRun.waiting_for(SimpleNamespace())
        watchdog._thread.join(10)
    assert ends == [6, 6] and "could not be said" in (tmp_path / "stacks.txt").read_text()
