"""From jobs to the one plan of a run: which job holds which slot when, and changes on the way."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorafusion_sched import (
    Clock,
    Cost,
    Job,
    Microbatch,
    Plan,
    Problem,
    padded,
    replan,
    trained_batches,
    trained_part,
    verify,
)


@dataclass(frozen=True)
class Schedule:
    """A verified plan with the adapter slots of its jobs.

    Attributes:
        problem: what the plan solves; a job that ended early reaches as far as it was trained.
        plan: every sample of every job, once.
        slot: adapter slot of each job that trains.
        first: microbatch with which a job starts: its slot is initialised just before.
        last: microbatch with which a job's last global batch ends: its slot is free after it.
        num_slots: slots in use at the same time, at most.
    """

    problem: Problem
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
    ended: Mapping[str, int] | None = None,
    slots: Mapping[str, int] | None = None,
    distance: int = 1,
    width: int = 1,
    clock: Clock = "1f1b",
    cost: Cost | None = None,
) -> Schedule:
    """Plans all jobs, at most `max_slots` of them at a time, after what is already done.

    A waiting job starts when another ends.

    Args:
        jobs: complete jobs, in order of admission.
        capacities: microbatch sizes.
        tile: padding multiple of a stretch.
        max_slots: slots there are; None for one per job.
        done: microbatches executed so far; they stay as they are.
        ended: jobs that stopped early or were cancelled, and from which microbatch on.
        slots: adapter slots of the jobs that have started; None is the lowest free one for each.
        distance: see `lorafusion_sched.Problem`; also the next three.
        width: microbatches per slot of the pipeline.
        clock: how pipeline stages take turns.
        cost: time of a microbatch.

    Returns:
        The verified schedule.

    Raises:
        PlanError: a sample fits no capacity.
    """
    begun = {name for mb in done for name in (stretch.job for stretch in mb.stretches)}
    if max_slots is not None:  # more may be under way if there were more slots before
        max_slots = max(max_slots, len(begun.difference(ended or ())))
    problem = Problem(
        jobs=tuple(jobs),
        capacities=tuple(sorted({*capacities, *(mb.capacity for mb in done)})),
        tile=tile,
        distance=distance,
        width=width,
        max_active=max_slots,
        clock=clock,
        cost=cost or Cost(),
    )
    so_far = Plan(microbatches=tuple(done), tile=tile, distance=distance, width=width)
    revision = replan(problem, so_far, len(done), ended=ended)
    # A waiting job's slot was free for it in the old plan only.
    held = {name: slot for name, slot in (slots or {}).items() if name in begun}
    return _with_slots(revision.problem, revision.plan, held)


def schedule_of(
    whole: Plan,
    jobs: Sequence[Job],
    *,
    capacities: tuple[int, ...] = (),
    ended: Collection[str] = (),
    slots: Mapping[str, int] | None = None,
    clock: Clock = "1f1b",
    cost: Cost | None = None,
) -> Schedule:
    """Verifies a plan of complete jobs and gives each job the lowest slot free when it starts.

    Args:
        whole: the plan.
        jobs: complete jobs.
        capacities: microbatch sizes that a change of the plan may use beside its own.
        ended: jobs that stopped early or were cancelled: the plan may train less of them.
        slots: adapter slots of jobs, where they are not to be found anew.
        clock: see `make_schedule`; also the next.
        cost: time of a microbatch.

    Raises:
        PlanError: the plan does not train exactly these jobs.
    """
    past = trained_batches(whole.microbatches) if ended else {}
    problem = Problem(
        jobs=tuple(
            trained_part(job, past.get(job.name, {})) if job.name in ended else job for job in jobs
        ),
        capacities=tuple(sorted({*capacities, *(m.capacity for m in whole.microbatches)})),
        tile=whole.tile,
        distance=whole.distance,
        width=whole.width,
        clock=clock,
        cost=cost or Cost(),
    )
    verify(problem, whole)
    return _with_slots(problem, whole, slots or {})


def reschedule(
    schedule: Schedule,
    cursor: int,
    *,
    ended: Mapping[str, int] | None = None,
    added: Sequence[Job] = (),
    repack: bool = True,
    max_slots: int | None = None,
) -> Schedule:
    """Changes what follows the cursor: jobs stop early, are cancelled, or join.

    Args:
        schedule: so far.
        cursor: microbatches that stay as they are, executed or about to be.
        ended: jobs that end, and the microbatch from which on nothing of them is trained.
        added: complete jobs that join.
        repack: see `lorafusion_sched.replan`: False changes no bit of the other jobs.
        max_slots: adapter slots there are; None leaves the limit as it is.

    Returns:
        The verified schedule; jobs that have started keep their slots.

    Raises:
        PlanError: a name is unknown or taken, or a sample fits no capacity.
    """
    problem = schedule.problem
    if max_slots is not None:
        problem = replace(problem, max_active=max_slots)
    revision = replan(problem, schedule.plan, cursor, ended=ended, added=added, repack=repack)
    held = {name: slot for name, slot in schedule.slot.items() if schedule.first[name] < cursor}
    return _with_slots(revision.problem, revision.plan, held)


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


def _with_slots(problem: Problem, whole: Plan, held: Mapping[str, int]) -> Schedule:
    """Gives each job its slot; one is free again `distance` pipeline slots after its job's last."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, microbatch in enumerate(whole.microbatches):
        for stretch in microbatch.stretches:
            first.setdefault(stretch.job, index)
            last[stretch.job] = index
    slot = {name: number for name, number in held.items() if name in first}
    in_order = sorted((name for name in first if name not in slot), key=lambda name: first[name])
    for name in in_order:
        start, end = first[name] // whole.width, last[name] // whole.width
        taken = {
            number
            for other, number in slot.items()
            if first[other] // whole.width < end + whole.distance
            and last[other] // whole.width + whole.distance > start
        }
        slot[name] = min(set(range(len(taken) + 1)) - taken)
    return Schedule(problem, whole, slot, first, last, max(slot.values(), default=-1) + 1)
