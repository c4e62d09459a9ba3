"""The slot rule on meshes of 8 and 16 devices, for every (data, stage) and both orders of phases.

A slot is a row of `data` microbatches; distances count slots, whatever `data` is. A judge that is
written here, rank by rank and tick by tick as the engine runs, says what is legal; the checker of
plans must agree with it on plans and on damaged ones.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from lorafusion_sched import (
    Cost,
    Job,
    Microbatch,
    Plan,
    Problem,
    Sample,
    distance_of,
    plan,
    verify,
)
from lorafusion_sched.baselines import megatron, mlora
from tests.sched_.problems import refused

MESHES = [(data, devices // data) for devices in (8, 16) for data in (1, 2, 4, 8, 16)]
MESHES = [(data, stage) for data, stage in MESHES if stage]
ORDERS = ("fbh", "bfh")


def random_problem(rng: random.Random, data: int, stage: int, order: str) -> Problem:
    """Few to many jobs, tiny to wide global batches, with and without limits."""
    tile = rng.choice((1, 16, 128))
    capacities = tuple(sorted({tile * rng.randint(4, 32) for _ in range(rng.choice((1, 1, 2)))}))
    jobs = []
    for number in range(rng.randint(1, 6)):
        index = iter(range(10_000))
        most = rng.choice((1, 3, 2 * data + 1))
        batches = [
            tuple(
                Sample(0, next(index), rng.randint(1, capacities[-1]))
                for _ in range(rng.randint(1, most))
            )
            for _ in range(rng.randint(1, 5))
        ]
        ready = rng.choice((0, 0, 0, rng.randint(1, 9)))
        jobs.append(Job(name=f"job{number}", batches=tuple(batches), ready=ready))
    return Problem(
        jobs=tuple(jobs),
        capacities=capacities,
        tile=tile,
        distance=distance_of(order, stage),
        width=data,
        max_jobs=rng.choice((None, None, 1, 2)),
        max_active=rng.choice((None, None, 1, 2, 3)),
        clock=order,
        cost=Cost(whole_bucket=rng.random() < 0.5),
    )


def broken_rule(problem: Problem, answer: Plan, stage: int, order: str) -> str | None:
    """Runs the engine's ticks on paper; returns the first rule that a plan breaks.

    Each rank's forwards note which global batches the adapter had been updated for. The update of
    slot u comes in tick u + 2 stage - 1, on all stages and ranks at once, before the forward of
    that tick in order "bfh" and after it in "fbh".
    """
    data = problem.width
    if len(answer.microbatches) % data:
        return "slots that are not whole"
    slots = [answer.microbatches[i : i + data] for i in range(0, len(answer.microbatches), data)]
    seen: Counter = Counter()
    for ranks in slots:
        for mb in ranks:
            rows = 0
            for s in mb.stretches:
                length = sum(x.length for x in s.samples)
                rows += -(-length // problem.tile) * problem.tile
                seen.update((s.job, s.batch, x) for x in s.samples)
                if not s.samples:
                    return "a stretch without samples"
            names = [s.job for s in mb.stretches]
            if len(names) > len(set(names)) or len(names) > (problem.max_jobs or len(names)):
                return "too many stretches"
            if rows > mb.capacity or mb.capacity not in problem.capacities:
                return "a microbatch that is too full"
        batches = {(s.job, s.batch) for mb in ranks for s in mb.stretches}
        if len({job for job, _ in batches}) < len(batches):
            return "two global batches of a job in one slot"
    asked = ((j.name, k, x) for j in problem.jobs for k, b in enumerate(j.batches) for x in b)
    if seen != Counter(asked):
        return "samples missing or too many"
    return _ends(slots) or _versions(slots, stage, order) or _holders(problem, slots, stage, order)


def _ends(slots) -> str | None:
    last = {}
    for number, ranks in enumerate(slots):
        last |= {(s.job, s.batch): number for mb in ranks for s in mb.stretches}
    for number, ranks in enumerate(slots):
        for mb in ranks:
            for s in mb.stretches:
                if s.ends != (last[s.job, s.batch] == number):
                    return "an end that is no end, or none where one is"
    return None


def _versions(slots, stage: int, order: str) -> str | None:
    lag = 2 * stage - 1
    version: Counter = Counter()
    for tick in range(len(slots) + lag):

        def update(tick=tick):
            if 0 <= tick - lag < len(slots):
                ended = {s.job for mb in slots[tick - lag] for s in mb.stretches if s.ends}
                version.update(ended)

        if order == "bfh":
            update()
        for at in range(stage):
            slot = tick - at
            if 0 <= slot < len(slots):
                for mb in slots[slot]:
                    for s in mb.stretches:
                        if s.batch != version[s.job]:
                            return "a forward that sees the wrong adapter"
        if order == "fbh":
            update()
    return None


def _holders(problem: Problem, slots, stage: int, order: str) -> str | None:
    """Adapter slots: one is free again when the first stage may see its last update."""
    wait = 2 * stage - (order == "bfh")
    first, last = {}, {}
    for number, ranks in enumerate(slots):
        for job in {s.job for mb in ranks for s in mb.stretches}:
            first.setdefault(job, number)
            last[job] = number
    ready = {job.name: job.ready for job in problem.jobs}
    if any(first[job] < ready[job] for job in first):
        return "a job that starts too soon"
    for job, start in first.items():
        held = sum(first[other] <= start < last[other] + wait for other in first if other != job)
        ties = sum(first[other] == start and other > job for other in first)
        if problem.max_active is not None and held - ties >= problem.max_active:
            return "more jobs than adapter slots"
    return None


def planned(rng: random.Random, problem: Problem) -> tuple[Problem, Plan]:
    """Plans as we do, or as the baselines, which know neither limits nor late jobs."""
    planner = rng.choice((plan, plan, plan, mlora, megatron))
    if planner is not plan:
        jobs = tuple(replace(job, ready=0) for job in problem.jobs)
        problem = replace(problem, jobs=jobs, max_active=None, max_jobs=None)
    return problem, planner(problem)


def check(seed: int, count: int) -> Counter:
    """Plans random problems of every mesh; returns how many of each mesh were checked."""
    rng, checked = random.Random(seed), Counter()
    for number in range(count):
        data, stage = MESHES[number % len(MESHES)]
        order = ORDERS[number // len(MESHES) % 2]
        problem, answer = planned(rng, random_problem(rng, data, stage, order))
        verify(problem, answer)
        assert broken_rule(problem, answer, stage, order) is None, (problem, data, stage, order)
        checked[data, stage, order] += 1
    return checked


def test_plans_keep_the_rule_on_every_mesh():
    checked = check(3, 10 * len(MESHES))
    assert len(checked) == 2 * len(MESHES) and min(checked.values()) == 5


@pytest.mark.slow
def test_plans_keep_the_rule_on_every_mesh_6k():
    checked = check(4, 600 * len(MESHES))
    assert min(checked.values()) == 300


def mutants(rng: random.Random, answer: Plan) -> Iterator[tuple[str, list[Microbatch]]]:
    """Damage that only a mesh knows, and some that all plans know."""
    mbs, width = list(answer.microbatches), answer.width
    used = [i for i, mb in enumerate(mbs) if mb.stretches]
    i, j = rng.choice(used), rng.choice(used)
    swapped = list(mbs)
    swapped[i], swapped[j] = swapped[j], swapped[i]
    yield "swapped", swapped
    yield "shifted by a rank", [*mbs[1:], mbs[0]]
    slot = rng.randrange(len(mbs) // width) * width
    yield "a slot lost", mbs[:slot] + mbs[slot + width :]
    empty = [
        k for k in range(0, len(mbs), width) if not any(m.stretches for m in mbs[k : k + width])
    ]
    if empty:
        slot = rng.choice(empty)
        yield "an empty slot lost", mbs[:slot] + mbs[slot + width :]
    number = rng.randrange(len(mbs[i].stretches))
    s = mbs[i].stretches[number]

    def changed(**fields) -> list[Microbatch]:
        stretches = [*mbs[i].stretches]
        stretches[number] = replace(s, **fields)
        return [*mbs[:i], replace(mbs[i], stretches=tuple(stretches)), *mbs[i + 1 :]]

    yield "the end flag of one rank", changed(ends=not s.ends)
    yield "another batch on one rank", changed(batch=s.batch + rng.choice((-1, 1)))
    other = rng.randrange(len(mbs))
    moved = list(mbs)
    moved[i] = replace(mbs[i], stretches=tuple(x for x in mbs[i].stretches if x is not s))
    moved[other] = replace(moved[other], stretches=(*moved[other].stretches, s))
    yield "moved to another microbatch", moved


def check_mutants(seed: int, count: int) -> tuple[Counter, Counter]:
    rng = random.Random(seed)
    rejected, legal = Counter(), Counter()
    for number in range(count):
        data, stage = MESHES[number % len(MESHES)]
        order = ORDERS[number // len(MESHES) % 2]
        problem = random_problem(rng, data, stage, order)
        answer = plan(problem)
        for name, microbatches in mutants(rng, answer):
            mutant = replace(answer, microbatches=tuple(microbatches))
            rule = broken_rule(problem, mutant, stage, order)
            assert refused(verify, problem, mutant) == (rule is not None), (name, rule, number)
            (legal if rule is None else rejected)[name] += 1
    return rejected, legal


def test_checker_and_judge_agree_on_damage():
    rejected, _ = check_mutants(5, 6 * len(MESHES))
    assert len(rejected) == 7 and min(rejected.values()) >= 4, rejected


@pytest.mark.slow
def test_checker_and_judge_agree_on_much_damage():
    rejected, _ = check_mutants(6, 300 * len(MESHES))
    assert sum(rejected.values()) > 8_000, rejected


def test_a_plan_for_a_distance_one_less_is_caught():
    """The twin: on every mesh of several stages some plan needs all of its distance."""
    caught = Counter()
    for seed in range(2):
        for data, stage in MESHES:
            for order in ORDERS:
                rng = random.Random(f"{seed} {data} {stage} {order}")
                problem = random_problem(rng, data, stage, order)
                near = replace(problem, clock="1f1b", distance=problem.distance - 1 or 1)
                answer = replace(plan(near), distance=problem.distance)
                rule = broken_rule(problem, answer, stage, order)
                assert refused(verify, problem, answer) == (rule is not None)
                caught[data, stage] += rule is not None
    assert all(caught[data, stage] for data, stage in MESHES if stage > 1), caught
