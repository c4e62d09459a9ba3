"""Plans the rest of a run anew: jobs join, stop early or are cancelled; what has run stays.

A plan is a promise about the future that may be changed at any slot. The microbatches before the
*cursor* have been executed (or are already under way) and are kept as they are. From there on ended
jobs are gone, and the rest is either packed anew, with the new jobs in it, or kept in place.
"""

from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lorafusion_sched.problem import Job, Microbatch, Plan, PlanError, Problem, Sample, Stretch
from lorafusion_sched.search import plan
from lorafusion_sched.verify import verify

type Batches = dict[int, list[Sample]]  # global batch -> samples


@dataclass(frozen=True, slots=True)
class Revision:
    """A changed plan and the problem that it solves.

    Attributes:
        problem: ended jobs reach only as far as they were trained; added jobs are in it.
        plan: verified against it; starts with the executed microbatches.
    """

    problem: Problem
    plan: Plan


def replan(
    problem: Problem,
    current: Plan,
    cursor: int,
    *,
    ended: Mapping[str, int] | None = None,
    added: Sequence[Job] = (),
    repack: bool = True,
) -> Revision:
    """Changes what has not been executed yet.

    Args:
        problem: what `current` solves.
        current: the plan so far.
        cursor: executed microbatches; a whole number of slots. A job that ends in the middle of a
            global batch is marked `unfinished`, and that batch gets no end flag.
        ended: jobs that end, and from which microbatch on nothing of them is trained: the cursor,
            or an earlier one if the run has skipped their samples since then (planning takes time,
            and training does not wait for it). One that is complete already is left alone.
        added: jobs that join. With `Problem.max_active` they may wait for another to end.
        repack: pack the rest anew, so that the others use the room of ended jobs. False leaves
            every other job exactly where it was, and so all of its bits: rows of ended jobs become
            padding, without a pipeline microbatches that this empties are dropped, and jobs that
            join have microbatches of their own between the others', from where an adapter slot is
            free for them. Those that still wait for one get that of a job that has ended.

    Returns:
        The changed problem and its plan, the same in every process for the same arguments.

    Raises:
        PlanError: a name is unknown or taken, a new sample fits no capacity, the cursor is in the
            middle of a slot, or `current` is not of this problem.
    """
    ended = ended or {}
    _check(problem, current, cursor, ended, added)
    done = [
        _without_jobs(mb, {name for name, first in ended.items() if first <= position})
        for position, mb in enumerate(current.microbatches[:cursor])
    ]
    past = trained_batches(done)
    jobs = [
        trained_part(job, past.get(job.name, {})) if job.name in ended else job
        for job in problem.jobs
    ]
    slots = cursor // problem.width
    asked = replace(problem, jobs=(*jobs, *_delayed(added, slots)))
    if repack:
        rest = _pack_rest(asked, done, past)
    else:
        rest = _strip(current.microbatches[cursor:], set(ended), problem)
        if ended:
            rest = _sooner(rest, problem, done, past)
        if added:
            new = tuple(replace(job, ready=0) for job in added)
            rest = _beside(rest, plan(replace(problem, jobs=new)).microbatches, problem, done)
    changed = replace(current, microbatches=(*done, *rest))
    verify(asked, changed)
    return Revision(asked, changed)


def trained_batches(microbatches: Iterable[Microbatch]) -> dict[str, Batches]:
    """Returns which samples of which global batches these microbatches train, by job."""
    result: dict[str, Batches] = {}
    for microbatch in microbatches:
        for stretch in microbatch.stretches:
            batches = result.setdefault(stretch.job, {})
            batches.setdefault(stretch.batch, []).extend(stretch.samples)
    return result


def trained_part(job: Job, past: Batches) -> Job:
    """Returns a job as far as it was trained: `unfinished` if its last global batch was cut short.

    Args:
        job: as it was asked for.
        past: its entry in `trained_batches`.

    Raises:
        PlanError: the samples are not those of the job's first global batches.
    """
    whole = [Counter(batch) for batch in job.batches[: len(past)]]
    parts = [Counter(past[number]) for number in sorted(past)]
    fits = sorted(past) == list(range(len(whole))) and parts[:-1] == whole[:-1]
    if not fits or not all(part <= batch for part, batch in zip(parts, whole, strict=True)):
        raise PlanError(f"job {job.name}: the plan does not train its first global batches")
    # In the job's own order, so that the same part is the same job however it was packed.
    kept = [_in_order(batch, part) for batch, part in zip(job.batches, parts, strict=False)]
    cut = job.unfinished if parts == whole else True
    return replace(job, batches=tuple(kept), unfinished=cut and bool(kept))


