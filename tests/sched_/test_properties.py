"""Random problems: plans are legal, bins no worse than first-fit decreasing, mutants caught."""

import random
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafusion_sched import (
    Microbatch,
    Plan,
    PlanError,
    Problem,
    Stretch,
    choose_capacity,
    from_json,
    job_from_lengths,
    pack,
    padded,
    plan,
    simulate,
    to_json,
    verify,
)
from lorafusion_sched.baselines import ffd_bins, lorafusion, megatron, mlora, violations
from lorafusion_sched.bounds import martello_toth_l2, slots_bound, volume_bound
from tests.sched_.problems import problems, refused

QUIET = {"deadline": None, "database": None, "derandomize": True}
QUIET["suppress_health_check"] = list(HealthCheck)


def check_plan(problem: Problem) -> None:
    answer = plan(problem)
    verify(problem, answer)
    assert from_json(to_json(answer)) == answer
    assert len(answer.microbatches) >= slots_bound(problem) * problem.width
    run = simulate(answer, problem.cost, problem.stages, problem.clock)
    assert 0.0 <= run.utilisation <= 1.0 + 1e-9
    assert -1e-9 <= run.bubble < 1.0
    for other in (megatron(problem), mlora(problem)):
        if problem.max_jobs != 1 or other.microbatches:
            verify(problem, other)


@settings(max_examples=60, **QUIET)
@given(problems())
@pytest.mark.scenario("E1")
def test_every_plan_is_legal(problem):
    check_plan(problem)


@pytest.mark.slow
@settings(max_examples=10_000, **QUIET)
@given(problems())
@pytest.mark.scenario("E1")
def test_every_plan_is_legal_10k(problem):
    check_plan(problem)


@settings(max_examples=25, **QUIET)
@given(problems())
def test_chosen_capacity_is_one_that_fits(problem):
    chosen = choose_capacity(problem)
    assert set(chosen.capacities) <= set(problem.capacities)
    verify(chosen, plan(chosen))


def rows_of(content: dict[int, list[int]], lengths: list[list[int]], tile: int) -> int:
    return sum(padded(sum(lengths[j][i] for i in x), tile) for j, x in content.items())


LOTS = st.lists(st.lists(st.integers(1, 512), min_size=1, max_size=12), min_size=1, max_size=4)


@settings(max_examples=60, **QUIET)
@given(LOTS, st.sampled_from([16, 128]), st.integers(0, 3), st.sampled_from([None, None, 1, 2]))
@pytest.mark.scenario("E3")
def test_pack_is_legal_and_never_worse_than_ffd(lengths, tile, seed, max_jobs):
    bins = pack(lengths, 512, tile, seed=seed, max_jobs=max_jobs)
    assert all(rows_of(content, lengths, tile) <= 512 for content in bins)
    assert max_jobs is None or max(map(len, bins)) <= max_jobs
    placed = sorted((job, i) for content in bins for job, x in content.items() for i in x)
    assert placed == [(job, i) for job, batch in enumerate(lengths) for i in range(len(batch))]
    items = [(job, n) for job, batch in enumerate(lengths) for n in batch]
    assert len(bins) >= volume_bound(items, 512, tile)
    assert len(bins) >= martello_toth_l2([n for _, n in items], 512)
    if max_jobs is None:
        assert len(bins) <= len(ffd_bins(lengths, 512, tile))


def fewest_bins(items: list[tuple[int, int]], capacity: int, tile: int) -> int:
    """Finds the optimum: tries every partition of the items into bins."""
    best = len(items) + 1

    def place(index: int, bins: list[list[tuple[int, int]]]) -> None:
        nonlocal best
        if len(bins) >= best:
            return
        if index == len(items):
            best = len(bins)
            return
        for number in range(len(bins) + 1):
            grown = [list(content) for content in bins] + [[]] * (number == len(bins))
            grown[number] = [*grown[number], items[index]]
            jobs = {job for job, _ in grown[number]}
            tokens = [sum(n for owner, n in grown[number] if owner == job) for job in jobs]
            if sum(padded(n, tile) for n in tokens) <= capacity:
                place(index + 1, grown)

    place(0, [])
    return best


