"""Plans of small problems whose answer is known exactly."""

import random

import pytest

from lorafusion_sched import (
    Job,
    Microbatch,
    Plan,
    PlanError,
    Problem,
    Sample,
    Stretch,
    from_json,
    job_from_lengths,
    plan,
    to_json,
    verify,
)


def problem_of(*jobs: Job, capacity: int = 1024, tile: int = 128, **rules) -> Problem:
    return Problem(jobs=jobs, capacities=(capacity,), tile=tile, **rules)


def contents(answer: Plan) -> list[list[tuple[str, int, list[int], bool]]]:
    return [
        [(s.job, s.batch, [x.length for x in s.samples], s.ends) for s in mb.stretches]
        for mb in answer.microbatches
    ]


def test_two_jobs_share_a_microbatch_and_end_in_it():
    problem = problem_of(
        job_from_lengths("a", [512], global_batch_size=1),
        job_from_lengths("b", [500], global_batch_size=1),
    )
    answer = plan(problem)
    verify(problem, answer)
    assert contents(answer) == [[("a", 0, [512], True), ("b", 0, [500], True)]]


def test_padding_decides_what_fits():
    """512 + 513 tokens of two jobs pad to 512 + 640 rows: two microbatches; of one job, 1025."""
    problem = problem_of(
        job_from_lengths("a", [512], global_batch_size=1),
        job_from_lengths("b", [513], global_batch_size=1),
    )
    assert len(plan(problem).microbatches) == 2
    one = problem_of(job_from_lengths("a", [500, 524], global_batch_size=2))
    assert contents(plan(one)) == [[("a", 0, [500, 524], True)]]


def test_batches_of_one_job_never_share_a_microbatch():
    problem = problem_of(job_from_lengths("a", [100, 100, 100], global_batch_size=1))
    answer = plan(problem)
    verify(problem, answer)
    assert [stretch[0][1] for stretch in contents(answer)] == [0, 1, 2]


def test_a_hole_is_filled_by_the_next_batch_of_another_job():
    """a: 1024 + 512 per batch; b: 512. The half-empty microbatch of a takes b's batch."""
    problem = problem_of(
        job_from_lengths("a", [1024, 512, 1024, 512], global_batch_size=2),
        job_from_lengths("b", [512, 512], global_batch_size=1),
    )
    answer = plan(problem)
    verify(problem, answer)
    assert len(answer.microbatches) == 4


def test_distance_puts_exactly_the_needed_noops():
    problem = problem_of(job_from_lengths("a", [900, 900], global_batch_size=1), distance=4)
    answer = plan(problem)
    verify(problem, answer)
    assert [len(mb.stretches) for mb in answer.microbatches] == [1, 0, 0, 0, 1]


def test_distance_is_filled_by_other_jobs():
    jobs = [job_from_lengths(n, [900] * 3, global_batch_size=1) for n in "abcd"]
    problem = problem_of(*jobs, distance=4)
    answer = plan(problem)
    verify(problem, answer)
    assert [c[0][0] for c in contents(answer)] == list("abcdabcdabcd")


def test_width_counts_slots():
    """Two ranks: a's two microbatches share slot 0, both flagged; its next batch is one slot on."""
    problem = problem_of(
        job_from_lengths("a", [1000] * 4, global_batch_size=2), width=2, distance=2
    )
    answer = plan(problem)
    verify(problem, answer)
    assert [bool(mb.stretches) for mb in answer.microbatches] == [True] * 2 + [False] * 2 + [
        True
    ] * 2
    assert all(s.ends for mb in answer.microbatches for s in mb.stretches)


def test_smallest_capacity_that_holds_the_microbatch():
    problem = Problem(
        jobs=(job_from_lengths("a", [300, 1000, 520], global_batch_size=1),),
        capacities=(384, 512, 1024),
        tile=128,
    )
    assert [mb.capacity for mb in plan(problem).microbatches] == [384, 1024, 1024]


