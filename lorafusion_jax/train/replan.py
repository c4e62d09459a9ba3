"""Changes the plan of a run while it trains: a thread plans, training goes on with the old plan."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lorafusion_jax.train.schedule import Schedule, reschedule
from lorafusion_sched import Job

HEAD_START = 8
"""Microbatches that still run by the old plan, at least."""

SHARE = 64
"""And one for so many left: a slot takes about a millisecond to plan, and many to train."""


@dataclass(frozen=True)
class Change:
    """A change of plan that is being worked on.

    Attributes:
        swap: microbatch from which on the new plan holds; a function of the run's state alone,
            never of how fast the planner is, so that a repeated run changes at the same place.
        ended: jobs that end, and the microbatch from which on nothing of them is trained.
        added: names of the jobs that join.
        repack: whether the rest is packed anew (`reschedule`).
    """

    swap: int
    ended: dict[str, int] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    repack: bool = False

    def to_record(self) -> dict[str, Any]:
        """Returns it as JSON values, for the checkpoint."""
        return asdict(self) | {"added": list(self.added)}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Change":
        """Reads what `to_record` returned."""
        return cls(**{**record, "added": tuple(record["added"])})


class Replanner:
    """Plans changes in a thread of its own.

    Jobs that have ended are skipped by training at once, their rows being padding until the new
    plan holds; jobs that join wait for it. A change asked for while another one is being planned is
    made together with it.

    Args:
        num_slots: adapter slots of the bank.
    """

    def __init__(self, num_slots: int):
        self._num_slots = num_slots
        self._pool = ThreadPoolExecutor(1, "planner")
        self._planned: Future[Schedule] | None = None
        self._added: list[Job] = []
        self.pending: Change | None = None

    def request(
        self,
        schedule: Schedule,
        cursor: int,
        *,
        ended: Sequence[str] = (),
        added: Sequence[Job] = (),
        repack: bool = True,
    ) -> Change:
        """Starts to plan a change.

        Args:
            schedule: that training follows now.
            cursor: next microbatch to train.
            ended: jobs that training skips from the cursor on.
            added: complete jobs that join.
            repack: whether the rest may be packed anew; False keeps every bit of the other jobs.

        Raises:
            PlanError: a name is taken, or a sample fits no capacity; nothing has changed then.
        """
        problem = schedule.problem
        replace(problem, jobs=(*problem.jobs, *self._added, *added))  # checks the new jobs
        before = self.pending or Change(cursor)
        # One that ends before it is in a plan never comes into one.
        joining = [job for job in (*self._added, *added) if job.name not in ended]
        never = {job.name for job in self._added}
        change = Change(
            swap=_swap(schedule, cursor),
            ended=before.ended | {name: cursor for name in ended if name not in never},
            added=tuple(job.name for job in joining),
            repack=before.repack or repack,
        )
        self.start(schedule, change, joining)
        return change

    def start(self, schedule: Schedule, change: Change, added: Sequence[Job]) -> None:
        """Starts to plan a given change: after a resume, the one that was being planned."""
        self.pending, self._added = change, list(added)
        if self._planned is not None:
            self._planned.cancel()
        self._planned = self._pool.submit(
            reschedule,
            schedule,
            change.swap,
            ended=change.ended,
            added=tuple(added),
            repack=change.repack,
            max_slots=self._num_slots,
        )

    def take(self, cursor: int) -> Schedule | None:
        """Returns the new schedule when its time has come, None before and after.

        Waits for the planner if it is late, which the head start is there to prevent.

        Args:
            cursor: next microbatch to train.
        """
        if self.pending is None or self._planned is None or cursor < self.pending.swap:
            return None
        schedule = self._planned.result()
        self.pending, self._planned, self._added = None, None, []
        return schedule

    def close(self) -> None:
        """Ends the thread; a plan that is being made is dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _swap(schedule: Schedule, cursor: int) -> int:
    total, width = len(schedule.plan.microbatches), schedule.plan.width
    swap = cursor + HEAD_START + (total - cursor) // SHARE
    return min(total, -(-swap // width) * width)