@pytest.mark.scenario("E3")
def test_bins_are_optimal_for_few_samples():
    """At most 8 samples of 1 to 3 jobs: the optimum in at least 99% of 400 instances."""
    rng = random.Random(5)
    wrong = 0
    for _ in range(400):
        sizes = rng.choice([(10, 512), (100, 300), (150, 400)])
        lengths = [
            [rng.randint(*sizes) for _ in range(rng.randint(1, 8 // jobs))]
            for jobs in [rng.randint(1, 3)]
            for _ in range(jobs)
        ]
        items = [(job, n) for job, batch in enumerate(lengths) for n in batch]
        best = fewest_bins(items, 512, 64)
        found = len(pack(lengths, 512, 64))
        assert found >= best
        wrong += found > best
    assert wrong <= 4


def swap_samples(rng: random.Random, answer: Plan) -> list[Microbatch]:
    """Replaces a sample by another one of the plan."""
    mbs, (i, j) = list(answer.microbatches), draw_stretch(rng, answer)
    stretch = mbs[i].stretches[j]
    others = [x for mb in mbs for s in mb.stretches for x in s.samples]
    position = rng.randrange(len(stretch.samples))
    samples = [*stretch.samples]
    samples[position] = rng.choice(others)
    return with_stretch(mbs, i, j, replace(stretch, samples=tuple(samples)))


def drop_sample(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs, (i, j) = list(answer.microbatches), draw_stretch(rng, answer)
    return with_stretch(
        mbs, i, j, replace(mbs[i].stretches[j], samples=mbs[i].stretches[j].samples[1:])
    )


def repeat_sample(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs, (i, j) = list(answer.microbatches), draw_stretch(rng, answer)
    stretch = mbs[i].stretches[j]
    return with_stretch(mbs, i, j, replace(stretch, samples=(*stretch.samples, stretch.samples[0])))


def flip_end(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs, (i, j) = list(answer.microbatches), draw_stretch(rng, answer)
    return with_stretch(mbs, i, j, replace(mbs[i].stretches[j], ends=not mbs[i].stretches[j].ends))


def shift_batch(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs, (i, j) = list(answer.microbatches), draw_stretch(rng, answer)
    stretch = mbs[i].stretches[j]
    return with_stretch(mbs, i, j, replace(stretch, batch=stretch.batch + rng.choice((-1, 1))))


def other_job(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs, (i, j) = list(answer.microbatches), draw_stretch(rng, answer)
    names = {s.job for mb in mbs for s in mb.stretches} | {"stranger"}
    stretch = mbs[i].stretches[j]
    return with_stretch(mbs, i, j, replace(stretch, job=rng.choice(sorted(names - {stretch.job}))))


def swap_microbatches(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs = list(answer.microbatches)
    i, j = rng.sample(range(len(mbs)), 2)
    mbs[i], mbs[j] = mbs[j], mbs[i]
    return mbs


def drop_microbatch(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs = list(answer.microbatches)
    del mbs[rng.randrange(len(mbs))]
    return mbs


def merge_microbatches(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs = list(answer.microbatches)
    i, j = rng.sample(range(len(mbs)), 2)
    mbs[i] = Microbatch(mbs[i].stretches + mbs[j].stretches, mbs[i].capacity)
    mbs[j] = Microbatch((), mbs[j].capacity)
    return mbs


def shrink_capacity(rng: random.Random, answer: Plan) -> list[Microbatch]:
    mbs, (i, _) = list(answer.microbatches), draw_stretch(rng, answer)
    mbs[i] = Microbatch(mbs[i].stretches, rng.choice((128, mbs[i].capacity + 128)))
    return mbs


MUTATIONS = (
    swap_samples,
    drop_sample,
    repeat_sample,
    flip_end,
    shift_batch,
    other_job,
    swap_microbatches,
    drop_microbatch,
    merge_microbatches,
    shrink_capacity,
)


def draw_stretch(rng: random.Random, answer: Plan) -> tuple[int, int]:
    return rng.choice(
        [(i, j) for i, mb in enumerate(answer.microbatches) for j in range(len(mb.stretches))]
    )


def with_stretch(mbs: list[Microbatch], i: int, j: int, stretch: Stretch) -> list[Microbatch]:
    stretches = [*mbs[i].stretches]
    stretches[j] = stretch
    mbs[i] = Microbatch(tuple(stretches), mbs[i].capacity)
    return mbs


def is_legal(problem: Problem, answer: Plan) -> bool:
    """Judges a plan in the most direct way, without any code of the product."""
    seen = []
    slots: dict[tuple[str, int], set[int]] = {}
    ends: dict[tuple[str, int, int], set[bool]] = {}
    for position, mb in enumerate(answer.microbatches):
        rows = sum(-(-sum(x.length for x in s.samples) // 128) * 128 for s in mb.stretches)
        names = [s.job for s in mb.stretches]
        fits = rows <= mb.capacity and mb.capacity in problem.capacities
        if not fits or len(set(names)) < len(names):
            return False
        for s in mb.stretches:
            slot = position // problem.width
            slots.setdefault((s.job, s.batch), set()).add(slot)
            ends.setdefault((s.job, s.batch, slot), set()).add(s.ends)
            seen += [(s.job, s.batch, x) for x in s.samples]
            if not s.samples:
                return False
    asked = [(j.name, k, x) for j in problem.jobs for k, b in enumerate(j.batches) for x in b]
    if sorted(asked) != sorted(seen) or len(answer.microbatches) % problem.width:
        return False
    for (job, k), here in slots.items():
        if any(ends[job, k, slot] != {slot == max(here)} for slot in here):
            return False
        if k and min(here) - max(slots[job, k - 1]) < problem.distance:
            return False
    return True


@pytest.mark.scenario("E2")
def test_a_thousand_mutants_are_all_rejected():
    """Ten kinds of damage to plans of four shapes; the few that stay legal do not count."""
    rng = random.Random(11)
    rejected = {mutate.__name__: 0 for mutate in MUTATIONS}
    for distance, width in product((1, 4), (1, 2)):
        jobs = tuple(
            job_from_lengths(
                name,
                [rng.randint(40, 900) for _ in range(18)],
                global_batch_size=rng.choice((3, 6)),
            )
            for name in "abc"
        )
        problem = Problem(jobs=jobs, capacities=(1024, 2048), distance=distance, width=width)
        answer = plan(problem)
        assert is_legal(problem, answer)
        for mutate in MUTATIONS:
            for _ in range(30):
                mutant = replace(answer, microbatches=tuple(mutate(rng, answer)))
                legal = is_legal(problem, mutant)
                assert refused(verify, problem, mutant) == (not legal), mutate.__name__
                rejected[mutate.__name__] += not legal
    assert sum(rejected.values()) >= 1000, rejected
    assert min(rejected.values()) >= 50, rejected


def test_the_checker_sees_lorafusions_violations():
    """Their no-op rule can leave batches too close; `violations` and `verify` agree on it."""
    rng = random.Random(2)
    seen = 0
    for _ in range(30):
        jobs = tuple(
            job_from_lengths(n, [rng.randint(100, 2000) for _ in range(20)], global_batch_size=2)
            for n in "ab"
        )
        problem = Problem(jobs=jobs, capacities=(2048,), distance=6)
        answer = lorafusion(problem)
        broken = violations(answer)
        assert refused(verify, problem, answer) == (broken > 0)
        seen += broken > 0
    assert seen > 0


@pytest.mark.scenario("E6")
def test_plan_for_another_problem_is_refused():
    problem = Problem(jobs=(job_from_lengths("a", [10], global_batch_size=1),), capacities=(128,))
    for change in ({"tile": 64}, {"distance": 2}, {"width": 2}):
        with pytest.raises(PlanError, match=next(iter(change))):
            verify(replace(problem, **change), plan(problem))
