import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion_jax.train.schedule import (
    capacity_that_fills,
    make_schedule,
    padding_share,
    reschedule,
    schedule_of,
)
from lorafusion_sched import PlanError, Problem, job_from_lengths, verify

TILE = 16


def jobs_of(lengths, batch_size=3, epochs=1):
    return [
        job_from_lengths(f"job{i}", list(x), global_batch_size=batch_size, epochs=epochs)
        for i, x in enumerate(lengths)
    ]


def check(jobs, schedule, max_slots):
    """Every job has a slot of its own from its first to its last microbatch."""
    verify(Problem(jobs=tuple(jobs), capacities=(64,), tile=TILE), schedule.plan)
    assert schedule.num_slots <= max_slots
    for index in range(len(schedule.plan.microbatches)):
        active = [j for j in schedule.slot if schedule.first[j] <= index <= schedule.last[j]]
        taken = [schedule.slot[job] for job in active]
        assert len(set(taken)) == len(taken) <= max_slots
        assert all(0 <= slot < schedule.num_slots for slot in taken)


lengths = st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=12), min_size=1, max_size=6)


@settings(max_examples=40)
@given(lengths, st.integers(1, 6), st.integers(1, 4))
def test_waiting_jobs_get_the_slots_of_ended_ones(lengths, max_slots, batch_size):
    jobs = jobs_of(lengths, batch_size)
    schedule = make_schedule(jobs, capacities=(64,), tile=TILE, max_slots=max_slots)
    check(jobs, schedule, max_slots)


@settings(max_examples=40)
@given(lengths, st.data())
def test_jobs_join_what_remains(lengths, data):
    jobs = jobs_of(lengths)
    early = jobs[: data.draw(st.integers(1, len(jobs)))]
    before = make_schedule(early, capacities=(64,), tile=TILE)
    cursor = data.draw(st.integers(0, len(before.plan.microbatches)))
    done = before.plan.microbatches[:cursor]
    after = make_schedule(jobs, capacities=(64,), tile=TILE, done=done)
    assert after.plan.microbatches[:cursor] == done
    check(jobs, after, len(jobs))
    for job in early:  # a job that has started stays in its slot
        if before.first[job.name] < cursor:
            assert after.slot[job.name] == before.slot[job.name]


def test_nothing_new_changes_nothing():
    jobs = jobs_of([[5, 9, 30], [12, 40, 3, 8]])
    whole = make_schedule(jobs, capacities=(64,), tile=TILE)
    again = make_schedule(jobs, capacities=(64,), tile=TILE, done=whole.plan.microbatches)
    assert again == whole


def test_one_slot_trains_one_job_after_the_other():
    jobs = jobs_of([[20] * 6, [30] * 6, [10] * 6])
    schedule = make_schedule(jobs, capacities=(64,), tile=TILE, max_slots=1)
    assert schedule.num_slots == 1
    assert schedule.last["job0"] < schedule.first["job1"] <= schedule.last["job1"]
    assert schedule.last["job1"] < schedule.first["job2"]


def test_a_sample_that_never_fits_is_refused():
    with pytest.raises(PlanError, match="65 tokens"):
        make_schedule(jobs_of([[65]]), capacities=(64,), tile=TILE)


def test_capacity_is_no_larger_than_the_data_can_fill():
    jobs = jobs_of([[20, 20, 20], [5, 5, 5]])
    assert capacity_that_fills(jobs, 512, TILE) == 64 + 16
    assert capacity_that_fills(jobs, 48, TILE) == 48
    schedule = make_schedule(jobs, capacities=(80,), tile=TILE)
    assert len(schedule.plan.microbatches) == 1
    assert padding_share(schedule.plan.microbatches) == pytest.approx(5 / 80)


@settings(max_examples=40)
@given(lengths, st.data())
def test_jobs_end_and_join_in_a_running_schedule(lengths, data):
    """Whatever changes, a job that has started stays in its slot, and no two share one."""
    jobs = jobs_of(lengths)
    before = make_schedule(jobs, capacities=(64,), tile=TILE, max_slots=len(jobs))
    cursor = data.draw(st.integers(0, len(before.plan.microbatches)))
    ended = data.draw(st.dictionaries(st.sampled_from(jobs), st.integers(0, cursor)))
    ended = {job.name: first for job, first in ended.items()}
    added = [job_from_lengths("late", [9, 40, 33], global_batch_size=2)]
    after = reschedule(before, cursor, ended=ended, added=added)
    check(after.problem.jobs, after, len(jobs))
    for job in jobs:
        if job.name in after.slot and before.first[job.name] < min([cursor, *ended.values()]):
            assert after.slot[job.name] == before.slot[job.name]
    reread = schedule_of(
        after.plan, [*jobs, *added], capacities=(64,), ended=ended, slots=after.slot
    )
    assert reread.plan == after.plan and reread.slot == after.slot
    assert [(j.name, j.batches, j.unfinished) for j in reread.problem.jobs] == [
        (j.name, j.batches, j.unfinished) for j in after.problem.jobs
    ]


def test_a_cancelled_job_leaves_the_others_where_they_are():
    jobs = jobs_of([[20] * 12, [30] * 12, [10] * 12])
    before = make_schedule(jobs, capacities=(64,), tile=TILE)
    after = reschedule(before, 4, ended={"job1": 4}, repack=False)
    rest = [[s for s in m.stretches if s.job != "job1"] for m in before.plan.microbatches[4:]]
    assert [list(m.stretches) for m in after.plan.microbatches[4:]] == [s for s in rest if s]
    packed = reschedule(before, 4, ended={"job1": 4})
    assert len(packed.plan.microbatches) <= len(after.plan.microbatches)


def test_a_waiting_job_does_not_keep_a_slot_that_is_not_free_for_it():
    """It was to follow another job there; a new plan lets it train beside that one."""
    jobs = jobs_of([[20] * 12, [20] * 30, [20] * 12, [20] * 12])
    before = make_schedule(jobs[:3], capacities=(64,), tile=TILE, max_slots=2)
    assert before.slot["job2"] == before.slot["job0"] and before.first["job2"] > 3
    done = before.plan.microbatches[:3]
    after = make_schedule(jobs, capacities=(64,), tile=TILE, done=done, slots=before.slot)
    check(jobs, after, 4)
    assert after.first["job2"] < after.last["job0"]
    assert [after.slot[name] for name in ("job0", "job1")] == [0, 1]
