"""Which phase order a run takes: by the plans that each of them allows."""

from collections.abc import Callable

from lorafusion_jax.parallel.pipeline import Order
from lorafusion_jax.train.schedule import Schedule
from lorafusion_sched import Plan, distance_of

HEAD_EXCHANGE = 0.02
"""Share of a tick by which "bfh" is slower: the head's exchanges do not travel behind anything."""


def best_schedule(make: Callable[..., Schedule], *, data: int, stage: int) -> Schedule:
    """Plans for both orders and returns the schedule that is done sooner.

    Args:
        make: `make_schedule` without distance, width and clock.
        data: copies of the pipeline.
        stage: its stages.
    """
    return faster(make, lambda schedule: schedule.plan, data=data, stage=stage)[1]


def faster[T](
    make: Callable[..., T], plan_of: Callable[[T], Plan], *, data: int, stage: int
) -> tuple[Order, T]:
    """Plans for both orders; returns the one whose stream ends sooner, and what was made for it.

    "bfh" needs one slot less between two global batches of a job, which matters where jobs are few
    and their batches small.

    Args:
        make: takes distance, width and clock.
        plan_of: the plan in what `make` returns.
        data: copies of the pipeline.
        stage: its stages.
    """
    orders: tuple[Order, ...] = ("bfh",) if stage == 1 else ("fbh", "bfh")
    made = [make(distance=distance_of(order, stage), width=data, clock=order) for order in orders]
    costs = [len(plan_of(x).microbatches) * (1 + HEAD_EXCHANGE * i) for i, x in enumerate(made)]
    best = costs.index(min(costs))
    return orders[best], made[best]


def order_of(plan: Plan, stage: int) -> Order:
    """Returns the order that a plan was made for; "fbh" where it was made for another mesh."""
    return "bfh" if stage == 1 or plan.distance == distance_of("bfh", stage) else "fbh"
