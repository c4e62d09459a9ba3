"""Runs a stream of slots through an engine, and says what its times mean.

Ticks are timed in calls of several, as training runs them; for the picture of a run every tick is
a call of its own.
"""

import queue
import threading
import time
from collections.abc import Sequence
from statistics import median

import jax
import numpy as np

from lorafusion_jax.parallel.pipeline import Pipeline, Window
from lorafusion_jax.parallel.processes import one_at_a_time
from lorafusion_jax.parallel.state import StreamState
from lorafusion_jax.parallel.stream import Slot, empty_slot, window_of
from lorafusion_jax.parallel.weights import Frozen
from lorafusion_jax.train.optimizer import Hyper
from lorafusion_sched import Microbatch, Plan, Timeline
from lorafusion_sched.simulate import Span

TICKS = 8
"""Of a call whose speed is measured; every tick is a call where they are timed one by one."""
IN_FLIGHT = 2


class Stream:
    """A plan's slots on their way through an engine, and when they came out.

    Args:
        pipeline: the engine.
        frozen: weights.
        hyper: of all slots.
        slots: of the plan.
    """

    def __init__(self, pipeline: Pipeline, frozen: Frozen, hyper: Hyper, slots: Sequence[Slot]):
        self._pipeline, self._frozen, self._hyper = pipeline, frozen, hyper
        self._slots, self._none, self._lag = slots, empty_slot(slots[0]), pipeline.lag
        self.ticks = len(slots) + self._lag + 1
        """The first one only fetches the first embedding."""

    def run(self, state: StreamState, ticks: int) -> tuple[StreamState, list[float]]:
        """Feeds all slots and drains, in calls of so many ticks.

        Args:
            state: of an empty pipeline; donated.
            ticks: of a call, at most `TICKS`.

        Returns:
            The state, and when each call had ended, in seconds since the first began.
        """
        state = jax.block_until_ready(state)
        calls = [(t, self._window(t)) for t in range(-1, self.ticks - 1, ticks)]
        under_way: queue.Queue[jax.Array | None] = queue.Queue()
        ends: list[float] = []
        # A call with conditionals returns late on a GPU: only another thread sees when it ended.
        watch = threading.Thread(target=_note_ends, args=(under_way, ends))
        watch.start()
        start = time.perf_counter()
        try:
            for t0, window in calls:
                count = min(ticks, self.ticks - 1 - t0)
                state, report = self._pipeline.run(
                    state,
                    self._hyper,
                    self._frozen,
                    window,
                    np.int32(t0),
                    np.int32(count),
                    ticks=TICKS,
                )
                one_at_a_time((state, report))
                under_way.put(report.loss)
                while len(under_way.queue) > IN_FLIGHT:
                    time.sleep(1e-4)
        finally:
            under_way.put(None)
            watch.join()
        return state, [end - start for end in ends]

    def _window(self, t0: int) -> Window:
        need = range(t0 - self._lag, t0 + TICKS + 1)
        count = len(self._slots)
        slots = [self._slots[m] if 0 <= m < count else self._none for m in need]
        return window_of(slots, self._pipeline.mesh)


def _note_ends(under_way: queue.Queue[jax.Array | None], ends: list[float]) -> None:
    """Notes when each of the arrays is there."""
    while (result := under_way.get()) is not None:
        result.block_until_ready()
        ends.append(time.perf_counter())


def measured_timeline(
    whole: Plan, ends: Sequence[float], stages: int, backward: float, predicted: Timeline
) -> Timeline:
    """Draws ticks as forwards and backwards, in the order of the engine.

    Phases are not timed one by one: a tick is divided as the cost model divides it.
    """
    count, lag = len(whole.microbatches) // whole.width, 2 * stages - 1
    real = [
        any(m.stretches for m in whole.microbatches[i * whole.width : (i + 1) * whole.width])
        for i in range(count)
    ]
    spans = []
    for tick in range(count + lag):
        begin, end = ends[tick], ends[min(tick + 1, len(ends) - 1)]
        middle = begin + (end - begin) / (1 + backward)
        for stage in range(stages):
            for phase, slot, a, b in (
                ("F", tick - stage, begin, middle),
                ("B", tick - lag + stage, middle, end),
            ):
                if 0 <= slot < count and real[slot]:
                    spans.append(Span(stage, slot, phase, a, b))
    busy = [sum(s.end - s.start for s in spans if s.stage == i) for i in range(stages)]
    return Timeline(ends[-1] - ends[0], tuple(busy), predicted.useful, tuple(spans))


def ranks_of(whole: Plan) -> list[tuple[Microbatch, ...]]:
    """Returns the microbatches of each slot."""
    count = len(whole.microbatches)
    return [whole.microbatches[i : i + whole.width] for i in range(0, count, whole.width)]


def steady(ticks: np.ndarray, of_slots: Sequence[float], stages: int, backward: float) -> float:
    """Returns what was done per second between the fill and the drain; 0 for too short a stream.

    A slot counts where each stage runs its forward and its backward, by their shares of the time.

    Args:
        ticks: seconds of each tick, from the one on in which slot 0 enters.
        of_slots: what each slot is worth: its tokens, or 1 where it has work.
        stages: of the pipeline.
        backward: time of a backward over that of a forward.
    """
    lag, count = 2 * stages - 1, len(of_slots)
    done = 0.0
    for tick in range(lag, count):
        for stage in range(stages):
            forward, back = of_slots[tick - stage], of_slots[tick - lag + stage]
            done += (forward + backward * back) / (1 + backward) / stages
    return done / float(ticks[lag:count].sum()) if count > lag else 0.0


def full_tick(
    spans: np.ndarray, valid: Sequence[bool], stages: int, ticks: int = 1
) -> float | None:
    """Returns the median time of a tick in which every stage has a forward and a backward.

    Args:
        spans: seconds of each call, from the second call on.
        valid: whether each slot has work.
        stages: of the pipeline.
        ticks: of a call; the first call's first tick is -1.

    Returns:
        Seconds, None where no call has such ticks alone.
    """
    lag, found = 2 * stages - 1, []
    for call, seconds in enumerate(spans, 1):
        first = call * ticks - 1
        around = range(first - lag, first + ticks)
        if all(0 <= slot < len(valid) and valid[slot] for slot in around):
            found.append(float(seconds) / ticks)
    return median(found) if found else None
