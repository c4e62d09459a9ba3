"""Plans that change while a run trains: jobs end early or join, and training goes on meanwhile."""

import json
import threading
import time

import numpy as np
import pytest

from lorafusion_jax.train import events, loop, replan
from lorafusion_jax.train.background import BackgroundSaver
from lorafusion_jax.train.jobs import resolve_job
from lorafusion_jax.train.replan import Change, Replanner
from lorafusion_jax.train.schedule import make_schedule
from lorafusion_jax.train.signals import StoppedError
from lorafusion_sched import PlanError, from_json, job_from_lengths
from tests.train.test_trainer import DATA, final_state, metrics, stop_after, trainer
from tests.train.tiny import tiny_base

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(replan, "HEAD_START", 2)


AFTER = loop.Run._after


def at(monkeypatch, microbatch: int, do) -> None:
    """Does something to each run, after one microbatch of it."""

    def after(run, index):
        if index == microbatch:
            do(run)
        AFTER(run, index)

    monkeypatch.setattr(loop.Run, "_after", after)


def ended_sql(output, monkeypatch, *, repack: bool, listener=None):
    at(monkeypatch, 3, lambda run: run.end_job("sql", "stopped", repack=repack))
    return trainer(output, listener=listener).fit()


@pytest.mark.parametrize("repack", [True, False])
def test_a_job_ends_early_and_the_rest_goes_on(tmp_path, monkeypatch, soon, repack):
    seen = []
    whole = trainer(tmp_path / "whole").fit()
    results = ended_sql(tmp_path / "run", monkeypatch, repack=repack, listener=seen.append)
    assert results["sql"].status == "stopped" and results["sql"].steps < 5
    assert results["emoji"].status == "done" and results["emoji"].steps == 8
    assert results["emoji"].eval_loss == pytest.approx(whole["emoji"].eval_loss, rel=1e-3)
    before, after = (
        from_json((tmp_path / name / "plan.json").read_text()) for name in ("whole", "run")
    )
    rest = [s for m in after.microbatches[4:] for s in m.stretches]
    assert {s.job for s in rest} == {"emoji"}
    assert len(after.microbatches) < len(before.microbatches)
    assert any("planned anew" in e.message for e in seen if isinstance(e, events.Notice))
    done = [e.index for e in seen if isinstance(e, events.MicrobatchDone)]
    assert done == list(range(len(done)))
    if not repack:  # not a bit of the other job has changed
        pairs = [(r["emoji"].last_adapter.path, r["emoji"].adapter.path) for r in (whole, results)]
        for old, new in zip(*pairs, strict=True):
            content = [(path / "adapter_model.safetensors").read_bytes() for path in (old, new)]
            assert content[0] == content[1]


