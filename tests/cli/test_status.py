"""`lorafusion status` of runs in every state, from files alone."""

import fcntl
import json

import pytest

from lorafusion_jax.cli.run_status import run_status
from lorafusion_jax.config import load_config
from lorafusion_jax.train.events import CheckpointSaved, MicrobatchDone, RunEnded, StepDone
from lorafusion_jax.train.live_status import LiveStatus
from lorafusion_jax.train.run_folder import RunFolder

PLAN = json.dumps({"microbatches": [[]] * 20})


def step(number, microbatch, time, loss=2.0):
    return {
        "step": number,
        "tokens": 100 * number,
        "loss": loss,
        "microbatch": microbatch,
        "time": time,
        "eval_loss": None,
    }


def evaluation(number, microbatch, time, loss):
    return {
        "step": number,
        "loss": None,
        "eval_loss": loss,
        "microbatch": microbatch,
        "time": time,
    }


@pytest.fixture
def run(project):
    """A run that was started at 1000, and has done 9 microbatches in 40 seconds."""
    folder = RunFolder(project.parent / "run")
    folder.write_start(load_config(project), PLAN, None)
    jobs = [{"name": name, "steps": 10} for name in ("numbers", "chat", "plain")]
    planned = {"event": "RunPlanned", "time": 1000.0, "jobs": jobs, "start": 0}
    write(folder.path / "events.jsonl", [planned])
    lines = [
        evaluation(0, 0, 1001.0, 5.0),
        step(1, 0, 1010.0),
        step(2, 4, 1030.0),
        evaluation(2, 4, 1031.0, 3.0),
        step(3, 8, 1050.0, 1.5),
        evaluation(3, 8, 1051.0, 4.0),
    ]
    write(folder.job("numbers") / "metrics.jsonl", lines)
    return folder


def write(path, lines):
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def test_of_a_run_under_way(run):
    lock = run.path / ".lock"
    lock.touch()
    with open(lock) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        found = run_status(run, 1052.0)
    assert (found["state"], found["microbatch"], found["microbatches"]) == ("running", 9, 20)
    assert found["eta_s"] == pytest.approx(11 * 5 - 2)  # 5 s a microbatch, 2 s since the last
    numbers, chat = found["jobs"]["numbers"], found["jobs"]["chat"]
    assert numbers == {
        "status": "training",
        "step": 3,
        "steps": 10,
        "loss": 1.5,
        "tokens_per_s": 5.0,
        "base_loss": 5.0,
        "best_loss": 3.0,
        "eval_loss": 4.0,
        "eval_step": 3,
    }
    assert (chat["status"], chat["step"], chat["loss"]) == ("waiting", 0, None)


def test_of_a_run_that_was_interrupted_and_goes_on(run):
    found = run_status(run, 2000.0)
    assert (found["state"], found["eta_s"]) == ("interrupted", None)
    again = {"event": "RunPlanned", "time": 3000.0, "jobs": [], "start": 9}
    write(run.path / "events.jsonl", [again])
    found = run_status(run, 3001.0)
    assert found["microbatch"] == 9 and found["tokens_per_s"] == 5.0  # of the part before
    lines = [step(4, 12, 3010.0), step(5, 16, 3012.0)]
    write(run.job("numbers") / "metrics.jsonl", lines)
    found = run_status(run, 3013.0)
    assert (found["microbatch"], found["tokens_per_s"]) == (17, 50.0)


def test_of_a_run_that_has_ended(run, lorafusion):
    ends = [
        {
            "event": "JobEnded",
            "time": 1060.0,
            "job": "numbers",
            "status": "stopped early",
            "step": 3,
        },
        {"event": "RunEnded", "time": 1061.0, "seconds": 61.0},
    ]
    write(run.path / "events.jsonl", ends)
    found = run_status(run, 9000.0)
    assert (found["state"], found["microbatch"], found["seconds"]) == ("ended", 20, 61.0)
    assert found["jobs"]["numbers"]["status"] == "stopped early"
    code, out, _ = lorafusion("status", run.path)
    assert code == 0 and ": ended after 1:01" in out and "done     20 of 20 microbatches" in out
    row = next(line.split() for line in out.splitlines() if line.startswith("numbers"))
    assert row[1:7] == ["3/10", "1.500", "5.000", "3.000", "4.000", "@3"]
    code, out, _ = lorafusion("status", run.path, "--json")
    assert code == 0 and json.loads(out)["jobs"]["numbers"]["best_loss"] == 3.0


def trained(job, number, tokens):
    return StepDone(job, number, 10, 1.0 / number, tokens, 1e-3, 1.0, True, number)


def test_the_last_step_is_known_though_metrics_have_few_lines(run):
    """Two jobs, one after the other at 50 tokens/s each; the metrics end at step 3."""
    times = iter([1052.0, *(1052.0 + 2 * i for i in range(6) for _ in range(2)), 1070.0])
    listener = LiveStatus(run, clock=lambda: next(times))
    listener(RunEnded(0.0, 0, None))  # before any microbatch: nothing to write
    assert not run.live()
    for i in range(6):
        job, number = ("numbers", 4 + i) if i < 3 else ("chat", i - 2)
        listener(trained(job, number, 100 * number))
        listener(MicrobatchDone(9 + i, 20, 100, 128))
    found = run_status(run, 1063.0)
    assert (found["microbatch"], found["tokens_per_s"]) == (15, 50.0)
    numbers, chat = found["jobs"]["numbers"], found["jobs"]["chat"]
    assert (numbers["step"], numbers["loss"], numbers["tokens_per_s"]) == (6, 1 / 6, 50.0)
    assert (chat["status"], chat["step"], chat["tokens_per_s"]) == ("training", 3, 50.0)
    assert numbers["best_loss"] == 3.0  # what only the metrics know stays
    # A process that starts again has done nothing yet, whatever the one before had.
    write(run.path / "events.jsonl", [{"event": "RunPlanned", "time": 2e3, "jobs": [], "start": 9}])
    found = run_status(run, 2001.0)
    assert (found["microbatch"], found["jobs"]["numbers"]["step"]) == (9, 3)


def test_status_is_written_once_a_second_and_when_the_run_ends(run):
    now = 0.0
    listener = LiveStatus(run, clock=lambda: now)
    seen = []
    for i in range(30):
        now = 100 + 0.3 * i
        listener(MicrobatchDone(i, 40, 10, 128))
        seen.append(run.live()["microbatch"])
    assert 7 <= len(set(seen)) <= 10 and seen[-1] < 30
    listener(CheckpointSaved(30, 0.1, 0.0, "checkpoints/30"))
    assert run.live()["microbatch"] == 30 and run.live()["tokens"] == 290
    (run.path / "status.json").write_text("{")
    assert run.live() == {} and run_status(run, 2000.0)["microbatch"] == 9  # unreadable: as before
