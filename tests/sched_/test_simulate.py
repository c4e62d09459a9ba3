"""The simulated clocks against closed forms and an independent event-driven simulation."""

import random
from itertools import pairwise

import pytest

from lorafusion_sched import (
    Cost,
    Microbatch,
    Plan,
    PlanError,
    Sample,
    Stretch,
    distance_of,
    simulate,
)
from lorafusion_sched.simulate import Span, forward_time, makespan

CLOCKS = ("1f1b", "bfh", "fbh")


def events_1f1b(forward: list[float], backward: float, stages: int) -> float:
    """Runs every stage's fixed order of work as soon as its inputs are there."""
    count = len(forward)
    todo = []
    for stage in range(stages):
        order = [("F", m) for m in range(min(count, stages - 1 - stage))]
        for m in range(count):
            ahead = m + stages - 1 - stage
            order += [("F", ahead)] * (ahead < count) + [("B", m)]
        todo.append(order)
    done: dict[tuple[str, int, int], float] = {}
    now = [0.0] * stages
    while any(todo):
        for stage in range(stages):
            while todo[stage]:
                phase, m = todo[stage][0]
                needed = (phase, m, stage - 1 if phase == "F" else stage + 1)
                if 0 <= needed[2] < stages and needed not in done:
                    break
                work = forward[m] * (1.0 if phase == "F" else backward)
                now[stage] = max(now[stage], done.get(needed, 0.0)) + work
                done[phase, m, stage] = now[stage]
                todo[stage].pop(0)
    return max(now)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 8])
def test_1f1b_equals_an_event_driven_simulation(stages):
    rng = random.Random(stages)
    for _ in range(20):
        forward = [rng.choice((0.0, rng.random())) for _ in range(rng.randint(1, 20))]
        expected = events_1f1b(forward, 1.7, stages)
        assert makespan(forward, 1.7, stages, "1f1b") == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("stages", [1, 2, 4, 8])
def test_equal_slots_take_count_plus_stages_minus_one(clock, stages):
    """Fill ticks run only forwards and drain ticks only backwards: (M + S - 1)(F + B)."""
    assert makespan([1.0] * 32, 2.0, stages, clock) == pytest.approx((32 + stages - 1) * 3.0)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("stages", [1, 2, 4])
def test_distance_is_what_the_clock_needs(clock, stages):
    """On stage 0, slot m's backward ends before slot m + D's forward starts; D - 1 is too few."""
    spans: list[Span] = []
    makespan([1.0] * 24, 1.1, stages, clock, spans)
    start = {s.slot: s.start for s in spans if s.stage == 0 and s.phase == "F"}
    end = {s.slot: s.end for s in spans if s.stage == 0 and s.phase == "B"}
    distance = distance_of(clock, stages)
    assert all(end[m] <= start[m + distance] + 1e-9 for m in range(24 - distance))
    if distance > 1:
        assert any(end[m] > start[m + distance - 1] + 1e-9 for m in range(24 - distance))


@pytest.mark.parametrize("clock", CLOCKS)
def test_a_stage_does_one_thing_at_a_time(clock):
    rng = random.Random(1)
    spans: list[Span] = []
    makespan([rng.random() for _ in range(30)], 1.5, 4, clock, spans)
    for stage in range(4):
        mine = sorted((s.start, s.end) for s in spans if s.stage == stage)
        assert len(mine) == 60
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(mine))


def plan_of(*lengths: int, capacity: int = 256) -> Plan:
    microbatches = tuple(
        Microbatch(
            (Stretch("a", i, (Sample(0, i, n),), True),) if n else (),
            capacity,
        )
        for i, n in enumerate(lengths)
    )
    return Plan(microbatches=microbatches, tile=128, distance=1, width=1)


def test_costs_of_a_microbatch():
    full = plan_of(100).microbatches[0]
    assert forward_time(full, Cost(), 128) == 256
    assert forward_time(full, Cost(whole_bucket=False), 128) == 128
    cost = Cost(fixed=10, per_token=2, per_square=0.5, whole_bucket=False)
    assert forward_time(full, cost, 128) == 10 + 256 + 5000
    assert forward_time(Microbatch((), 256), cost, 128) == 0


def test_utilisation_counts_real_tokens_only():
    run = simulate(plan_of(128, 64, 0), Cost(backward=1.0, whole_bucket=False), 1)
    assert run.makespan == 512
    assert run.utilisation == pytest.approx((128 + 64) / 256)
    assert run.bubble == 0
    assert simulate(plan_of(), Cost(), 2).utilisation == 0


def test_bad_costs_and_stages_are_refused():
    with pytest.raises(PlanError, match="finite"):
        Cost(per_token=-1.0)
    with pytest.raises(PlanError, match="not all 0"):
        Cost(per_token=0.0)
    with pytest.raises(PlanError, match="stages=0"):
        simulate(plan_of(1), Cost(), 0)
