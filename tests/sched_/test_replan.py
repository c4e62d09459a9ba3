"""Plans changed on the way: jobs stop early, are cancelled or join after what has run."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafusion_sched import (
    Job,
    PlanError,
    Problem,
    job_from_lengths,
    plan,
    replan,
    to_json,
    trained_batches,
    trained_part,
    verify,
)
from tests.sched_.problems import problems, refused
from tests.sched_.test_properties import QUIET


def job(name: str, batches: int, seed: int, *, gbs: int = 6, longest: int = 900) -> Job:
    rng = random.Random(seed)
    lengths = [rng.randint(min(20, longest), longest) for _ in range(gbs * batches)]
    return job_from_lengths(name, lengths, global_batch_size=gbs)


def four_jobs(**rules) -> Problem:
    jobs = tuple(job(name, 5, seed) for seed, name in enumerate("abcd"))
    return Problem(jobs=jobs, capacities=(2048,), **rules)


def check_change(problem: Problem, draw) -> None:
    """Two changes one after the other, at any slot, keep every rule and all that has run."""
    problem = replace(problem, max_active=draw(st.sampled_from([None, 1, 2, 3])))
    current, cursor = plan(problem), 0
    for turn in range(2):
        slots = len(current.microbatches) // problem.width
        before = cursor // problem.width
        cursor = problem.width * draw(st.integers(before, slots))
        names = [job.name for job in problem.jobs]
        names = draw(st.sets(st.sampled_from(names))) if names else set()
        firsts = st.integers(before, cursor // problem.width)
        ended = {name: problem.width * draw(firsts) for name in sorted(names)}
        repack = draw(st.booleans())
        added = (job(f"new{turn}", 2, turn, gbs=2, longest=problem.capacities[-1]),)
        changed = replan(problem, current, cursor, ended=ended, added=added, repack=repack)
        start = min([cursor, *ended.values()])
        assert changed.plan.microbatches[:start] == current.microbatches[:start]
        verify(changed.problem, changed.plan)
        for name, first in ended.items():
            assert name not in trained_batches(changed.plan.microbatches[first:])
        if not repack:
            old = trained_batches(current.microbatches)
            new = trained_batches(changed.plan.microbatches)
            assert all(new[name] == old[name] for name in old if name not in ended)
        again = replan(problem, current, cursor, ended=ended, added=added, repack=repack)
        assert to_json(again.plan) == to_json(changed.plan)
        problem, current = changed.problem, changed.plan


@settings(max_examples=40, **QUIET)
@given(problems(), st.data())
@pytest.mark.scenario("C8")
def test_any_change_at_any_time_is_legal(problem, data):
    check_change(problem, data.draw)


@pytest.mark.slow
@settings(max_examples=10_000, **QUIET)
@given(problems(), st.data())
def test_any_change_at_any_time_is_legal_10k(problem, data):
    check_change(problem, data.draw)


def test_the_others_use_the_room_of_a_job_that_stops():
    problem = four_jobs()
    before = plan(problem)
    cursor = len(before.microbatches) // 3
    kept = replan(problem, before, cursor, ended={"a": cursor, "b": cursor}, repack=False).plan
    packed = replan(problem, before, cursor, ended={"a": cursor, "b": cursor}).plan
    assert len(packed.microbatches) < len(kept.microbatches) < len(before.microbatches)


def test_a_batch_cut_short_never_ends():
    """Cancelled in the middle of a global batch: no later update may apply half of it."""
    problem = four_jobs()
    before = plan(problem)
    cursor = next(
        i
        for i, mb in enumerate(before.microbatches, start=1)
        if any(s.job == "a" and not s.ends for s in mb.stretches)
    )
    changed = replan(problem, before, cursor, ended={"a": cursor})
    cut = next(job for job in changed.problem.jobs if job.name == "a")
    assert cut.unfinished
    assert not any(s.ends for mb in changed.plan.microbatches for s in mb.stretches if s.job == "a")
    whole = [replace(job, unfinished=False) for job in changed.problem.jobs]
    with pytest.raises(PlanError, match="ends=False"):
        verify(replace(changed.problem, jobs=tuple(whole)), changed.plan)


def test_a_plan_that_runs_on_with_an_ended_job_is_caught():
    """The broken twin: the change forgotten, or applied to what has run already."""
    problem = four_jobs(distance=3)
    before = plan(problem)
    cursor = len(before.microbatches) // 2
    changed = replan(problem, before, cursor, ended={"a": cursor})
    assert refused(verify, changed.problem, before)
    forgotten = replace(
        changed.plan, microbatches=changed.plan.microbatches[:-1] + before.microbatches[-1:]
    )
    assert refused(verify, changed.problem, forgotten)


def test_a_job_that_joins_waits_for_a_slot_to_be_free():
    problem = four_jobs(max_active=4, distance=2)
    before = plan(problem)
    changed = replan(problem, before, 4, added=(job("e", 3, 9),))
    starts = [
        i for i, mb in enumerate(changed.plan.microbatches) for s in mb.stretches if s.job == "e"
    ]
    ends = {s.job: i for i, mb in enumerate(changed.plan.microbatches) for s in mb.stretches}
    assert starts[0] >= min(ends.values()) + 2
    stopped = replan(problem, before, 4, added=(job("e", 3, 9),), ended={"b": 4})
    sooner = [
        i for i, mb in enumerate(stopped.plan.microbatches) for s in mb.stretches if s.job == "e"
    ]
    assert 4 <= sooner[0] < starts[0]


def starts_of(changed, name: str) -> int:
    return next(
        i for i, mb in enumerate(changed.plan.microbatches) for s in mb.stretches if s.job == name
    )


@pytest.mark.parametrize("distance", [1, 3])
def test_a_job_beside_the_others_begins_where_one_of_them_ends(distance):
    """Not behind all of them: of the others' bits none changes either way."""
    jobs = (job("a", 2, 1), job("b", 9, 2), job("c", 9, 3))
    problem = Problem(jobs=jobs, capacities=(2048,), max_active=3, distance=distance)
    before = plan(problem)
    changed = replan(problem, before, 1, added=(job("late", 2, 9),), repack=False)
    mine = [mb for mb in changed.plan.microbatches if any(s.job == "late" for s in mb.stretches)]
    assert all(len(mb.stretches) == 1 for mb in mine)
    end = max(
        i for i, mb in enumerate(changed.plan.microbatches) for s in mb.stretches if s.job == "a"
    )
    assert end + distance <= starts_of(changed, "late") < len(before.microbatches) - 1


