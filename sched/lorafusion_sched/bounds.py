"""Lower bounds: how few microbatches and slots any plan can have."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate

from lorafusion_sched.ffd import Item
from lorafusion_sched.problem import Problem, padded


def volume_bound(items: Iterable[Item], capacity: int, tile: int) -> int:
    """Returns the bins that the rows need: each job's tokens padded once, over the capacity."""
    tokens: dict[int, int] = {}
    for job, length in items:
        tokens[job] = tokens.get(job, 0) + length
    return -(-sum(padded(n, tile) for n in tokens.values()) // capacity)


def martello_toth_l2(lengths: Sequence[int], capacity: int) -> int:
    """Returns the L2 bound on bins (Martello and Toth, Knapsack Problems, 1990, section 8.3).

    For each threshold k: items over `capacity - k` are alone, those over half a bin have one each,
    and those of at least k only use the room that the latter leave.

    Args:
        lengths: item sizes, each at most `capacity`.
        capacity: size of a bin.
    """
    items = sorted(lengths)
    sums = [0, *accumulate(items)]
    best = -(-sums[-1] // capacity)
    half = bisect_right(items, capacity // 2)
    for k in {0, *items[:half]}:
        least = bisect_right(items, k - 1)
        alone = bisect_right(items, capacity - k)
        large = alone - half
        small_volume = sums[half] - sums[least]
        room = large * capacity - (sums[alone] - sums[half])
        extra = max(0, -(-(small_volume - room) // capacity))
        best = max(best, len(items) - half + extra)
    return best


def slots_bound(problem: Problem) -> int:
    """Returns the slots, no-ops included, that any plan of the problem has at least.

    The larger of the volume over all slots and the longest job's chain: each batch's own slots,
    then `distance - 1` others before its next batch.
    """
    row = problem.capacities[-1] * problem.width
    volume = -(
        -sum(
            padded(sum(sample.length for sample in batch), problem.tile)
            for job in problem.jobs
            for batch in job.batches
        )
        // row
    )
    chains = [
        sum(-(-sum(sample.length for sample in batch) // row) for batch in job.batches)
        + (len(job.batches) - 1) * (problem.distance - 1)
        for job in problem.jobs
        if job.batches
    ]
    return max([volume, *chains])
