"""Sizes at the edge: many jobs, many samples, one huge batch; planning time and memory."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from lorafusion_sched import Cost, Problem, job_from_lengths, plan, verify
from lorafusion_sched.bounds import slots_bound

SCHED = Path(__file__).parents[2] / "sched"


def many(jobs: int, samples: int, gbs: int, **rules) -> Problem:
    rng = random.Random(7)
    return Problem(
        jobs=tuple(
            job_from_lengths(
                f"job{n}",
                [min(4096, 32 + int(rng.expovariate(1 / 500))) for _ in range(samples)],
                global_batch_size=gbs,
            )
            for n in range(jobs)
        ),
        capacities=(8192,),
        **rules,
    )


@pytest.mark.parametrize(
    ("shape", "distance"),
    [
        ((1000, 4, 2), 1),
        ((200, 4, 2), 4),
        ((1, 2000, 2000), 1),
        ((1, 2000, 2000), 4),
        ((1, 300, 1), 4),
        ((40, 1, 1), 4),
    ],
    ids=str,
)
@pytest.mark.scenario("E4")
def test_odd_shapes(shape, distance):
    problem = many(*shape, distance=distance)
    answer = plan(problem)
    verify(problem, answer)
    assert len(answer.microbatches) <= 1.1 * slots_bound(problem) + 2 * distance


def test_a_finer_tile_than_the_fill_counts_in():
    """8192 rows of 1-row tiles are far more units than the exact fill distinguishes."""
    problem = many(3, 40, 20, tile=1)
    answer = plan(problem)
    verify(problem, answer)
    assert len(answer.microbatches) <= 1.05 * slots_bound(problem) + 1


def test_the_smallest_microbatch_there_is():
    """One row, many jobs, a pipeline and attention: targets cannot fall below a tile."""
    jobs = tuple(job_from_lengths(n, [1, 1, 1], global_batch_size=2) for n in "abc")
    cost = Cost(per_square=0.1, whole_bucket=False)
    problem = Problem(jobs=jobs, capacities=(1,), tile=1, distance=3, cost=cost)
    answer = plan(problem)
    verify(problem, answer)
    assert len(answer.microbatches) == 9


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "distance"), [(10, 1), (10, 4), (1000, 1), (1000, 4)])
@pytest.mark.scenario("E4")
def test_a_hundred_thousand_samples(jobs, distance):
    """In a fresh process: under 10 s of CPU time and 500 MB, at most 10% above the bound."""
    code = f"""
import random, re, sys, time
sys.path.insert(0, {str(SCHED)!r})
from lorafusion_sched import Cost, Problem, job_from_lengths, plan, verify
from lorafusion_sched.bounds import slots_bound
rng = random.Random(7)
problem = Problem(jobs=tuple(
    job_from_lengths(str(n), [min(4096, 32 + int(rng.expovariate(1 / 500)))
                              for _ in range(100_000 // {jobs})], global_batch_size=16)
    for n in range({jobs})), capacities=(8192,), distance={distance})
start = time.process_time()
answer = plan(problem)
seconds = time.process_time() - start
verify(problem, answer)
# Not getrusage: its peak is at first that of the process that started this one.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(seconds, int(peak) / 1024, len(answer.microbatches) / slots_bound(problem))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, megabytes, over_bound = map(float, run.stdout.split())
    assert seconds < 10
    assert megabytes < 500
    assert over_bound < 1.1
