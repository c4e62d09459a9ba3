"""Packs one global batch of each job: a start, then a local search that refills bins exactly.

A move empties two to four microbatches, pools their samples and fills all but the last of them as
full as possible; what is left must fit into the last. Repeated, it drains the least full
microbatch into the others.
"""

import random
from collections.abc import Sequence

from lorafusion_sched.bounds import martello_toth_l2, volume_bound
from lorafusion_sched.ffd import first_fit_decreasing
from lorafusion_sched.fill import Pool, fill
from lorafusion_sched.problem import Job, Microbatch, Plan, Problem, Stretch, padded

type Bin = dict[int, list[int]]  # job number -> numbers of its samples

_FFD_LIMIT = 4000  # samples; first-fit decreasing takes quadratic time


def pack(
    lengths: Sequence[Sequence[int]],
    capacity: int,
    tile: int,
    *,
    max_jobs: int | None = None,
    evaluations: int = 80,
    seed: int = 0,
) -> list[Bin]:
    """Packs one global batch of each of some jobs: fewest microbatches, then the emptiest last one.

    Never more microbatches than first-fit decreasing.

    Args:
        lengths: tokens of the samples of each job's batch.
        capacity: rows of a microbatch.
        tile: padding multiple.
        max_jobs: jobs per microbatch at most; None is no limit.
        evaluations: refills to try while there are more microbatches than the lower bound; a
            quarter of them only to empty the last one. 0 is the better of the two starts.
        seed: seed of the search.

    Returns:
        Microbatches, job number -> sample numbers; the least full one is last.
    """
    items = [(job, n) for job, batch in enumerate(lengths) for n in batch]
    if not items:
        return []
    bound = max(
        volume_bound(items, capacity, tile), martello_toth_l2([n for _, n in items], capacity)
    )
    starts = [_fill_all(lengths, capacity, tile, max_jobs)]
    if len(items) <= _FFD_LIMIT:
        starts.append(_ffd_bins(lengths, items, capacity, tile, max_jobs))
    searches = [_Search(lengths, bins, capacity, tile, max_jobs) for bins in starts]
    best = min(searches, key=_Search.key)
    best.drain(bound, evaluations, random.Random(seed))
    return sorted((b for b in best.bins if b), key=best.rows, reverse=True)


def pack_plan(problem: Problem) -> Plan:
    """Plans a problem in which no job has more than one global batch and no slot must wait."""
    jobs = [job for job in problem.jobs if job.batches]
    lengths = [[sample.length for sample in job.batches[0]] for job in jobs]
    bins = pack(lengths, problem.capacities[-1], problem.tile, max_jobs=problem.max_jobs)
    last = {job: number for number, content in enumerate(bins) for job in content}
    microbatches = []
    for number, content in enumerate(bins):
        stretches = tuple(
            _stretch(jobs[job], content[job], last[job] == number) for job in sorted(content)
        )
        rows = sum(padded(stretch.tokens(), problem.tile) for stretch in stretches)
        capacity = next(c for c in problem.capacities if c >= rows)
        microbatches.append(Microbatch(stretches, capacity))
    return Plan(microbatches=tuple(microbatches), tile=problem.tile, distance=1, width=1)


def _stretch(job: Job, numbers: Sequence[int], ends: bool) -> Stretch:
    return Stretch(job.name, 0, tuple(job.batches[0][i] for i in sorted(numbers)), ends)


def _fill_all(
    lengths: Sequence[Sequence[int]], capacity: int, tile: int, max_jobs: int | None
) -> list[Bin]:
    """Fills one microbatch after the other exactly, each around the longest sample left."""
    pools = {job: Pool(batch) for job, batch in enumerate(lengths) if batch}
    bins: list[Bin] = []
    while pools:
        jobs: list[int] = []
        volume = 0
        for job in sorted(pools, key=lambda job: (-pools[job].items[0][0], job)):
            if len(jobs) == max_jobs or (len(jobs) >= 4 and volume >= 2 * capacity):
                break
            jobs.append(job)
            volume += pools[job].tokens
        taken = fill([pools[job] for job in jobs], capacity, tile)
        bins.append({job: numbers for job, numbers in zip(jobs, taken, strict=True) if numbers})
        pools = {job: pool for job, pool in pools.items() if pool.items}
    return bins


