"""The planner's search is bounded by a count, not by time, and an interrupt ends it cleanly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorafusion_sched import Problem, job_from_lengths, plan, search

ROOT = Path(__file__).parents[2]


def jobs(samples: int):
    return tuple(
        job_from_lengths(f"job{n}", [64 + (7 * i * (n + 1)) % 900 for i in range(samples)],
                         global_batch_size=16)
        for n in range(4)
    )  # fmt: skip


@pytest.mark.scenario("E5")
@pytest.mark.parametrize("samples", [40, 400])
def test_the_number_of_trials_does_not_grow_with_the_problem(monkeypatch, samples):
    tried = []
    real = search.stream
    monkeypatch.setattr(search, "stream", lambda *args: tried.append(args) or real(*args))
    problem = Problem(jobs=jobs(samples), capacities=(2048,), tile=16, distance=4)
    monkeypatch.setattr(time, "perf_counter", None)  # nothing may look at a clock
    monkeypatch.setattr(time, "monotonic", None)
    plan(problem)
    assert 1 <= len(tried) <= 8


@pytest.mark.crash
@pytest.mark.scenario("E5")
def test_an_interrupt_leaves_with_130_and_writes_nothing(tmp_path):
    lengths = [64 + (7 * i) % 900 for i in range(40_000)]
    content = {"jobs": [{"name": f"j{n}", "lengths": lengths, "global_batch_size": 32}
                        for n in range(8)]}  # fmt: skip
    (tmp_path / "lengths.json").write_text(json.dumps(content))
    code = (
        # What starts a test in the background may have told it to ignore interrupts.
        "import signal, sys, lorafusion_sched.cli as c; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); print('ready', flush=True); "
        "sys.exit(c.main(sys.argv[1:]))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "sched")}
    command = ["plan", str(tmp_path / "lengths.json"), "--stages", "4", "--output"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *command, str(tmp_path / "plan.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as child:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert not (tmp_path / "plan.json").exists()
