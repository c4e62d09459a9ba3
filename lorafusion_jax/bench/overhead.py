"""What of a training step is not the adapters' own work: padding, planning, optimizer, host.

Four measured parts, as milliseconds per microbatch. The training loop's own order is run (packed
ahead by a thread, two microbatches in flight) and beside it the same microbatches that lie on the
device already, once without updates and once with several in place of each: the difference is what
an update costs in between steps, where its dispatch is hidden. What the loop takes beyond steps and
updates is the host's: packing that was late, transfers, dispatch, reports.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import numpy as np

from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.feed import DeviceFeed
from lorafusion_jax.train.loop import AHEAD
from lorafusion_jax.train.outcome import IN_FLIGHT

_UPDATES = 8
"""Updates in place of one: their time must stand out from the noise of the steps."""

type Make = Callable[[int], PackedBatch]


class Stepper(Protocol):
    """A compiled training step with its state."""

    def step(self, batch: PackedBatch) -> jax.Array:
        """Dispatches a microbatch; returns its loss."""
        ...

    def update(self, batch_end: jax.Array | np.ndarray) -> object:
        """Dispatches the update of the slots whose global batch ends; returns its report."""
        ...

    def wait(self) -> None:
        """Waits for all that was dispatched."""
        ...


class Overhead(NamedTuple):
    """Milliseconds per microbatch.

    Attributes:
        loop_ms: wall time of the training loop.
        step_ms: forward and backward pass alone.
        padding_ms: of it, the share of the padding rows.
        optimizer_ms: updates, in between steps.
        host_ms: what the loop takes beyond step and updates.
        plan_ms: planning, spread over the plan's microbatches.
        update_ms: one update alone, one after the other, dispatch included; in no sum.
    """

    loop_ms: float
    step_ms: float
    padding_ms: float
    optimizer_ms: float
    host_ms: float
    plan_ms: float
    update_ms: float

    @property
    def share(self) -> float:
        """All four parts over the time that a microbatch takes with its planning."""
        parts = self.padding_ms + self.optimizer_ms + self.host_ms + self.plan_ms
        return parts / (self.loop_ms + self.plan_ms)

    def columns(self) -> dict[str, float]:
        """As columns of a results row."""
        return self._asdict() | {"overhead": self.share}


def run_loop(program: Stepper, make: Make, count: int) -> float:
    """Runs microbatches as training does; returns seconds.

    Args:
        program: the compiled step.
        make: packs the microbatch of an index, on the host; called by a thread.
        count: microbatches.
    """

    def ahead(index: int) -> range:
        return range(index + 1, min(index + 1 + AHEAD, count))

    feed, under_way = DeviceFeed(make), []
    try:
        packed, batch = feed.get(0, ahead(0))  # as in the middle of a run: it is there already
        start = time.perf_counter()
        for index in range(count):
            if index:
                packed, batch = feed.get(index, ahead(index))
            loss = program.step(batch)
            ended = np.any(packed.batch_end)
            under_way.append((loss, program.update(batch.batch_end) if ended else None))
            if len(under_way) > IN_FLIGHT:
                loss, report = under_way.pop(0)
                jax.block_until_ready(loss)
                jax.device_get(report)
        program.wait()
        return time.perf_counter() - start
    finally:
        feed.close()


def measure_overhead(
    program: Stepper,
    make: Make,
    count: int,
    *,
    padding: float,
    plan_seconds: float,
    rounds: int = 2,
) -> Overhead:
    """Measures the parts; all take turns, because a hot GPU slows down.

    Args:
        program: the compiled step, warmed up.
        make: packs the microbatch of an index.
        count: microbatches to run, at least one.
        padding: share of their rows that hold no token.
        plan_seconds: of planning per microbatch of the plan.
        rounds: turns.
    """
    made = [make(index) for index in range(count)]
    ends = [bool(np.any(batch.batch_end)) for batch in made]
    batches = jax.device_put(made)

    def run(updates: int, *, steps: bool = True) -> None:
        for batch, ended in zip(batches, ends, strict=True):
            if steps:
                program.step(batch)
            for _ in range(updates if ended else 0):
                program.update(batch.batch_end)

    kinds: dict[str, Callable[[], object]] = {
        "step": lambda: run(0),
        "many": lambda: run(_UPDATES),
        "alone": lambda: run(1, steps=False),
    }
    taken: dict[str, list[float]] = {name: [] for name in ("loop", *kinds)}
    for _ in range(rounds):
        taken["loop"].append(run_loop(program, make, count))
        for name, call in kinds.items():
            taken[name].append(_timed(program, call))
    ms = {name: 1e3 * statistics.median(seconds) / count for name, seconds in taken.items()}
    optimizer_ms = max(0.0, ms["many"] - ms["step"]) / _UPDATES
    return Overhead(
        loop_ms=ms["loop"],
        step_ms=ms["step"],
        padding_ms=padding * ms["step"],
        optimizer_ms=optimizer_ms,
        host_ms=max(0.0, ms["loop"] - ms["step"] - optimizer_ms),
        plan_ms=1e3 * plan_seconds,
        update_ms=ms["alone"] * count / max(1, sum(ends)),
    )


def _timed(program: Stepper, call: Callable[[], object]) -> float:
    program.wait()
    start = time.perf_counter()
    call()
    program.wait()
    return time.perf_counter() - start