def _check(
    problem: Problem,
    current: Plan,
    cursor: int,
    ended: Mapping[str, int],
    added: Sequence[Job],
) -> None:
    if not 0 <= cursor <= len(current.microbatches) or cursor % problem.width:
        raise PlanError(
            f"cursor={cursor} must be a multiple of width={problem.width} from 0 to "
            f"{len(current.microbatches)}"
        )
    names = {job.name for job in problem.jobs}
    if unknown := sorted(set(ended) - names):
        raise PlanError(f"no job {unknown[0]!r}; there are: {', '.join(sorted(names))}")
    for name, first in ended.items():
        if not 0 <= first <= cursor or first % problem.width:
            raise PlanError(
                f"job {name!r} ends at {first}, expected a multiple of width={problem.width} from "
                f"0 to {cursor=}"
            )
    if taken := sorted(names & {job.name for job in added}):
        raise PlanError(f"job {taken[0]!r} is in the plan already; choose another name")


def _delayed(added: Sequence[Job], slots: int) -> list[Job]:
    """New jobs cannot train in slots that have passed."""
    return [replace(job, ready=max(job.ready, slots)) for job in added]


def _without_jobs(microbatch: Microbatch, names: set[str]) -> Microbatch:
    if not names:
        return microbatch
    return replace(
        microbatch, stretches=tuple(s for s in microbatch.stretches if s.job not in names)
    )


def _strip(rest: Sequence[Microbatch], ended: set[str], problem: Problem) -> list[Microbatch]:
    """Takes stretches out; slots that this empties go, unless others need them as distance."""
    kept = []
    for start in range(0, len(rest), problem.width):
        slot = rest[start : start + problem.width]
        stripped = [_without_jobs(mb, ended) for mb in slot]
        was_empty = not any(mb.stretches for mb in slot)
        if problem.distance > 1 or was_empty or any(mb.stretches for mb in stripped):
            kept += stripped
    return kept


def _sooner(
    rest: list[Microbatch], problem: Problem, done: Sequence[Microbatch], begun: Container[str]
) -> list[Microbatch]:
    """Lets jobs that wait in slots of their own begin where an adapter slot is free now.

    What a slot holds stays together, so no bit of theirs changes. On a pipeline they stay where
    they are: the slots of others may be what keeps their global batches apart.
    """
    if problem.distance > 1:
        return rest
    for name in dict.fromkeys(s.job for mb in rest for s in mb.stretches if s.job not in begun):
        slots = _slots(rest, problem.width)
        if any(name in jobs and len(jobs) > 1 for jobs in map(_jobs_in, slots)):
            continue
        own = [mb for slot in slots if name in _jobs_in(slot) for mb in slot]
        others = [mb for slot in slots if name not in _jobs_in(slot) for mb in slot]
        moved = _beside(others, own, problem, done)
        if _first_of(name, moved) < _first_of(name, rest):
            rest = moved
    return rest


def _slots(microbatches: Sequence[Microbatch], width: int) -> list[list[Microbatch]]:
    return [list(microbatches[at : at + width]) for at in range(0, len(microbatches), width)]


def _jobs_in(microbatches: Iterable[Microbatch]) -> set[str]:
    return {stretch.job for microbatch in microbatches for stretch in microbatch.stretches}


def _first_of(name: str, microbatches: Sequence[Microbatch]) -> int:
    return next(i for i, mb in enumerate(microbatches) if name in _jobs_in([mb]))


def _room_from(slots: Sequence[Sequence[Microbatch]], count: int, problem: Problem) -> int | None:
    """Returns the slot from which on `count` more jobs find an adapter slot; None if none does.

    A job holds its own for `distance - 1` slots after its last.
    """
    if problem.max_active is None:
        return 0
    last = {name: number for number, slot in enumerate(slots) for name in _jobs_in(slot)}
    room = problem.max_active - count  # jobs that may still be there
    if room < 0:
        return None
    ends = sorted(last.values(), reverse=True)
    return ends[room] + problem.distance if room < len(ends) else 0


