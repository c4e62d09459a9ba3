"""Which phase order a run takes: by the plans that each of them allows."""

from collections.abc import Callable

from lorafusion_jax.parallel.pipeline import Order
from lorafusion_jax.train.schedule import Schedule
from lorafusion_sched import Plan, distance_of

HEAD_EXCHANGE = 0.02
"""Share of a tick by which "bfh" is slower: the head's exchanges do not travel behind anything."""


def best_schedule(make: Callable[..., Schedule], *, data: int, stage: int) -> Schedule:
    """Plans for both orders and returns the schedule that is done sooner.

    "bfh" needs one slot less between two global batches of a job, which matters where jobs are few
    and their batches small.

    Args:
        make: `make_schedule` without distance, width and clock.
        data: copies of the pipeline.
        stage: its stages.
    """
    orders: tuple[Order, ...] = ("bfh",) if stage == 1 else ("fbh", "bfh")
    schedules = [
        make(distance=distance_of(order, stage), width=data, clock=order) for order in orders
    ]
    costs = [len(s.plan.microbatches) * (1 + HEAD_EXCHANGE * i) for i, s in enumerate(schedules)]
    return schedules[costs.index(min(costs))]


def order_of(plan: Plan, stage: int) -> Order:
    """Returns the order that a plan was made for; "fbh" where it was made for another mesh."""
    return "bfh" if stage == 1 or plan.distance == distance_of("bfh", stage) else "fbh"
