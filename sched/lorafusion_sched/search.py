"""Chooses how to pack: streams with different settings, compared by simulated time."""

from dataclasses import replace
from itertools import islice

from lorafusion_sched.problem import Job, Microbatch, Plan, Problem, padded
from lorafusion_sched.refill import pack_plan
from lorafusion_sched.simulate import makespan, slot_times
from lorafusion_sched.stream import Policy, Settings, Stream, stream

_TRIAL_SLOTS = 64  # settings are compared on this many slots first
_FULL_LIMIT = 10_000  # samples; settings of larger problems are not compared in full
_FINALS = 3  # settings compared in full, with both policies
_FINAL_SIZES, _FINAL_PAIRS = 3, 2  # capacities, and pairs of them, compared in full
_FRACTIONS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.52, 0.44)
_MAX_SQUARES = 0.02  # below this share of the time, attention does not decide how to pack


def plan_time(problem: Problem, plan: Plan) -> float:
    """Returns the makespan that the problem's cost and clock predict for a plan."""
    times = slot_times(plan, problem.cost)
    return makespan(times, problem.cost.backward, problem.stages, problem.clock)


def plan(problem: Problem) -> Plan:
    """Plans a problem: every sample once, in few full microbatches, in a legal order.

    On one device the jobs progress evenly, and a single global batch of each is packed by search.
    On a pipeline the plan is the fastest, by the problem's cost and clock, of streams with
    different targets, focus and policy; settings are compared on the first slots, the best few in
    full.

    Args:
        problem: jobs, capacities and the pipeline's rules.

    Returns:
        The plan; the same for the same problem in every process.
    """
    if _serial(problem) and all(_one_batch(job) for job in problem.jobs):
        if problem.max_active is None or len(problem.jobs) <= problem.max_active:
            return pack_plan(problem)
    return _plan_stream(problem, _FINALS)


def _plan_stream(problem: Problem, finals: int) -> Plan:
    """Plans with the settings that look best on the first slots, `finals` of them in full."""
    ranked = sorted(_trials(problem), key=lambda settings: _pace(problem, settings))
    if _serial(problem) or not _few_samples(problem):
        return stream(problem, ranked[0])
    policies: tuple[Policy, ...] = ("even", "critical")
    tried = [replace(settings, policy=p) for settings in ranked[:finals] for p in policies]
    plans = [stream(problem, settings) for settings in tried]
    return min(plans, key=lambda answer: plan_time(problem, answer))


def _few_samples(problem: Problem) -> bool:
    return sum(len(batch) for job in problem.jobs for batch in job.batches) <= _FULL_LIMIT


def _one_batch(job: Job) -> bool:
    return len(job.batches) < 2 and not job.ready and not job.unfinished


def _serial(problem: Problem) -> bool:
    return problem.distance == problem.width == 1


def _trials(problem: Problem) -> list[Settings]:
    """Returns the settings worth trying; one device needs no balance, so no targets."""
    targets = [Settings()] if _serial(problem) else _targets(problem)
    foci = (0.1, 1.0) if _serial(problem) else (0.1, 0.5, 2.0)
    return [replace(target, focus=focus) for target in targets for focus in foci]


def _targets(problem: Problem) -> list[Settings]:
    """Returns the fill targets worth trying, fullest first."""
    largest = problem.capacities[-1]
    if problem.cost.whole_bucket:
        settings = [Settings(target=c) for c in reversed(problem.capacities)]
    else:
        targets = {*problem.capacities, *_steps(largest, problem.tile)}
        settings = [Settings(target=t) for t in sorted(targets, reverse=True)]
    cost = problem.cost
    lengths = [s.length for job in problem.jobs for b in job.batches for s in b]
    squares = cost.per_square * sum(n * n for n in lengths)
    linear = cost.per_token * sum(lengths)
    if linear and squares > _MAX_SQUARES * linear:
        full = round(largest * (1 + squares / linear))
        settings += [Settings(target=t, by_time=True) for t in _steps(full, problem.tile)]
    return settings


def _steps(full: int, tile: int) -> list[int]:
    return list(dict.fromkeys(max(tile, padded(round(full * f), tile)) for f in _FRACTIONS))


def _pace(problem: Problem, settings: Settings) -> float:
    """Returns the simulated time per useful time of the first slots."""
    source = Stream(problem, settings)
    slots = list(islice(iter(source.next_slot, None), _TRIAL_SLOTS))
    microbatches = [microbatch for slot in slots for microbatch in slot]
    part = Plan(
        microbatches=tuple(microbatches),
        tile=problem.tile,
        distance=problem.distance,
        width=problem.width,
    )
    useful = sum(_useful(problem, microbatch) for microbatch in microbatches)
    return plan_time(problem, part) / useful if useful else 0.0


def _useful(problem: Problem, microbatch: Microbatch) -> float:
    cost = problem.cost
    lengths = [x.length for stretch in microbatch.stretches for x in stretch.samples]
    return cost.per_token * sum(lengths) + cost.per_square * sum(n * n for n in lengths)


def choose_capacity(problem: Problem) -> Problem:
    """Chooses the capacities jointly with the schedule that they allow.

    Args:
        problem: its capacities are the sizes to choose from; the largest is what memory allows.

    Returns:
        The problem with one or two of the capacities: those whose plan is fastest by the problem's
        cost and clock, a second one (another compilation) only where it gains at least 2%.
    """
    if not problem.cost.whole_bucket:  # no microbatch is longer than what it holds: one plan tells
        used = max((mb.capacity for mb in plan(problem).microbatches), default=0)
        return replace(problem, capacities=(max(used, problem.capacities[0]),))
    longest = max((s.length for job in problem.jobs for b in job.batches for s in b), default=1)
    fits = [c for c in problem.capacities if c >= longest]
    best, best_time = _fastest(problem, [(c,) for c in fits], _FINAL_SIZES)
    # A second size for what is left over, or the other way round: a larger one for the longest
    # samples, which would make all other microbatches long too.
    larger = sorted({fits[0], *best.capacities})
    twos = [(small, c) for c in larger for small in problem.capacities if small < c]
    if twos:
        pair, time = _fastest(problem, twos, _FINAL_PAIRS)
        if time < 0.98 * best_time:
            return pair
    return best


def _fastest(problem: Problem, sizes: list[tuple[int, ...]], finals: int) -> tuple[Problem, float]:
    """Compares sets of capacities on the first slots, the best few in full."""
    candidates = [replace(problem, capacities=capacities) for capacities in sizes]
    paces = [min(_pace(one, settings) for settings in _trials(one)) for one in candidates]
    ranked = sorted(range(len(candidates)), key=paces.__getitem__)
    count = finals if _few_samples(problem) else 1
    times = {i: plan_time(candidates[i], _plan_stream(candidates[i], 1)) for i in ranked[:count]}
    best = min(times, key=times.__getitem__)
    return candidates[best], times[best]
