"""Jobs that join and leave a running stream, search settings, and balance by time."""

import random
from dataclasses import replace

import pytest

from lorafusion_sched import (
    Cost,
    Job,
    Microbatch,
    Plan,
    PlanError,
    Problem,
    Settings,
    Stream,
    choose_capacity,
    job_from_lengths,
    plan,
    verify,
)
from lorafusion_sched.bounds import martello_toth_l2, slots_bound, volume_bound
from lorafusion_sched.simulate import slot_times
from lorafusion_sched.stream import stream


def job(name: str, batches: int, seed: int, *, gbs: int = 8, longest: int = 900) -> Job:
    rng = random.Random(seed)
    lengths = [rng.randint(20, longest) for _ in range(gbs * batches)]
    return job_from_lengths(name, lengths, global_batch_size=gbs)


def problem_of(*jobs: Job, **rules) -> Problem:
    return Problem(jobs=jobs, capacities=(2048,), **rules)


def drawn(source: Stream, count: int | None = None) -> list[Microbatch]:
    result: list[Microbatch] = []
    while count is None or count > 0:
        slot = source.next_slot()
        if slot is None:
            break
        result += slot
        count = None if count is None else count - 1
    return result


def as_plan(problem: Problem, microbatches: list[Microbatch]) -> Plan:
    return Plan(
        microbatches=tuple(microbatches),
        tile=problem.tile,
        distance=problem.distance,
        width=problem.width,
    )


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("distance", [1, 4])
def test_jobs_join_end_early_and_are_cancelled(distance, width):
    """What was planned is a legal plan of the batches that were planned."""
    a, b, c = job("a", 6, 1), job("b", 6, 2), job("c", 3, 3)
    problem = problem_of(a, b, distance=distance, width=width)
    source = Stream(problem, Settings())
    planned = drawn(source, 5)
    source.add(c)
    planned += drawn(source, 4)
    source.remove("a", finish_batch=True)
    planned += drawn(source)
    kept = 1 + max(s.batch for mb in planned for s in mb.stretches if s.job == "a")
    assert 0 < kept < 6
    asked = replace(problem, jobs=(replace(a, batches=a.batches[:kept]), b, c))
    verify(asked, as_plan(problem, planned))


def test_a_cancelled_job_is_not_planned_any_more():
    source = Stream(problem_of(job("a", 5, 1), job("b", 5, 2)), Settings())
    drawn(source, 4)
    source.remove("a")
    assert not any(s.job == "a" for mb in drawn(source) for s in mb.stretches)


def test_a_job_that_joins_takes_turns_instead_of_overtaking():
    a, late = job("a", 12, 1), job("late", 12, 2)
    source = Stream(problem_of(a, job("b", 12, 3)), Settings())
    planned = drawn(source, 12)
    source.add(late, ready=14)
    start = len(planned)
    planned += drawn(source)
    first = next(i for i, mb in enumerate(planned) if any(s.job == "late" for s in mb.stretches))
    assert first >= 14
    turn = [s.job for mb in planned[start : start + 30] for s in mb.stretches if s.ends]
    assert 0.2 < turn.count("late") / len(turn) < 0.5


def test_joining_jobs_are_checked():
    source = Stream(problem_of(job("a", 2, 1)), Settings())
    with pytest.raises(PlanError, match="already"):
        source.add(job("a", 2, 1))
    with pytest.raises(PlanError, match="5000 tokens"):
        source.add(job_from_lengths("b", [5000], global_batch_size=1))
    assert drawn(source) == drawn(Stream(problem_of(job("a", 2, 1)), Settings()))


def test_the_stream_reaches_the_volume_bound_where_nothing_binds():
    jobs = [job(name, 12, i) for i, name in enumerate("abcd")]
    problem = problem_of(*jobs)
    assert len(plan(problem).microbatches) <= slots_bound(problem) + 1


def test_focus_finishes_batches_sooner():
    """With a pipeline, concentrating on the urgent batch leaves fewer empty slots."""
    problem = problem_of(*[job(n, 10, i, longest=500) for i, n in enumerate("abcd")], distance=4)
    loose, tight = (stream(problem, Settings(focus=f)) for f in (0.0, 2.0))
    assert len(tight.microbatches) < len(loose.microbatches)


def long_tail(seed: int) -> list[Job]:
    rng = random.Random(seed)
    return [
        job_from_lengths(
            name,
            [min(4096, max(32, round(rng.lognormvariate(6.3, 1.0)))) for _ in range(96)],
            global_batch_size=16,
        )
        for name in "abcd"
    ]


def test_packing_by_time_halves_the_spread():
    """Attention makes equal tokens unequal time; the excess of max over mean falls by half."""
    cost = Cost(per_square=1 / 4096, whole_bucket=False)
    spread = {}
    for by_time in (False, True):
        problem = Problem(
            jobs=tuple(long_tail(1)),
            capacities=(8192,),
            distance=2,
            cost=cost if by_time else replace(cost, per_square=0.0),
        )
        answer = plan(problem)
        verify(problem, answer)
        times = [t for t in slot_times(answer, cost) if t]
        spread[by_time] = max(times) * len(times) / sum(times) - 1
    assert spread[True] < 0.5 * spread[False]


def test_capacity_is_chosen_with_the_schedule():
    """Small batches on a deep pipeline want small microbatches; a fixed cost wants larger ones."""
    jobs = tuple(job(n, 8, i, gbs=8, longest=700) for i, n in enumerate("abcd"))
    sizes = tuple(range(1024, 8193, 1024))
    asked = Problem(jobs=jobs, capacities=sizes, distance=8)
    small = choose_capacity(asked)
    large = choose_capacity(replace(asked, cost=Cost(fixed=20000.0)))
    assert small.capacities[-1] < large.capacities[-1]
    assert set(small.capacities) <= set(sizes)


def test_bounds_of_known_instances():
    assert martello_toth_l2([60, 60, 60], 100) == 3
    assert martello_toth_l2([50, 50, 50, 50], 100) == 2
    assert martello_toth_l2([70, 70, 31, 31], 100) == 3
    assert volume_bound([(0, 100), (1, 100)], 256, 128) == 1
    assert volume_bound([(0, 129), (1, 129)], 256, 128) == 2
    chain = problem_of(job_from_lengths("a", [100] * 3, global_batch_size=1), distance=4)
    assert slots_bound(chain) == 9 == len(plan(chain).microbatches)
