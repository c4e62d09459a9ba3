"""Other systems' schedules, rebuilt to be measured in the same simulator.

`megatron` and `mlora` keep every rule. `lorafusion` follows the published algorithm (arXiv
2510.00206, section 5) together with its released code's merge and no-op rules, which can leave
dependency violations: its plan may be refused by `verify`, and is simulated as it is.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from itertools import pairwise

from lorafusion_sched.ffd import first_fit_decreasing
from lorafusion_sched.problem import Job, Microbatch, Plan, Problem, Sample, Stretch, padded
from lorafusion_sched.refill import Bin

type Content = dict[tuple[int, int], list[Sample]]  # (job number, batch) -> samples
type Packer = Callable[[list[list[int]], int, int], list[Bin]]  # (lengths, capacity, tile)


def megatron(problem: Problem, *, samples: int = 4) -> Plan:
    """One job after the other, a fixed number of samples per microbatch, a flush after each batch.

    Args:
        problem: what to plan; a flush is `distance - 1` no-ops.
        samples: samples per microbatch, fewer where the capacity would not hold them.
    """
    order = [
        content
        for number, job in enumerate(problem.jobs)
        for batch in range(len(job.batches))
        for content in _chunks(problem, number, batch, samples)
    ]
    return _assemble(problem, _with_noops(problem, order))


def mlora(problem: Problem, *, samples: int = 4) -> Plan:
    """Jobs take turns batch by batch; each microbatch has a fixed number of one job's samples.

    Args:
        problem: what to plan.
        samples: samples per microbatch, fewer where the capacity would not hold them.
    """
    order = [
        content
        for batch in range(_rounds(problem))
        for number, job in enumerate(problem.jobs)
        if batch < len(job.batches)
        for content in _chunks(problem, number, batch, samples)
    ]
    return _assemble(problem, _with_noops(problem, order))


def ffd_bins(lengths: list[list[int]], capacity: int, tile: int) -> list[Bin]:
    """Packs one batch of each job by first-fit decreasing; a `Packer`."""
    names = [(job, i) for job, batch in enumerate(lengths) for i in range(len(batch))]
    items = [(job, lengths[job][i]) for job, i in names]
    bins: list[Bin] = []
    for numbers in first_fit_decreasing(items, capacity, tile):
        content: Bin = {}
        for job, i in (names[number] for number in numbers):
            content.setdefault(job, []).append(i)
        bins.append(content)
    return bins


def lorafusion(problem: Problem, packer: Packer = ffd_bins, *, merge: bool = True) -> Plan:
    """LoRAFusion: groups of jobs, each group's batch packed alone, tails merged, no-ops inserted.

    Args:
        problem: what to plan; `width` must be 1.
        packer: packs one batch of each job of a group: first-fit decreasing or the MILPs.
        merge: whether to merge neighbouring tails.

    Returns:
        The plan, possibly with dependency violations.
    """
    groups = head_tail_groups(problem.jobs, problem.capacities[-1], problem.distance)
    steps: list[list[Content]] = []
    for batch in range(_rounds(problem)):
        for group in groups:
            members = [n for n in group if batch < len(problem.jobs[n].batches)]
            lots = [problem.jobs[n].batches[batch] for n in members]
            lengths = [[sample.length for sample in lot] for lot in lots]
            bins = packer(lengths, problem.capacities[-1], problem.tile)
            steps.append(
                [{(members[j], batch): [lots[j][i] for i in x] for j, x in b.items()} for b in bins]
            )
            _sort(problem, steps[-1])
    if merge:
        _merge_tails(problem, steps)
    steps = _insert_bubbles(_insert_bubbles(steps, problem.distance), problem.distance)
    return _assemble(problem, [content for step in steps for content in step])


def head_tail_groups(jobs: Sequence[Job], capacity: int, stages: int) -> list[list[int]]:
    """Pairs long-sample jobs with short-sample ones while the others can cover a pipeline round.

    Args:
        jobs: the jobs.
        capacity: tokens per microbatch.
        stages: pipeline stages.

    Returns:
        Groups of one or two job numbers.
    """
    lengths = [[sample.length for batch in job.batches for sample in batch] for job in jobs]
    means = [statistics.fmean(x) for x in lengths]
    sizes = [len(job.batches[0]) for job in jobs]
    usual = [math.ceil(g * m / capacity) for g, m in zip(sizes, means, strict=True)]
    least = [
        math.ceil(g * (m - 0.25 * statistics.stdev(x)) / capacity) if len(x) > 1 else 1
        for g, m, x in zip(sizes, means, lengths, strict=True)
    ]
    largest = max(range(len(jobs)), key=lambda n: usual[n])
    if sum(least) - least[largest] < stages - 1:
        return [[n] for n in range(len(jobs))]
    order = sorted(range(len(jobs)), key=lambda n: -means[n])
    groups: list[list[int]] = []
    while len(order) > 1:
        left, right = order[0], order[-1]
        if sum(least) - least[left] - least[right] >= stages - 1:
            groups.append([left, right])
            order = order[1:-1]
        elif usual[left] < usual[right]:
            groups.append([order.pop()])
        else:
            groups.append([order.pop(0)])
    return groups + [[n] for n in order]


def _rounds(problem: Problem) -> int:
    return max((len(job.batches) for job in problem.jobs), default=0)


def _chunks(problem: Problem, number: int, batch: int, samples: int) -> list[Content]:
    """Cuts a batch, in order, into microbatches of `samples` samples that fit."""
    chunks: list[list[Sample]] = [[]]
    for sample in problem.jobs[number].batches[batch]:
        tokens = sum(x.length for x in chunks[-1]) + sample.length
        if len(chunks[-1]) == samples or padded(tokens, problem.tile) > problem.capacities[-1]:
            chunks.append([])
        chunks[-1].append(sample)
    return [{(number, batch): chunk} for chunk in chunks]


def _with_noops(problem: Problem, order: list[Content]) -> list[Content]:
    """Puts each microbatch, in order, at the first position that keeps the distance."""
    result: list[Content] = []
    last: dict[tuple[int, int], int] = {}
    for content in order:
        for job, batch in content:
            start = (last.get((job, batch - 1), -problem.distance) + problem.distance) * 1
            result += [{} for _ in range(start * problem.width - len(result))]
            if any(b != batch for j, b in _slot_lots(problem, result) if j == job):
                result += [{} for _ in range(-len(result) % problem.width)]
        for lot in content:
            last[lot] = len(result) // problem.width
        result.append(content)
    return result + [{} for _ in range(-len(result) % problem.width)]


def _slot_lots(problem: Problem, result: list[Content]) -> list[tuple[int, int]]:
    """Returns the lots of the slot that the next microbatch will join."""
    start = len(result) - len(result) % problem.width
    return [lot for content in result[start:] for lot in content]


def _rows(problem: Problem, content: Content) -> int:
    return sum(padded(sum(s.length for s in x), problem.tile) for x in content.values())


def _sort(problem: Problem, step: list[Content]) -> None:
    step.sort(key=lambda content: -_rows(problem, content))


def _merge_tails(problem: Problem, steps: list[list[Content]]) -> None:
    """Moves the next step's least full microbatch, or part of it, into this step's."""
    for i in range(len(steps) - 1):
        here, after = steps[i], steps[i + 1]
        if not here or not after or _rows(problem, here[-1]) >= problem.capacities[-1]:
            continue
        mine = _members(here)
        again = next((k for k in range(i + 1, len(steps)) if _members(steps[k]) == mine), None)
        if again is None or sum(map(len, steps[i + 1 : again])) < problem.distance - 1:
            continue
        current, following = here[-1], after[-1]
        if any(j == k and b != c for j, b in current for k, c in following):
            continue
        _move_samples(problem, current, following)
        if not following:
            after.pop()
        _sort(problem, here)
        _sort(problem, after)


def _members(step: list[Content]) -> set[int]:
    return {job for job, _ in step[0]} if step else set()


def _move_samples(problem: Problem, to: Content, source: Content) -> None:
    """Moves all samples if they fit, else the shortest ones first while they fit."""
    both = {lot: to.get(lot, []) + source.get(lot, []) for lot in (*to, *source)}
    if _rows(problem, both) <= problem.capacities[-1]:
        to.update(both)
        source.clear()
        return
    for length, lot, sample in sorted((s.length, lot, s) for lot, x in source.items() for s in x):
        before = sum(s.length for s in to.get(lot, []))
        grown = padded(before + length, problem.tile) - padded(before, problem.tile)
        if _rows(problem, to) + grown <= problem.capacities[-1]:
            to.setdefault(lot, []).append(sample)
            source[lot].remove(sample)
    for lot in [lot for lot, x in source.items() if not x]:
        del source[lot]


def _insert_bubbles(steps: list[list[Content]], stages: int) -> list[list[Content]]:
    """Puts one no-op before a step for each of its microbatches that comes too early."""
    flat = [(number, content) for number, step in enumerate(steps) for content in step]
    missing = [0] * len(steps)
    for position, (number, content) in enumerate(flat):
        earlier = flat[max(0, position - stages + 1) : position]
        if any(j == k and b != c for _, x in earlier for j, b in x for k, c in content):
            missing[number] += 1
    return [[{} for _ in range(m)] + step for m, step in zip(missing, steps, strict=True)]


def _assemble(problem: Problem, order: list[Content]) -> Plan:
    """Turns microbatch contents into a plan."""
    last: dict[tuple[int, int], int] = {}
    for position, content in enumerate(order):
        for lot in content:
            last[lot] = position // problem.width
    microbatches = []
    for position, content in enumerate(order):
        stretches = tuple(
            Stretch(
                job=problem.jobs[job].name,
                batch=batch,
                samples=tuple(samples),
                ends=last[job, batch] == position // problem.width,
            )
            for (job, batch), samples in sorted(content.items())
        )
        rows = _rows(problem, content)
        capacity = next(c for c in problem.capacities if c >= rows)
        microbatches.append(Microbatch(stretches, capacity))
    return Plan(
        microbatches=tuple(microbatches),
        tile=problem.tile,
        distance=problem.distance,
        width=problem.width,
    )


def violations(plan: Plan) -> int:
    """Returns how many times a job's batch starts too close to, or before, its previous one."""
    slots: dict[tuple[str, int], list[int]] = {}
    for position, microbatch in enumerate(plan.microbatches):
        for stretch in microbatch.stretches:
            slots.setdefault((stretch.job, stretch.batch), []).append(position // plan.width)
    lots = sorted(slots)
    return sum(
        before[0] == after[0] and min(slots[after]) - max(slots[before]) < plan.distance
        for before, after in pairwise(lots)
    )
