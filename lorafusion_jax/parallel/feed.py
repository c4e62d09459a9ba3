"""From a plan, whatever mesh it was made for, to the slots that this mesh runs."""

from collections.abc import Sequence
from dataclasses import replace

from lorafusion_sched import Microbatch, Plan


def single_ends(plan: Plan) -> tuple[Microbatch, ...]:
    """Returns a plan's microbatches with each global batch's end flagged once.

    A slot of several microbatches flags an end on each that holds the job; here only the last does.
    """
    found: list[Microbatch] = []
    for start in range(0, len(plan.microbatches), plan.width):
        later: set[str] = set()
        slot = []
        for microbatch in reversed(plan.microbatches[start : start + plan.width]):
            stretches = tuple(
                replace(s, ends=s.ends and s.job not in later) for s in microbatch.stretches
            )
            later |= {s.job for s in stretches}
            slot.append(replace(microbatch, stretches=stretches))
        found += reversed(slot)
    return tuple(found)


def for_one_device(plan: Plan) -> Plan:
    """Returns a plan that was made for any mesh as one of one device, microbatch by microbatch."""
    return replace(plan, microbatches=single_ends(plan), distance=1, width=1)


class Feeder:
    """Fills slots with consecutive microbatches, and leaves one empty where a job must wait.

    A plan made for this mesh never waits. One made for fewer stages or other ranks (a run that goes
    on with other devices keeps its plan) runs just as exactly, with more empty slots.

    Args:
        distance: slots that the engine needs between two global batches of a job.
        ranks: microbatches per slot.

    Attributes:
        slot: number of the next slot.
    """

    def __init__(self, distance: int, ranks: int):
        self.slot = 0
        self._distance, self._ranks = distance, ranks
        self._ended: dict[str, tuple[int, int]] = {}  # job: its last global batch, the slot

    def take(self, microbatches: Sequence[Microbatch], start: int, stop: int) -> int:
        """Moves on by a slot; returns one past the last microbatch that it holds.

        Args:
            microbatches: with single ends.
            start: first microbatch not yet taken.
            stop: no microbatch from here on may be taken.
        """
        batches: dict[str, int] = {}
        position = start
        while position < min(stop, start + self._ranks):
            stretches = microbatches[position].stretches
            if not all(self._may_enter(s.job, s.batch, batches) for s in stretches):
                break
            batches |= {s.job: s.batch for s in stretches}
            position += 1
        for microbatch in microbatches[start:position]:
            self._ended |= {s.job: (s.batch, self.slot) for s in microbatch.stretches if s.ends}
        self.slot += 1
        return position

    def skip(self, slots: int) -> None:
        """Moves on by empty slots."""
        self.slot += slots

    def _may_enter(self, job: str, batch: int, in_slot: dict[str, int]) -> bool:
        if in_slot.get(job, batch) != batch:
            return False
        before, slot = self._ended.get(job, (-1, 0))
        return before >= batch or before < 0 or self.slot - slot >= self._distance
