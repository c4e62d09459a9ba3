"""Predicts how long a plan runs: the clocks of plain 1F1B and of our lockstep pipeline engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorafusion_sched.problem import Clock, Cost, Microbatch, Plan, PlanError, padded


@dataclass(frozen=True, slots=True)
class Span:
    """One forward ("F") or backward ("B") of one slot on one stage."""

    stage: int
    slot: int
    phase: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated run.

    Attributes:
        makespan: time from the first forward to the end of the last backward.
        busy: working time of each stage.
        useful: time that the real tokens alone would take on one stage, without padding, fixed
            costs and waiting.
        spans: every forward and backward, in no particular order.
    """

    makespan: float
    busy: tuple[float, ...]
    useful: float
    spans: tuple[Span, ...]

    @property
    def utilisation(self) -> float:
        """Returns useful time over makespan: 1 is no padding, no fixed cost, no bubble."""
        return self.useful / self.makespan if self.makespan else 0.0

    @property
    def bubble(self) -> float:
        """Returns the share of all stages' time spent waiting."""
        return 1 - sum(self.busy) / (len(self.busy) * self.makespan) if self.makespan else 0.0


def forward_time(microbatch: Microbatch, cost: Cost, tile: int) -> float:
    """Returns the time of one microbatch's forward on one stage; 0 for a no-op."""
    if not microbatch.stretches:
        return 0.0
    rows = microbatch.capacity
    if not cost.whole_bucket:
        rows = sum(padded(stretch.tokens(), tile) for stretch in microbatch.stretches)
    squares = 0
    if cost.per_square:
        squares = sum(x.length**2 for stretch in microbatch.stretches for x in stretch.samples)
    return cost.fixed + cost.per_token * rows + cost.per_square * squares


def slot_times(plan: Plan, cost: Cost) -> list[float]:
    """Returns each slot's forward time: that of its slowest rank."""
    times = [forward_time(microbatch, cost, plan.tile) for microbatch in plan.microbatches]
    return [max(times[i : i + plan.width]) for i in range(0, len(times), plan.width)]


def simulate(plan: Plan, cost: Cost, stages: int, clock: Clock = "1f1b") -> Timeline:
    """Runs a plan on paper.

    Args:
        plan: the plan.
        cost: time of a microbatch on one stage.
        stages: pipeline stages, all equally fast.
        clock: how stages take turns, see `Problem`.

    Raises:
        PlanError: `stages` is not positive.
    """
    if stages < 1:
        raise PlanError(f"stages={stages} must be at least 1")
    forward = slot_times(plan, cost)
    spans: list[Span] = []
    end = makespan(forward, cost.backward, stages, clock, spans)
    busy = [0.0] * stages
    for span in spans:
        busy[span.stage] += span.end - span.start
    samples = [x.length for mb in plan.microbatches for s in mb.stretches for x in s.samples]
    work = cost.per_token * sum(samples) + cost.per_square * sum(n * n for n in samples)
    return Timeline(end, tuple(busy), work * (1 + cost.backward) / plan.width, tuple(spans))


def makespan(
    forward: Sequence[float],
    backward: float,
    stages: int,
    clock: Clock,
    spans: list[Span] | None = None,
) -> float:
    """Returns the end of the last backward.

    Args:
        forward: forward time of each slot on one stage.
        backward: backward time over forward time.
        stages: pipeline stages.
        clock: how stages take turns, see `Problem`.
        spans: filled with every forward and backward, if given.
    """
    run = _one_f_one_b if clock == "1f1b" else _lockstep
    return run(forward, backward, stages, clock, spans)


def _one_f_one_b(
    forward: Sequence[float], backward: float, stages: int, _: Clock, spans: list[Span] | None
) -> float:
    """Stage s alternates backward(m) and forward(m + stages - s); each waits for its neighbour."""
    count = len(forward)
    now, sent = [0.0] * stages, [0.0] * stages  # sent: end of the latest backward
    for slot in range(count + stages):
        arrived = 0.0
        for stage in range(stages):
            back = slot - stages + stage
            if 0 <= back < count:
                start = now[stage]
                if stage + 1 < stages and sent[stage + 1] > start:
                    start = sent[stage + 1]
                sent[stage] = now[stage] = start + backward * forward[back]
                if spans is not None:
                    spans.append(Span(stage, back, "B", start, now[stage]))
            if slot < count:
                start = max(now[stage], arrived)
                arrived = now[stage] = start + forward[slot]
                if spans is not None:
                    spans.append(Span(stage, slot, "F", start, arrived))
    return max(now, default=0.0)


def _lockstep(
    forward: Sequence[float], backward: float, stages: int, clock: Clock, spans: list[Span] | None
) -> float:
    """In each tick every stage runs a forward and a backward of different slots.

    Both orders exchange with both neighbours; "fbh" runs the forward first, so that gradients have
    the forward, and activations the backward, to travel behind.
    """
    count, lag = len(forward), 2 * stages - 1
    now = [0.0] * stages

    def run(phase: str, slots: list[int], factor: float) -> list[float]:
        for stage, slot in enumerate(slots):
            if 0 <= slot < count:
                start = now[stage]
                now[stage] = start + factor * forward[slot]
                if spans is not None:
                    spans.append(Span(stage, slot, phase, start, now[stage]))
        return list(now)

    def wait(issued: list[float]) -> None:
        for stage in range(stages):
            now[stage] = max(now[stage], *issued[max(0, stage - 1) : stage + 2])

    for tick in range(count + lag):
        ahead = [tick - stage for stage in range(stages)]
        back = [tick - lag + stage for stage in range(stages)]
        if clock == "fbh":
            gradients = list(now)
            activations = run("F", ahead, 1.0)
            wait(gradients)
            run("B", back, backward)
        else:
            gradients = run("B", back, backward)
            activations = run("F", ahead, 1.0)
            wait(gradients)
        wait(activations)
    return max(now, default=0.0)
