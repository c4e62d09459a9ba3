"""A run on a mesh: the loop of `train.loop`, with the pipeline engine below it.

The stream flows on from call to call. Where something is due that needs all of the state (an
evaluation, a checkpoint, the end of a job, a changed plan) the pipeline is drained: `lag` empty
slots follow, and the state comes to the host. Draining changes no bit of any job.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np

from lorafusion_jax.lora.bank import AdapterBank
from lorafusion_jax.parallel.engine import MeshEngine, versions_at
from lorafusion_jax.parallel.evaluate import ForwardPipeline
from lorafusion_jax.parallel.feed import Feeder, single_ends
from lorafusion_jax.parallel.processes import gathered, one_at_a_time
from lorafusion_jax.parallel.state import StreamState
from lorafusion_jax.parallel.stream import Slot, empty_slot, pack_slot, window_of
from lorafusion_jax.train.batch import PackedBatch
from lorafusion_jax.train.jobs import TrainJob, hyper_parameters
from lorafusion_jax.train.loop import Run
from lorafusion_jax.train.loss import TokenLosses
from lorafusion_jax.train.programs import Programs
from lorafusion_jax.train.schedule import Schedule
from lorafusion_jax.train.step import StepReport
from lorafusion_sched import Microbatch, Stretch

TICKS = 16
"""Ticks of a call. The longer, the less the host matters; the shorter, the sooner it is heard."""

CALLS_IN_FLIGHT = 2


class MeshPrograms(Programs):
    """Evaluation on a mesh; training is `MeshRun`'s own.

    Args:
        engine: the engine.

    Attributes:
        bank: adapters on the mesh now.
    """

    def __init__(self, engine: MeshEngine):
        self.bank: AdapterBank | None = None
        self._engine = engine
        self._forward = ForwardPipeline(engine.pipeline, 2 * engine.pipeline.stages)

    def evaluate_all(
        self, bank: AdapterBank, batches: Sequence[PackedBatch]
    ) -> Iterator[TokenLosses]:
        """Evaluates with the adapters on the mesh, of which `bank` is a copy on the host."""
        del bank
        assert self.bank is not None
        return iter(self._forward.losses(self.bank, self._engine.frozen, batches))


class MeshRun(Run):
    """A run whose microbatches go through a pipeline.

    Args:
        engine: the pipeline and the base model on it.
        fields: of `Run`; `state` is on the host.
    """

    def __init__(self, engine: MeshEngine, programs: MeshPrograms, **fields):
        self._engine, self._mesh_programs = engine, programs
        self._stream: StreamState | None = None
        self._stop = 0
        self._dispatching: int | None = None
        super().__init__(programs=programs, **fields)

    def __post_init__(self):
        super().__post_init__()
        pipeline = self._engine.pipeline
        self._capacity = max(self.schedule.problem.capacities)
        self._feeder = Feeder(pipeline.distance, self._engine.ranks)
        self._window: deque[Slot] = deque(maxlen=pipeline.lag + 1 + TICKS)
        self._calls: deque[tuple[int, StepReport]] = deque()
        self._members: dict[int, range] = {}  # microbatches of each slot that is under way
        self._fed = self._stop = self.cursor
        self._follow()
        self._put()

    @property
    def _known_after(self) -> int:
        # With a guard a call is dispatched only after the ones before it have ended.
        return TICKS * self._engine.ranks

    @property
    def begun(self) -> bool:
        """See `Run.begun`; the cursor moves only when the pipeline is drained."""
        return self._fed > 0

    def compile_ahead(self) -> None:
        """Compiles nothing ahead: a mesh has one training program, which the first call needs."""

    def run_microbatch(self) -> None:
        """Runs one call's ticks; drains the pipeline and does what is due where something is.

        Raises:
            NonFiniteError: a job with policy `stop` had a non-finite gradient; all is saved.
        """
        if self._fed == self._stop:
            self._swap_plan()
            if self.finished:
                self.save()
                return
            self._begin()
        self.goodput.enter("redone" if self.cursor < self.redo_until else "train")
        self._feed_slots()
        due = self._fed == self._stop
        if due or self._outcomes.failure is not None:
            self._drain()
            width = self.schedule.plan.width if due else 0
            last = self._microbatches[self.cursor - width : self.cursor]
            self._deliver(self.cursor - 1, [s for m in last for s in m.stretches])
        self._tell_saved(self.saver.finished())

    def end_job(self, name: str, status: str, *, repack: bool = True) -> None:
        """Ends a job after what is under way; see `Run.end_job`."""
        self._drain()
        super().end_job(name, status, repack=repack)

    def join(self, jobs: Sequence[TrainJob], *, repack: bool = True) -> None:
        """Lets jobs join after what is under way; see `Run.join`."""
        self._drain()
        super().join(jobs, repack=repack)

    def waiting_for(self) -> str:
        """See `Run.waiting_for`; names the ticks under way and the stages that have not ended them.

        A stage that is stuck in a forward or backward keeps the others waiting in an exchange. On a
        GPU a call is under way while it is dispatched, too.
        """
        calls = list(self._calls)
        if not calls:
            first = self._dispatching
            if first is None:
                return super().waiting_for()
            return f"{_ticks(first)} of the pipeline, which are being dispatched"
        first, report = calls[0]
        slow = {s.device for s in report.loss.addressable_shards if not s.data.is_ready()}
        pipelines = self._engine.pipeline.mesh.devices
        waiting = sorted({s for rank in pipelines for s, d in enumerate(rank) if d in slow})
        return (
            f"{_ticks(first)} of the pipeline, not ended by stages {waiting} of "
            f"{self._engine.pipeline.stages}; {len(calls)} calls are under way, up to microbatch "
            f"{self._fed} of {len(self._microbatches)}"
        )

    def save(self) -> None:
        """Saves a verified checkpoint of everything, unless this one exists."""
        self._drain()
        super().save()

    def _swap_plan(self) -> None:
        before, sizes = self.schedule, (self._segments, self._longest)
        super()._swap_plan()
        if self.schedule is not before:
            self._follow()
            if sizes != (self._segments, self._longest):  # of the rows on their way too
                self._put()

    def _make_room(self, schedule: Schedule) -> None:
        """See `Run._make_room`; on a mesh all microbatches have the rows of the largest size.

        They are of several sizes where the run began on one device.
        """
        rows = max(schedule.problem.capacities)
        widened = tuple(Microbatch(m.stretches, rows) for m in schedule.plan.microbatches)
        super()._make_room(replace(schedule, plan=replace(schedule.plan, microbatches=widened)))

    def _follow(self) -> None:
        """Takes over a plan: ends are reported once, whatever the number of ranks."""
        self._microbatches = single_ends(self.schedule.plan)
        plan = replace(self.schedule.plan, microbatches=self._microbatches)
        self._outcomes.follow(replace(self.schedule, plan=plan))

    def _begin(self) -> None:
        """Starts the jobs of the next stretch, up to where something is due."""
        self._stop = self._next_due()
        first = self.schedule.first
        starting = [
            job
            for job in self.jobs
            if self.cursor <= first.get(job.name, -1) < self._stop and self._is_live(job.name)
        ]
        for job in starting:
            self._start(job)
        if starting:
            self._put()
        self._load_hyper()

    def _put(self) -> None:
        """Puts the state on the mesh."""
        slot, first = self.schedule.slot, self.schedule.first
        done = [
            (s.job, s.batch, s.ends) for m in self._microbatches[: self.cursor] for s in m.stretches
        ]
        fresh = [(name, 0, False) for name in slot if self.cursor <= first[name] < self._stop]
        versions = versions_at([*done, *fresh], slot, self._num_slots)
        none = self._slot(())
        self._stream = self._engine.put(self.state, none.batches[0], versions)
        self._mesh_programs.bank = self._stream.bank
        self._window.extend([none] * (self._engine.pipeline.lag + 1))

    def _next_due(self) -> int:
        """The first microbatch that must wait until the pipeline is drained."""
        width, total = self.schedule.plan.width, len(self._microbatches)
        pending = self._replanner.pending
        limit = total if pending is None else max(pending.swap, self.cursor + 1)
        for index in range(self.cursor, min(limit, total)):
            if any(self._is_due(s) for s in self._microbatches[index].stretches if s.ends):
                return min(total, (index // width + 1) * width)
        return min(limit, total)

    def _is_due(self, stretch: Stretch) -> bool:
        job, step = self._by_name[stretch.job], stretch.batch + 1
        if step == job.num_steps:
            return True
        evaluates = step % job.config.eval.every == 0 and bool(job.eval_indices)
        return self._is_live(job.name) and (evaluates or step % job.config.save.every == 0)

    def _feed_slots(self) -> None:
        """Dispatches one call with as many of the stretch's microbatches as it has ticks."""
        slots = []
        while len(slots) < TICKS and self._fed < self._stop:
            number, start = self._feeder.slot, self._fed
            self._fed = self._feeder.take(self._microbatches, start, self._stop)
            taken = range(start, self._fed)
            if taken:
                self._members[number] = taken
            slots.append(self._slot(self._microbatches[start : self._fed]))
        self._call(slots)

    def _slot(self, microbatches: tuple[Microbatch, ...]) -> Slot:
        idle = [Microbatch((), self._capacity)] * (self._engine.ranks - len(microbatches))
        return pack_slot(
            [*microbatches, *idle],
            {name: rows for name, rows in self._rows.items() if self._is_live(name)},
            capacity=self._capacity,
            tile=self.tile,
            num_slots=self._num_slots,
            max_segments=self._segments,
            longest=self._longest,
        )

    def _call(self, slots: list[Slot]) -> None:
        """Dispatches TICKS ticks; the slots enter, and empty ones after them."""
        idle = TICKS - len(slots)
        self._feeder.skip(idle)
        self._window.extend([*slots, *[empty_slot(self._window[-1])] * idle])
        # The embedding is fetched one tick ahead: the last slot enters with the next call's first.
        first_tick = self._feeder.slot - TICKS - 1
        while self._guard.active and self._calls:  # their losses decide
            self._collect()
        lag = self._engine.pipeline.lag
        for place in range(TICKS):  # what is updated in this call
            limit = self._limits(first_tick - lag + place)
            self._window[place] = self._window[place]._replace(limit=limit)
        window = window_of(list(self._window), self._engine.pipeline.mesh)
        self._dispatching = first_tick
        self._stream, report = self._engine.pipeline.run(
            self._stream,
            self._hyper,
            self._engine.frozen,
            window,
            np.int32(first_tick),
            ticks=TICKS,
        )
        one_at_a_time((self._stream, report))
        self._dispatching = None
        self._mesh_programs.bank = self._stream.bank
        self._calls.append((first_tick, report))
        while len(self._calls) > CALLS_IN_FLIGHT:
            self._collect()

    def _limits(self, slot: int) -> np.ndarray:
        """The loss limits of the global batches that end with a slot."""
        limits = np.full(self._num_slots, np.inf, np.float32)
        for index in self._members.get(slot, ()):
            for stretch in self._microbatches[index].stretches:
                if stretch.ends:
                    slot_of = self.schedule.slot[stretch.job]
                    limits[slot_of] = self._guard.limit(stretch.job, index)
        return limits

    def _drain(self) -> None:
        """Lets all that is under way finish, and brings the state to the host."""
        if self.cursor == self._fed and not self._calls:
            return
        lag = self._engine.pipeline.lag
        newest = max(self._members, default=-lag)
        while self._calls and self._calls[-1][0] + TICKS <= newest + lag:
            self._call([])
        while self._calls:
            self._collect()
        self._stop = self.cursor = self._fed
        assert self._stream is not None
        stale = gathered(self._stream.flow.stale)
        assert not stale.any(), f"forwards or backwards saw the wrong adapters: {stale.tolist()}"
        self.state = self._engine.fetch(self._stream)

    def _collect(self) -> None:
        """Waits for the oldest call and reports the slots that were updated in it."""
        first_tick, report = self._calls[0]  # stays there meanwhile: the watchdog looks
        report = jax.device_get(report)
        self._calls.popleft()
        for number in range(TICKS):
            slot = first_tick + number - self._engine.pipeline.lag
            one = jax.tree.map(lambda x, number=number: x[number], report)
            for index in self._members.pop(slot, ()):
                self._note(index, one)

    def _note(self, index: int, report: StepReport) -> None:
        microbatch = self._microbatches[index]
        for stretch in microbatch.stretches:
            if stretch.ends and stretch.job not in self.ended:
                self.progress[stretch.job].step = stretch.batch + 1
        live = [stretch for stretch in microbatch.stretches if self._is_live(stretch.job)]
        self.tokens += sum(stretch.tokens() for stretch in live)
        ends = any(stretch.ends for stretch in microbatch.stretches)
        self._outcomes.dispatched(index, report.loss, report if ends else None)
        self._outcomes.settle()

    def _was_used(self, slot: int) -> bool:
        first = self.schedule.first
        return any(
            number == slot and first[name] < self.cursor
            for name, number in self.schedule.slot.items()
        )

    def _load_hyper(self) -> None:
        """Takes the hyper-parameters of the jobs that hold a slot in this stretch."""
        first, last = self.schedule.first, self.schedule.last
        slots = {
            name: slot
            for name, slot in self.schedule.slot.items()
            if first[name] < self._stop and last[name] >= self.cursor
        }
        self._hyper = hyper_parameters(self.jobs, slots, self._num_slots)


def _ticks(first: int) -> str:
    return f"ticks {first} to {first + TICKS - 1}"