def _ffd_bins(
    lengths: Sequence[Sequence[int]],
    items: list[tuple[int, int]],
    capacity: int,
    tile: int,
    max_jobs: int | None,
) -> list[Bin]:
    names = [(job, i) for job, batch in enumerate(lengths) for i in range(len(batch))]
    bins: list[Bin] = []
    for numbers in first_fit_decreasing(items, capacity, tile, max_jobs):
        content: Bin = {}
        for job, i in (names[number] for number in numbers):
            content.setdefault(job, []).append(i)
        bins.append(content)
    return bins


class _Search:
    """Bins under change, and their rows after padding."""

    def __init__(
        self,
        lengths: Sequence[Sequence[int]],
        bins: list[Bin],
        capacity: int,
        tile: int,
        max_jobs: int | None,
    ):
        self.lengths, self.bins, self.capacity, self.tile = lengths, bins, capacity, tile
        self.max_jobs = len(lengths) if max_jobs is None else max_jobs
        self.loads = [self.rows(content) for content in bins]

    def key(self) -> tuple[int, int]:
        return len(self.bins), min(self.loads)

    def rows(self, content: Bin) -> int:
        return sum(
            padded(sum(self.lengths[job][i] for i in numbers), self.tile)
            for job, numbers in content.items()
        )

    def drain(self, bound: int, evaluations: int, order: random.Random) -> None:
        """Empties the least full bin into others until it cannot get emptier or time is up."""
        least_tail = sum(self.loads) - self.capacity * (bound - 1)
        spent = 0.0
        while len(self.bins) > 1 and spent < evaluations:
            above = len(self.bins) > bound
            tail = min(range(len(self.bins)), key=self.loads.__getitem__)
            if not above and self.loads[tail] <= least_tail:
                return
            others = [number for number in range(len(self.bins)) if number != tail]
            partners = order.sample(others, min(len(others), order.choice((1, 2, 2, 3))))
            # While there is a bin too many, moves that only change the bins are worth making too.
            self.refill([*partners, tail], self.loads[tail] + above, order)
            if not self.bins[tail]:
                del self.bins[tail], self.loads[tail]
            spent += 1 if above else 4

    def refill(self, numbers: Sequence[int], limit: int, order: random.Random) -> None:
        """Refills bins, the last one last; kept only if that then has fewer rows than `limit`."""
        pooled: Bin = {}
        for number in numbers:
            for job, samples in self.bins[number].items():
                pooled.setdefault(job, []).extend(samples)
        jobs = list(pooled)
        order.shuffle(jobs)
        pools = [Pool([self.lengths[job][i] for i in pooled[job]]) for job in jobs]
        result: list[Bin] = []
        # Filling the first bin without one sample, drawn at random, gives another bin each time.
        source = order.choice(pools)
        held = source.hold(order.randrange(len(source.items)))
        for _ in numbers[:-1]:
            taken = fill(pools[: self.max_jobs], self.capacity, self.tile, force=False)
            if held:
                held = source.release(held)
            content = zip(jobs, taken, strict=False)
            result.append(
                {job: [pooled[job][i] for i in chosen] for job, chosen in content if chosen}
            )
        rest = {
            job: [pooled[job][-negated] for _, negated in pool.items]
            for job, pool in zip(jobs, pools, strict=True)
            if pool.items
        }
        if self.rows(rest) < limit and len(rest) <= self.max_jobs:
            for number, content in zip(numbers, [*result, rest], strict=True):
                self.bins[number], self.loads[number] = content, self.rows(content)
