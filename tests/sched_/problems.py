"""Random problems for the scheduler's tests."""

from hypothesis import strategies as st

from lorafusion_sched import Cost, Job, PlanError, Problem, Sample, distance_of


@st.composite
def problems(draw, *, max_jobs: int = 5, max_batches: int = 4, max_samples: int = 7) -> Problem:
    """Draws problems of every kind: tiles, buckets, distances, widths, limits and costs."""
    tile = draw(st.sampled_from([1, 7, 16, 128]))
    buckets = draw(st.lists(st.integers(1, 40), min_size=1, max_size=3, unique=True))
    capacities = tuple(sorted(tile * b for b in buckets))
    clock = draw(st.sampled_from(["1f1b", "bfh", "fbh"]))
    stages = draw(st.integers(1, 4))
    lengths = st.integers(1, capacities[-1])
    jobs = []
    for number in range(draw(st.integers(0, max_jobs))):
        batches = draw(
            st.lists(st.lists(lengths, min_size=1, max_size=max_samples), max_size=max_batches)
        )
        index = iter(range(10_000))
        jobs.append(
            Job(
                name=f"job{number}",
                batches=tuple(tuple(Sample(0, next(index), n) for n in b) for b in batches),
            )
        )
    return Problem(
        jobs=tuple(jobs),
        capacities=capacities,
        tile=tile,
        distance=distance_of(clock, stages),
        width=draw(st.integers(1, 3)),
        max_jobs=draw(st.sampled_from([None, None, 1, 2, 3])),
        clock=clock,
        cost=Cost(
            fixed=draw(st.sampled_from([0.0, 10.0])),
            per_square=draw(st.sampled_from([0.0, 0.001, 0.1])),
            whole_bucket=draw(st.booleans()),
        ),
    )


def refused(check, *arguments) -> bool:
    """Returns whether a call raises PlanError."""
    try:
        check(*arguments)
    except PlanError:
        return True
    return False