def test_a_cancelled_job_s_slot_goes_to_one_that_waits():
    problem = four_jobs(max_active=4)
    before = plan(problem)
    joined = replan(problem, before, 2, added=(job("late", 2, 9),), repack=False)
    cursor = 4
    assert starts_of(joined, "late") > cursor
    changed = replan(joined.problem, joined.plan, cursor, ended={"b": cursor}, repack=False)
    assert cursor <= starts_of(changed, "late") < starts_of(joined, "late")
    own = [
        [mb for mb in p.microbatches if any(s.job == "late" for s in mb.stretches)]
        for p in (joined.plan, changed.plan)
    ]
    assert own[0] == own[1]


@pytest.mark.parametrize("repack", [True, False])
def test_a_slot_is_not_free_right_after_its_job(repack):
    """On a pipeline the last update of an ended job is still on its way for `distance` slots."""
    problem = Problem(jobs=(job("a", 2, 1),), capacities=(2048,), distance=4, max_active=1)
    before = plan(problem)
    count = len(before.microbatches)
    changed = replan(problem, before, count, added=(job("b", 1, 2),), repack=repack).plan
    assert [bool(mb.stretches) for mb in changed.microbatches[count:]][:4] == [False] * 3 + [True]


def test_too_many_jobs_at_a_time_are_caught():
    problem = four_jobs()
    everyone = plan(problem)
    with pytest.raises(PlanError, match="2 other jobs hold all 2 adapter slots"):
        verify(replace(problem, max_active=2), everyone)
    with pytest.raises(PlanError, match="is ready in slot 7"):
        verify(replace(problem, jobs=tuple(replace(j, ready=7) for j in problem.jobs)), everyone)


def test_what_was_trained_must_be_the_jobs_own():
    one = job("a", 3, 1)
    whole = trained_batches(plan(Problem(jobs=(one,), capacities=(1024,))).microbatches)["a"]
    assert trained_part(one, whole) == one
    assert trained_part(one, {}) == replace(one, batches=())
    half = trained_part(one, {0: whole[0], 1: whole[1][:2]})
    assert half.unfinished and [len(batch) for batch in half.batches] == [6, 2]
    for wrong in ({1: whole[1]}, {0: whole[0][:3], 1: whole[1]}, {0: whole[1]}, {**whole, 3: []}):
        with pytest.raises(PlanError, match="first global batches"):
            trained_part(one, wrong)


@pytest.mark.parametrize(
    ("cursor", "change", "message"),
    [
        (-1, {}, "cursor=-1"),
        (3, {}, "multiple of width=2"),
        (9998, {}, "cursor=9998"),
        (0, {"ended": {"x": 0}}, "no job 'x'; there are: a, b, c, d"),
        (2, {"ended": {"a": 3}}, "ends at 3"),
        (0, {"added": (job("a", 1, 1),)}, "'a' is in the plan already"),
        (0, {"added": (job_from_lengths("e", [9999], global_batch_size=1),)}, "9999 tokens"),
    ],
)
def test_impossible_changes_are_refused(cursor, change, message):
    problem = four_jobs(width=2)
    with pytest.raises(PlanError, match=message):
        replan(problem, plan(problem), cursor, **change)
