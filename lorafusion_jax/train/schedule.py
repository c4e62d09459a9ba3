"""From jobs to the one plan of a run: which job holds which slot when, and joins of later jobs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from lorafusion_sched import Job, Microbatch, Plan, Problem, Sample, Stretch, padded, plan, verify


@dataclass(frozen=True)
class Schedule:
    """A verified plan with the slots of its jobs.

    Attributes:
        plan: every sample of every job, once.
        slot: adapter slot of each job.
        first: microbatch with which a job starts: its slot is initialised just before.
        last: microbatch with which a job's last global batch ends: its slot is free after it.
        num_slots: slots in use at the same time, at most.
    """

    plan: Plan
    slot: dict[str, int]
    first: dict[str, int]
    last: dict[str, int]
    num_slots: int


def make_schedule(
    jobs: Sequence[Job],
    *,
    capacities: tuple[int, ...],
    tile: int,
    max_slots: int | None = None,
    done: Sequence[Microbatch] = (),
) -> Schedule:
    """Plans all jobs, at most `max_slots` of them at a time, after what is already done.

    A waiting job starts when another ends: the plan is cut there and the rest is planned anew with
    the waiting job in it.

    Args:
        jobs: complete jobs, in order of admission.
        capacities: microbatch sizes.
        tile: padding multiple of a stretch.
        max_slots: slots there are; None for one per job.
        done: microbatches executed so far; they stay as they are.

    Returns:
        The verified schedule.

    Raises:
        PlanError: a sample fits no capacity.
    """
    limit = max_slots or len(jobs)
    microbatches = list(done)
    started = {stretch.job for m in done for stretch in m.stretches}
    queue = sorted(jobs, key=lambda job: job.name not in started)
    while rest := _rest(queue, microbatches):
        active, waiting = rest[:limit], rest[limit:]
        part = plan(Problem(jobs=tuple(job for job, _ in active), capacities=capacities, tile=tile))
        offsets = {job.name: offset for job, offset in active}
        numbered = [_renumber(m, offsets) for m in part.microbatches]
        cut = _first_end(numbered, active) if waiting else len(numbered)
        microbatches += numbered[:cut]
        queue = [job for job in queue if job.name in {j.name for j, _ in active + waiting}]
    return schedule_of(Plan(microbatches=tuple(microbatches), tile=tile, distance=1, width=1), jobs)


def schedule_of(whole: Plan, jobs: Sequence[Job]) -> Schedule:
    """Verifies a plan of complete jobs and gives each job the lowest slot free when it starts.

    Raises:
        PlanError: the plan does not train exactly these jobs.
    """
    sizes = tuple(sorted({m.capacity for m in whole.microbatches}))
    verify(Problem(jobs=tuple(jobs), capacities=sizes, tile=whole.tile), whole)
    return _with_slots(whole)


def capacity_that_fills(jobs: Iterable[Job], limit: int, tile: int) -> int:
    """Returns the microbatch size to use: `limit`, or less where the data can never fill that.

    A microbatch holds at most one global batch of each job.
    """
    largest = sum(
        max((padded(sum(s.length for s in batch), tile) for batch in job.batches), default=0)
        for job in jobs
    )
    return min(limit, max(largest, tile))


def padding_share(microbatches: Iterable[Microbatch]) -> float:
    """Returns the share of rows that hold no token."""
    rows = tokens = 0
    for microbatch in microbatches:
        rows += microbatch.capacity
        tokens += sum(stretch.tokens() for stretch in microbatch.stretches)
    return 1 - tokens / rows if rows else 0.0


def _rest(jobs: Sequence[Job], done: Sequence[Microbatch]) -> list[tuple[Job, int]]:
    """What remains of each job, and how many of its global batches are complete."""
    gone: dict[str, dict[int, set[Sample]]] = {}
    for microbatch in done:
        for stretch in microbatch.stretches:
            batches = gone.setdefault(stretch.job, {})
            batches.setdefault(stretch.batch, set()).update(stretch.samples)
    rest = []
    for job in jobs:
        seen = gone.get(job.name, {})
        left = [
            tuple(sample for sample in batch if sample not in seen.get(number, ()))
            for number, batch in enumerate(job.batches)
        ]
        complete = next((i for i, batch in enumerate(left) if batch), len(left))
        if complete < len(left):
            rest.append((replace(job, batches=tuple(left[complete:])), complete))
    return rest


def _renumber(microbatch: Microbatch, offsets: dict[str, int]) -> Microbatch:
    stretches = (replace(s, batch=s.batch + offsets[s.job]) for s in microbatch.stretches)
    return Microbatch(tuple(stretches), microbatch.capacity)


def _first_end(microbatches: Sequence[Microbatch], active: list[tuple[Job, int]]) -> int:
    """How many microbatches run until the first of the active jobs is complete."""
    final = {job.name: offset + len(job.batches) - 1 for job, offset in active}
    for index, microbatch in enumerate(microbatches):
        if any(s.ends and s.batch == final[s.job] for s in microbatch.stretches):
            return index + 1
    raise AssertionError("a plan ends every job it holds")


def _with_slots(whole: Plan) -> Schedule:
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, stretch in _stretches(whole):
        first.setdefault(stretch.job, index)
        last[stretch.job] = index
    slot: dict[str, int] = {}
    for index, stretch in _stretches(whole):
        if first[stretch.job] == index:
            taken = {slot[job] for job in slot if last[job] >= index}
            slot[stretch.job] = min(set(range(len(taken) + 1)) - taken)
    return Schedule(whole, slot, first, last, max(slot.values(), default=-1) + 1)


def _stretches(whole: Plan) -> Iterable[tuple[int, Stretch]]:
    for index, microbatch in enumerate(whole.microbatches):
        for stretch in microbatch.stretches:
            yield index, stretch