def test_jobs_progress_evenly_and_short_jobs_end_early():
    rng = random.Random(3)
    jobs = [
        job_from_lengths(name, [rng.randint(50, 400) for _ in range(8 * n)], global_batch_size=8)
        for name, n in (("long", 20), ("middle", 10), ("short", 3))
    ]
    problem = problem_of(*jobs, capacity=2048)
    answer = plan(problem)
    verify(problem, answer)
    end = {(s.job, s.batch): i for i, mb in enumerate(answer.microbatches) for s in mb.stretches}
    total = len(answer.microbatches)
    assert end["short", 2] < 0.3 * total
    assert end["middle", 9] < 0.75 * total
    for number in range(3):
        ends = [end[job.name, number] for job in jobs]
        assert max(ends) - min(ends) <= 3


def test_max_jobs_is_kept():
    jobs = [job_from_lengths(n, [100] * 4, global_batch_size=2) for n in "abcdef"]
    problem = problem_of(*jobs, capacity=2048, max_jobs=2)
    answer = plan(problem)
    verify(problem, answer)
    assert max(len(mb.stretches) for mb in answer.microbatches) == 2


@pytest.mark.scenario("E4")
def test_no_jobs_and_jobs_without_batches_give_an_empty_plan():
    problem = problem_of(Job(name="a", batches=()))
    assert plan(problem).microbatches == ()
    verify(problem, plan(problem))
    assert from_json(to_json(plan(problem))) == plan(problem)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacities": ()}, "ascending"),
        ({"capacities": (256, 128)}, "ascending"),
        ({"capacities": (100,)}, "multiples of tile"),
        ({"distance": 0}, "at least 1"),
        ({"width": 0}, "at least 1"),
        ({"max_jobs": 0}, "max_jobs"),
        ({"jobs": (Job(name="a", batches=((),)),)}, "no samples"),
        ({"jobs": (Job(name="a", batches=((Sample(0, 7, 300),),)),)}, "sample 7 has 300 tokens"),
        ({"jobs": (Job(name="a", batches=()), Job(name="a", batches=()))}, "unique"),
    ],
)
@pytest.mark.scenario("E4")
def test_impossible_problems_are_refused(change, message):
    with pytest.raises(PlanError, match=message):
        Problem(**({"jobs": (), "capacities": (256,), "tile": 128} | change))


def small() -> tuple[Problem, Plan]:
    problem = problem_of(
        job_from_lengths("a", [700, 500], global_batch_size=1),
        job_from_lengths("b", [200, 300, 90, 80], global_batch_size=2),
        distance=2,
    )
    return problem, plan(problem)


@pytest.mark.scenario("E6")
def test_json_round_trip_is_exact_and_checked():
    _, answer = small()
    text = to_json(answer)
    assert from_json(text) == answer
    assert to_json(from_json(text)) == text


@pytest.mark.scenario("E6")
def test_any_changed_or_missing_character_is_refused():
    """Every single-character change of the text either is refused or reads as the same plan."""
    _, answer = small()
    text = to_json(answer)
    rng = random.Random(0)
    for position in range(len(text) - 1):
        other = rng.choice([c for c in '0123456789abc"[]{},:' if c != text[position]])
        for damaged in (
            text[:position] + other + text[position + 1 :],
            text[:position] + text[position + 1 :],
            text[:position],
        ):
            with pytest.raises(PlanError):
                from_json(damaged)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"format":"lorafusion-plan"}', "[" * 9999]
)
@pytest.mark.scenario("E6")
def test_other_documents_are_refused(text):
    with pytest.raises(PlanError, match=r"plan"):
        from_json(text)


def test_verify_names_the_microbatch():
    problem, answer = small()
    empty = Microbatch((), 1024)
    wrong = Plan(
        microbatches=(*answer.microbatches, empty, Microbatch((Stretch("x", 0, (), True),), 1024)),
        tile=128,
        distance=2,
        width=1,
    )
    with pytest.raises(PlanError, match=rf"microbatch {len(answer.microbatches) + 1}: unknown job"):
        verify(problem, wrong)
