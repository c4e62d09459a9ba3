"""Packs all jobs into one stream of slots, each microbatch filled from every batch that is ready.

A job's next global batch becomes ready `distance` slots after the last microbatch of the one
before. Because a microbatch takes from all ready batches at once, jobs stagger by themselves, the
half-empty tail of one batch is filled by the head of another, and an empty slot (a no-op) appears
only where nothing is ready.
"""

from collections.abc import Sequence
from typing import Literal

from lorafusion_sched.fill import Pool, fill
from lorafusion_sched.problem import Job, Microbatch, Plan, Problem, Stretch, padded

type Policy = Literal["even", "critical"]


class _Line:
    """One job on its way through the stream: its open batch and when that may start."""

    def __init__(self, order: int, job: Job):
        self.order, self.job = order, job
        self.batch, self.ready, self.opened = 0, 0, False
        self.last: list[int] = []  # microbatches of the open batch's latest slot
        self.chain = [0.0] * (len(job.batches) + 1)  # see `_chains`
        self.pool = Pool([])
        self._open()

    def _open(self) -> None:
        if self.batch < len(self.job.batches):
            self.pool = Pool([sample.length for sample in self.job.batches[self.batch]])
        self.opened = False

    def close(self, ready: int) -> None:
        self.batch, self.ready = self.batch + 1, ready
        self._open()

    @property
    def done(self) -> bool:
        return self.batch == len(self.job.batches)


def stream(
    problem: Problem, *, target: int | None = None, focus: float = 0.1, policy: Policy = "even"
) -> Plan:
    """Plans the whole problem in one pass over slots.

    Args:
        problem: what to plan.
        target: rows to which microbatches are filled, at most the largest capacity, a multiple of
            the tile; lower targets make more, more equal microbatches. A longer sample still gets
            the room it needs. None is the largest capacity.
        focus: how much finishing the most urgent batch counts against fuller microbatches.
        policy: "even" keeps all jobs at the same batch number, so short jobs end early;
            "critical" puts the job with the longest remaining chain of batches first.

    Returns:
        A plan that respects every rule.
    """
    target = problem.capacities[-1] if target is None else target
    lines = [_Line(i, job) for i, job in enumerate(problem.jobs) if job.batches]
    for line in lines:
        _set_chain(line, problem.distance, target)
    rows: list[list[tuple[_Line, int, list[int]]]] = []
    slot = 0
    while lines:
        ready = sorted((x for x in lines if x.ready <= slot), key=lambda x: _urgency(x, policy))
        for _ in range(problem.width):
            rows.append(_fill_one(ready, problem, target, focus))
            for line, _, _ in rows[-1]:
                line.opened = True
        for line in ready:
            if not line.pool.items:
                line.close(slot + problem.distance)
        if any(line.done for line in ready):
            lines = [line for line in lines if not line.done]
        slot += 1
    return _to_plan(problem, rows)


def _set_chain(line: _Line, distance: int, target: int) -> None:
    """Sets for each batch the slots that it and its successors need at least, alone."""
    for number in range(len(line.job.batches) - 1, -1, -1):
        tokens = sum(sample.length for sample in line.job.batches[number])
        own = max(1.0, tokens / target) + distance - 1
        line.chain[number] = line.chain[number + 1] + own


def _urgency(line: _Line, policy: Policy) -> tuple[bool, float, int]:
    if policy == "even":
        return False, line.batch, line.order
    return not line.opened, -line.chain[line.batch], line.order


def _fill_one(
    ready: Sequence[_Line], problem: Problem, target: int, focus: float
) -> list[tuple[_Line, int, list[int]]]:
    """Takes the samples of one microbatch: (line, batch, sample indices) of each stretch."""
    open_lines: list[_Line] = []
    tokens = 0
    for line in ready:
        if len(open_lines) == problem.max_jobs or (len(open_lines) >= 4 and tokens >= 2 * target):
            break
        if line.pool.items:
            open_lines.append(line)
            tokens += line.pool.tokens
    if not open_lines:
        return []
    rows = max(target, padded(open_lines[0].pool.items[0][0], problem.tile))
    taken = fill([line.pool for line in open_lines], rows, problem.tile, focus=focus)
    return [(line, line.batch, t) for line, t in zip(open_lines, taken, strict=True) if t]


def _to_plan(problem: Problem, rows: list[list[tuple[_Line, int, list[int]]]]) -> Plan:
    """Adds end flags and the smallest capacity that holds each microbatch."""
    last: dict[tuple[int, int], int] = {}
    for position, row in enumerate(rows):
        for line, batch, _ in row:
            last[line.order, batch] = position // problem.width
    microbatches = []
    for position, row in enumerate(rows):
        stretches = tuple(
            Stretch(
                job=line.job.name,
                batch=batch,
                samples=tuple(line.job.batches[batch][i] for i in indices),
                ends=last[line.order, batch] == position // problem.width,
            )
            for line, batch, indices in sorted(row, key=lambda entry: entry[0].order)
        )
        need = sum(padded(stretch.tokens(), problem.tile) for stretch in stretches)
        capacity = next(c for c in problem.capacities if c >= need)
        microbatches.append(Microbatch(stretches, capacity))
    return Plan(
        microbatches=tuple(microbatches),
        tile=problem.tile,
        distance=problem.distance,
        width=problem.width,
    )