def test_stopped_while_a_change_is_planned_and_resumed_has_the_same_bits(
    tmp_path, monkeypatch, soon
):
    ended_sql(tmp_path / "whole", monkeypatch, repack=True)
    with pytest.raises(StoppedError):
        trainer(tmp_path / "run", listener=stop_after(5)).fit()
    trainer(tmp_path / "run").fit()
    assert final_state(tmp_path / "run") == final_state(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_job_joins_a_running_process(tmp_path, monkeypatch, soon):
    """In the slot that another has left; it learns what it learns otherwise."""

    def join(run):
        job = resolve_job(late, DATA["late"], tiny_base(), made.config.batching, 0)
        run.end_job("sql", "cancelled")
        run.join([job])

    waits = trainer(tmp_path / "waits", ("sql", "emoji", "late"), slots=2).fit()
    made = trainer(tmp_path / "run")
    late = trainer(tmp_path / "other", ("late",)).config.jobs[0]
    at(monkeypatch, 2, join)
    results = made.fit()
    assert results["sql"].status == "cancelled"
    plan = from_json((tmp_path / "run" / "plan.json").read_text())
    starts = [i for i, m in enumerate(plan.microbatches) for s in m.stretches if s.job == "late"]
    assert starts[0] >= 5
    text = (tmp_path / "run" / "jobs" / "late" / "metrics.jsonl").read_text()
    losses = [json.loads(line)["eval_loss"] for line in text.splitlines()]
    evaluated = [loss for loss in losses if loss is not None]
    assert len(losses) == 3 + len(evaluated)
    assert evaluated[-1] == pytest.approx(waits["late"].eval_loss, rel=1e-3)


def jobs_of(count: int):
    rng = np.random.default_rng(0)
    return [
        job_from_lengths(f"job{n}", rng.integers(5, 60, 240).tolist(), global_batch_size=6)
        for n in range(count)
    ]


def test_planning_does_not_hold_training_up(monkeypatch):
    """The loop asks at every microbatch and is answered at once until the swap is due."""
    schedule = make_schedule(jobs_of(3), capacities=(64,), tile=16)
    planning, go_on = threading.Event(), threading.Event()

    def slow(*args, **settings):
        planning.set()
        assert go_on.wait(20)
        return reschedule(*args, **settings)

    reschedule = replan.reschedule
    monkeypatch.setattr(replan, "reschedule", slow)
    planner = Replanner(num_slots=4)
    change = planner.request(schedule, 10, ended=["job0"])
    left = len(schedule.plan.microbatches) - 10
    assert change.swap == 10 + replan.HEAD_START + left // replan.SHARE
    assert planning.wait(20)
    start = time.perf_counter()
    assert all(planner.take(cursor) is None for cursor in range(10, change.swap))
    assert time.perf_counter() - start < 1.0
    assert planner.pending == change
    go_on.set()
    changed = planner.take(change.swap)
    assert changed is not None and planner.pending is None
    assert "job0" not in {s.job for m in changed.plan.microbatches[10:] for s in m.stretches}
    planner.close()


def test_changes_that_overlap_are_made_together():
    jobs = jobs_of(4)
    schedule = make_schedule(jobs[:3], capacities=(64,), tile=16)
    planner = Replanner(num_slots=3)
    planner.request(schedule, 10, ended=["job0"], repack=False)
    planner.request(schedule, 12, added=jobs[3:])
    change = planner.request(schedule, 13, ended=["job1"], repack=False)
    assert change.ended == {"job0": 10, "job1": 13} and change.added == ("job3",) and change.repack
    assert Change.from_record(change.to_record()) == change
    again = Replanner(num_slots=3)
    again.start(schedule, Change.from_record(change.to_record()), jobs[3:])
    first, second = (p.take(change.swap) for p in (planner, again))
    assert first == second and first is not None
    assert first.slot["job3"] in (schedule.slot["job0"], schedule.slot["job1"])
    with pytest.raises(PlanError, match="unique"):
        planner.request(schedule, 20, added=jobs[:1])
    assert planner.pending is None
    planner.close()
    again.close()


@pytest.mark.parametrize("repack", [True, False])
def test_a_job_that_ends_before_it_is_in_a_plan_never_comes_into_one(repack):
    jobs = jobs_of(4)
    schedule = make_schedule(jobs[:2], capacities=(64,), tile=16)
    planner = Replanner(num_slots=4)
    planner.request(schedule, 10, added=jobs[2:], repack=repack)
    change = planner.request(schedule, 12, ended=["job2", "job0"], repack=repack)
    assert (change.ended, change.added) == ({"job0": 12}, ("job3",))
    changed = planner.take(change.swap)
    assert changed is not None and set(changed.slot) == {"job0", "job1", "job3"}
    planner.close()


def test_a_checkpoint_that_is_being_written_does_not_change_with_the_run(tmp_path, monkeypatch):
    """The saver reads it in its thread while the next microbatches end jobs."""
    given, before = [], []
    save = BackgroundSaver.save

    def note(saver, step, state, progress, score):
        given.append(progress)
        before.append(json.dumps(progress))
        return save(saver, step, state, progress, score)

    monkeypatch.setattr(BackgroundSaver, "save", note)

    def change(run):
        run.save()
        run.end_job("sql", "stopped")
        run.remember(made.config, run.jobs[:1])

    made = trainer(tmp_path / "run")
    at(monkeypatch, 3, change)
    made.fit()
    assert "sql" in given[-1]["ended"] and any("sql" not in p["ended"] for p in given)
    assert [json.dumps(progress) for progress in given] == before
