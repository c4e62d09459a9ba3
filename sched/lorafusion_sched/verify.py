"""The checker of plans. Shares no code with the packer, so that a bug there cannot hide here."""

from collections import Counter

from lorafusion_sched.problem import Microbatch, Plan, PlanError, Problem


def verify(problem: Problem, plan: Plan) -> None:
    """Checks that a plan trains exactly what the problem asks for, in a legal order.

    Rules: every sample exactly once (as a multiset) in its own global batch; each microbatch within
    its capacity after padding every stretch to the tile; at most one global batch of a job in a
    slot; batches in order, at least `distance` slots apart, the first not before the job is ready;
    at most `max_active` jobs at a time; end flags on exactly the last slot of each global batch,
    and none on the last batch of an unfinished job.

    Args:
        problem: what had to be planned.
        plan: the answer, from any source.

    Raises:
        PlanError: at the first broken rule; the message names the microbatch and the job.
    """
    for field in ("tile", "distance", "width"):
        asked, got = getattr(problem, field), getattr(plan, field)
        if asked != got:
            raise PlanError(f"the plan was made for {field}={got}, the problem has {field}={asked}")
    if len(plan.microbatches) % problem.width:
        raise PlanError(
            f"{len(plan.microbatches)} microbatches do not fill slots of width {problem.width}"
        )
    names = {job.name for job in problem.jobs}
    for position, microbatch in enumerate(plan.microbatches):
        _check_microbatch(problem, names, position, microbatch)
    slots = _slots_of_batches(problem, plan)
    _check_samples(problem, plan)
    _check_order(problem, slots)
    _check_active(problem, slots)
    _check_ends(problem, plan, slots)


def _check_microbatch(problem: Problem, names: set[str], position: int, mb: Microbatch) -> None:
    where = f"microbatch {position}"
    if mb.capacity not in problem.capacities:
        raise PlanError(f"{where}: capacity {mb.capacity} is not one of {problem.capacities}")
    jobs = [stretch.job for stretch in mb.stretches]
    if len(set(jobs)) != len(jobs):
        raise PlanError(f"{where}: a job has more than one stretch, got jobs {jobs}")
    if problem.max_jobs is not None and len(jobs) > problem.max_jobs:
        raise PlanError(f"{where}: {len(jobs)} jobs, at most {problem.max_jobs} are allowed")
    rows = 0
    for stretch in mb.stretches:
        if stretch.job not in names:
            raise PlanError(f"{where}: unknown job {stretch.job!r}")
        if not stretch.samples:
            raise PlanError(f"{where}: job {stretch.job} has a stretch without samples")
        tokens = 0
        for sample in stretch.samples:
            tokens += sample.length
        while tokens % problem.tile:
            tokens += problem.tile - tokens % problem.tile
        rows += tokens
    if rows > mb.capacity:
        raise PlanError(f"{where}: {rows} rows after padding exceed its capacity {mb.capacity}")


def _slots_of_batches(problem: Problem, plan: Plan) -> dict[tuple[str, int], list[int]]:
    """Returns the slots in which each (job, global batch) appears, ascending."""
    slots: dict[tuple[str, int], list[int]] = {}
    batch_in_slot: dict[tuple[str, int], int] = {}
    for position, microbatch in enumerate(plan.microbatches):
        slot = position // problem.width
        for stretch in microbatch.stretches:
            other = batch_in_slot.setdefault((stretch.job, slot), stretch.batch)
            if other != stretch.batch:
                raise PlanError(
                    f"slot {slot}: job {stretch.job} has samples of global batches {other} and "
                    f"{stretch.batch}"
                )
            slots.setdefault((stretch.job, stretch.batch), []).append(slot)
    return slots


def _check_samples(problem: Problem, plan: Plan) -> None:
    asked = Counter(
        (job.name, number, sample)
        for job in problem.jobs
        for number, batch in enumerate(job.batches)
        for sample in batch
    )
    planned = Counter(
        (stretch.job, stretch.batch, sample)
        for microbatch in plan.microbatches
        for stretch in microbatch.stretches
        for sample in stretch.samples
    )
    if asked != planned:
        missing, extra = list((asked - planned).items()), list((planned - asked).items())
        what, ((job, batch, sample), count) = (
            ("missing", missing[0]) if missing else ("not asked for, or planned twice", extra[0])
        )
        raise PlanError(
            f"job {job}, global batch {batch}: epoch {sample.epoch}, sample {sample.index} of "
            f"{sample.length} tokens is {what} ({count} times); in all {len(missing)} missing and "
            f"{len(extra)} too many"
        )


def _check_order(problem: Problem, slots: dict[tuple[str, int], list[int]]) -> None:
    for job in problem.jobs:
        for number in range(1, len(job.batches)):
            last, first = max(slots[job.name, number - 1]), min(slots[job.name, number])
            if first - last < problem.distance:
                raise PlanError(
                    f"job {job.name}: global batch {number} starts in slot {first}, but batch "
                    f"{number - 1} ends in slot {last}; the distance must be at least "
                    f"{problem.distance}"
                )


def _check_active(problem: Problem, slots: dict[tuple[str, int], list[int]]) -> None:
    spans: list[tuple[int, int, str]] = []
    for job in problem.jobs:
        if job.batches:
            first, last = slots[job.name, 0][0], slots[job.name, len(job.batches) - 1][-1]
            spans.append((first, last, job.name))
            if first < job.ready:
                raise PlanError(
                    f"job {job.name} starts in slot {first}, but is ready in slot {job.ready}"
                )
    if problem.max_active is None:
        return
    holding: list[int] = []  # last slots of the jobs that may still hold an adapter slot
    for first, last, name in sorted(spans):
        holding = [end for end in holding if end + problem.distance > first]
        if len(holding) >= problem.max_active:
            raise PlanError(
                f"job {name} starts in slot {first}, where {len(holding)} other jobs hold all "
                f"{problem.max_active} adapter slots"
            )
        holding.append(last)


def _check_ends(problem: Problem, plan: Plan, slots: dict[tuple[str, int], list[int]]) -> None:
    cut = {(job.name, len(job.batches) - 1) for job in problem.jobs if job.unfinished}
    for position, microbatch in enumerate(plan.microbatches):
        for stretch in microbatch.stretches:
            if (stretch.job, stretch.batch) in cut:
                if stretch.ends:
                    raise PlanError(
                        f"microbatch {position}: job {stretch.job}, global batch {stretch.batch} "
                        "was cut short, but has ends=True"
                    )
                continue
            ends = position // problem.width == max(slots[stretch.job, stretch.batch])
            if stretch.ends is not ends:
                raise PlanError(
                    f"microbatch {position}: job {stretch.job}, global batch {stretch.batch} has "
                    f"ends={stretch.ends}, expected {ends}"
                )