def _beside(
    rest: list[Microbatch],
    own: Sequence[Microbatch],
    problem: Problem,
    done: Sequence[Microbatch],
) -> list[Microbatch]:
    """Puts slots of jobs of their own evenly between those of the others.

    They begin where adapter slots are free for all of them: those of jobs that have just ended are
    not yet.
    """
    width = problem.width
    past, theirs, new = (_slots(mbs, width) for mbs in (done, rest, own))
    room = _room_from([*past, *theirs], len(_jobs_in(own)), problem)
    start = None if room is None else max(0, room - len(past))
    if start is None or start > len(theirs):
        empty = Microbatch((), problem.capacities[0])
        return [*rest, *[empty] * (width * (problem.distance - 1)), *own]
    later = theirs[start:]
    # Of equal fractions the older job comes first. Distances only grow.
    ranked = sorted(
        [((i + 1) / len(later), 0, slot) for i, slot in enumerate(later)]
        + [((i + 1) / len(new), 1, slot) for i, slot in enumerate(new)],
        key=lambda entry: entry[:2],
    )
    return [mb for slot in [*theirs[:start], *(slot for _, _, slot in ranked)] for mb in slot]


def _pack_rest(
    asked: Problem, done: Sequence[Microbatch], past: dict[str, Batches]
) -> list[Microbatch]:
    """Plans what is left, with slot 0 at the cursor, and counts batches from the job's first."""
    slots = len(done) // asked.width
    last = _last_slots(done, asked.width)
    begun, waiting, offsets = [], [], {}
    for job in asked.jobs:
        left = [
            _without(batch, past.get(job.name, {}).get(n)) for n, batch in enumerate(job.batches)
        ]
        first = next((n for n, batch in enumerate(left) if batch), None)
        if first is None or job.unfinished:
            continue
        offsets[job.name] = first
        ready = job.ready
        if first and len(left[first]) == len(job.batches[first]):
            ready = last[job.name, first - 1] + asked.distance
        part = replace(job, batches=tuple(left[first:]), ready=max(0, ready - slots))
        (begun if job.name in past else waiting).append(part)
    if asked.max_active is not None:
        waiting = _after_ended(waiting, asked, last, {job.name for job in begun}, slots)
    rest = plan(replace(asked, jobs=(*begun, *waiting)))
    return [_renumbered(microbatch, offsets) for microbatch in rest.microbatches]


def _after_ended(
    waiting: list[Job],
    asked: Problem,
    last: dict[tuple[str, int], int],
    begun: set[str],
    slots: int,
) -> list[Job]:
    """Adapter slots of jobs that have ended are free `distance` slots after their last."""
    ends = [slot for (name, _), slot in last.items() if name not in begun]
    free = max((end + asked.distance - slots for end in ends), default=0)
    return [replace(job, ready=max(job.ready, free)) for job in waiting]


def _last_slots(done: Sequence[Microbatch], width: int) -> dict[tuple[str, int], int]:
    return {
        (stretch.job, stretch.batch): position // width
        for position, microbatch in enumerate(done)
        for stretch in microbatch.stretches
    }


def _without(batch: Sequence[Sample], gone: Iterable[Sample] | None) -> tuple[Sample, ...]:
    if gone is None:
        return tuple(batch)
    left = Counter(batch) - Counter(gone)
    return _in_order(batch, left)


def _in_order(batch: Sequence[Sample], chosen: Counter[Sample]) -> tuple[Sample, ...]:
    left, result = Counter(chosen), []
    for sample in batch:
        if left[sample] > 0:
            left[sample] -= 1
            result.append(sample)
    return tuple(result)


def _renumbered(microbatch: Microbatch, offsets: dict[str, int]) -> Microbatch:
    stretches = tuple(
        Stretch(s.job, s.batch + offsets[s.job], s.samples, s.ends) for s in microbatch.stretches
    )
    return Microbatch(stretches, microbatch.capacity)
