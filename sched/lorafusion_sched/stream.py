"""Packs all jobs into one stream of slots, each microbatch filled from every batch that is ready.

A job's next global batch becomes ready `distance` slots after the last microbatch of the one
before. Because a microbatch takes from all ready batches at once, jobs stagger by themselves, the
half-empty tail of one batch is filled by the head of another, and an empty slot (a no-op) appears
only where nothing is ready. The stream decides slot by slot and never looks further, so jobs may
join, be cancelled or stop while it runs.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Literal

from lorafusion_sched.fill import Pool, fill
from lorafusion_sched.problem import Job, Microbatch, Plan, PlanError, Problem, Stretch, padded

type Policy = Literal["even", "critical"]
type Share = tuple["_Line", list[int]]  # a job and the sample numbers of its open batch


@dataclass(frozen=True, slots=True)
class Settings:
    """How a stream packs.

    Attributes:
        policy: "even" keeps all jobs at the same batch number, so short jobs end early;
            "critical" puts the job with the longest remaining chain of batches first.
        focus: how much finishing the most urgent batch counts against fuller microbatches; above
            0, its tokens weigh up to 1 + focus times those of the least urgent one.
        target: size to which microbatches are filled, in rows, or with `by_time` the linear rows
            that take the same time; lower targets make more, more equal microbatches. A longer
            sample still gets the room it needs. None is the largest capacity.
        by_time: fill to equal time under the problem's cost, attention included.
    """

    policy: Policy = "even"
    focus: float = 1.0
    target: int | None = None
    by_time: bool = False


class _Line:
    """One job on its way through the stream: its open batch and when that may start."""

    def __init__(self, job: Job, order: int, ready: int):
        self.job, self.order, self.ready = job, order, ready
        self.turn = 0  # batch number of the others when it started
        self.batch = 0
        self.opened = False
        self.chain: list[float] = []  # see `_chain`
        self.key: tuple[bool, float, int] = (False, 0.0, order)  # place in the queue
        self.pool = Pool([])

    def open(self, size: Callable[[int], int]) -> None:
        self.opened = False
        if not self.done:
            self.pool = Pool([size(sample.length) for sample in self.job.batches[self.batch]])

    @property
    def done(self) -> bool:
        return self.batch == len(self.job.batches)

    @property
    def cut(self) -> bool:
        """Whether the open batch never ends."""
        return self.job.unfinished and self.batch + 1 == len(self.job.batches)


class Stream:
    """Plans slot after slot; jobs may join or leave between two slots.

    Args:
        problem: the rules, and the jobs that are there from the start.
        settings: how to pack.
    """

    def __init__(self, problem: Problem, settings: Settings):
        self.problem, self.settings = problem, settings
        self.slot = 0
        self._joined = 0
        self._active = 0  # jobs that hold an adapter slot
        self._backlog: deque[_Line] = deque()  # jobs that wait for one
        self._rows, self._size = _sizes(problem, settings)
        self._queue: list[_Line] = []  # ready, the most urgent first
        self._waiting: list[tuple[int, int, _Line]] = []  # heap of (ready, order, line)
        for job in problem.jobs:
            self.add(job, ready=job.ready)

    def add(self, job: Job, *, ready: int | None = None) -> None:
        """Lets a job join; it takes turns with the others from now on.

        Args:
            job: a job with a name that is not in the stream.
            ready: first slot in which it may train; None is the next one.

        Raises:
            PlanError: the name is taken, or a sample does not fit.
        """
        if any(line.job.name == job.name for line in (*self._lines(), *self._backlog)):
            raise PlanError(f"job {job.name} is in the stream already")
        if self._joined >= len(self.problem.jobs):
            Problem(jobs=(job,), capacities=self.problem.capacities, tile=self.problem.tile)
        line = _Line(job, self._joined, self.slot if ready is None else ready)
        self._joined += 1
        if not line.done:
            self._backlog.append(line)
            self._admit(0)

    def remove(self, name: str, *, finish_batch: bool = False) -> None:
        """Takes a job out; what is already planned of it stays planned.

        Args:
            name: the job; nothing happens if it has ended.
            finish_batch: whether the rest of its open global batch is still to be planned.
        """
        self._backlog = deque(line for line in self._backlog if line.job.name != name)
        for line in self._lines():
            if line.job.name == name:
                keep = line.batch + 1 if finish_batch and line.opened else 0
                line.job = Job(name=name, batches=line.job.batches[:keep])
                if not keep:
                    line.batch = 0
                    self._active -= 1
        self._queue = [line for line in self._queue if not line.done]
        self._waiting = [entry for entry in self._waiting if not entry[2].done]
        heapify(self._waiting)
        self._admit(self.slot + self.problem.distance - 1)

    def next_slot(self) -> list[Microbatch] | None:
        """Plans one slot of `width` microbatches; None when all jobs have ended."""
        if not self._queue and not self._waiting:
            return None
        while self._waiting and self._waiting[0][0] <= self.slot:
            line = heappop(self._waiting)[2]
            line.key = self._urgency(line)
            insort(self._queue, line, key=_key)
        ranks = [self._fill_one() for _ in range(self.problem.width)]
        microbatches = [self._microbatch(shares) for shares in ranks]
        for line in {line.order: line for shares in ranks for line, _ in shares}.values():
            del self._queue[bisect_left(self._queue, line.key, key=_key)]
            line.opened = True
            if line.pool.items:
                line.key = self._urgency(line)
                insort(self._queue, line, key=_key)
                continue
            line.batch += 1
            line.ready = self.slot + self.problem.distance
            line.open(self._size)
            if not line.done:
                self._wait(line)
            else:
                self._active -= 1
                self._admit(line.ready)
        self.slot += 1
        return microbatches

    def _lines(self) -> list[_Line]:
        return self._queue + [line for _, _, line in self._waiting]

    def _admit(self, ready: int) -> None:
        """Gives the adapter slots that are free from slot `ready` on to jobs of the backlog."""
        limit = self.problem.max_active
        while self._backlog and (limit is None or self._active < limit):
            line = self._backlog.popleft()
            self._active += 1
            line.ready = max(line.ready, ready)
            line.turn = min((other.turn + other.batch for other in self._lines()), default=0)
            line.chain = _chain(line.job, self.problem.distance, self._rows)
            line.open(self._size)
            self._wait(line)

    def _wait(self, line: _Line) -> None:
        heappush(self._waiting, (line.ready, line.order, line))

    def _urgency(self, line: _Line) -> tuple[bool, float, int]:
        if self.settings.policy == "even":
            return False, line.turn + line.batch, line.order
        return not line.opened, -line.chain[line.batch], line.order

    def _fill_one(self) -> list[Share]:
        """Takes the samples of one microbatch from the most urgent batches that could fill it."""
        lines: list[_Line] = []
        volume = 0
        for line in self._queue:
            if len(lines) == self.problem.max_jobs or (
                len(lines) >= 4 and volume >= 2 * self._rows
            ):
                break
            if line.pool.items:
                lines.append(line)
                volume += line.pool.tokens
        if not lines:
            return []
        longest = padded(lines[0].pool.items[0][0], self.problem.tile)
        if longest > self.problem.capacities[-1]:
            # Only a size by time can be so large: this sample takes longer than a full microbatch.
            lines, taken = lines[:1], [lines[0].pool.take([0])]
        else:
            rows = max(self._rows, longest)
            pools = [line.pool for line in lines]
            taken = fill(pools, rows, self.problem.tile, focus=self.settings.focus)
        return [(line, numbers) for line, numbers in zip(lines, taken, strict=True) if numbers]

    def _microbatch(self, shares: list[Share]) -> Microbatch:
        """Adds end flags and the smallest capacity that holds the microbatch."""
        stretches = tuple(
            Stretch(
                job=line.job.name,
                batch=line.batch,
                samples=tuple(line.job.batches[line.batch][i] for i in numbers),
                ends=not line.pool.items and not line.cut,
            )
            for line, numbers in sorted(shares, key=lambda share: share[0].order)
        )
        need = sum(padded(stretch.tokens(), self.problem.tile) for stretch in stretches)
        return Microbatch(stretches, next(c for c in self.problem.capacities if c >= need))


def stream(problem: Problem, settings: Settings) -> Plan:
    """Plans the whole problem in one pass over slots.

    Args:
        problem: what to plan.
        settings: how to pack.

    Returns:
        A plan that respects every rule.
    """
    source = Stream(problem, settings)
    microbatches: list[Microbatch] = []
    while (slot := source.next_slot()) is not None:
        microbatches += slot
    return Plan(
        microbatches=tuple(microbatches),
        tile=problem.tile,
        distance=problem.distance,
        width=problem.width,
    )


def _key(line: _Line) -> tuple[bool, float, int]:
    return line.key


def _sizes(problem: Problem, settings: Settings) -> tuple[int, Callable[[int], int]]:
    """Returns the rows to fill and the size of a sample in them, at least its length."""
    target = problem.capacities[-1] if settings.target is None else settings.target
    rows = min(target // problem.tile * problem.tile, problem.capacities[-1])
    if not settings.by_time or not problem.cost.per_token:
        return rows, lambda length: length
    # Both sum(size) <= rows implies sum(length) <= rows, and it implies sum(time) <= target.
    curve = problem.cost.per_square / problem.cost.per_token
    scale = rows / target
    return rows, lambda length: max(length, round((length + curve * length * length) * scale))


def _chain(job: Job, distance: int, rows: int) -> list[float]:
    """Returns for each batch the slots that it and its successors need at least, alone."""
    chain = [0.0]
    for batch in reversed(job.batches):
        own = max(1.0, sum(sample.length for sample in batch) / rows)
        chain.append(chain[-1] + own + distance - 1)
    return chain[::-1]
