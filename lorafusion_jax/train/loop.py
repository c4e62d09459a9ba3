"""The machinery of a run: its state, one microbatch at a time, and what is due after each.

The wait for a microbatch and its report are `outcome`, evaluation and export are `delivery`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from lorafusion_jax.config import RunConfig
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.lora.bank import put_slot, write_slot
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.train import optimizer
from lorafusion_jax.train.background import BackgroundSaver, SaveDone
from lorafusion_jax.train.batch import JobRows, PackedBatch, longest_bucket, pack, segment_bucket
from lorafusion_jax.train.choices import Choices
from lorafusion_jax.train.delivery import Delivery
from lorafusion_jax.train.early_stop import STOPPED, note_evaluation
from lorafusion_jax.train.evaluate import BASE, Evaluator
from lorafusion_jax.train.events import CheckpointSaved, JobEnded, Listener, Notice
from lorafusion_jax.train.feed import DeviceFeed
from lorafusion_jax.train.goodput import Goodput
from lorafusion_jax.train.jobs import TrainJob, hyper_parameters, spike_configs
from lorafusion_jax.train.optimizer import Hyper
from lorafusion_jax.train.outcome import IN_FLIGHT, Outcomes
from lorafusion_jax.train.programs import Programs
from lorafusion_jax.train.progress import JobProgress
from lorafusion_jax.train.replan import Change, Replanner
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_jax.train.schedule import Schedule
from lorafusion_jax.train.spike import SpikeGuard
from lorafusion_jax.train.step import TrainState
from lorafusion_sched import Stretch, to_json

AHEAD = 2
"""Microbatches that are packed and put on the device before their turn."""


class _Want(NamedTuple):
    """Which microbatch to pack, of which plan, and the jobs that still train."""

    generation: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] (hides tuple.index)
    live: frozenset[str]


@dataclass
class Run:
    """A run in memory.

    Attributes:
        base: the base model.
        jobs: in order of the configuration.
        schedule: plan and slots.
        tile: rows per tile.
        evaluator: of held-out samples.
        programs: compiled steps.
        state: adapters and optimizer.
        folder: where results go.
        saver: of states.
        listener: told everything.
        facts: what identifies the run; saved with every checkpoint.
        choices: what the run chose by itself; likewise.
        progress: of each job.
        cursor: next microbatch.
        ended: jobs that ended early, and the microbatch from which on they are skipped.
        tokens: real tokens trained by this process.
        planned_memory: what the memory planner predicted, in words.
        goodput: told what time goes into.
        redo_until: microbatches before it were trained before a kill lost them.
    """

    base: Base
    jobs: Sequence[TrainJob]
    schedule: Schedule
    tile: int
    evaluator: Evaluator
    programs: Programs
    state: TrainState
    folder: RunFolder
    saver: BackgroundSaver
    listener: Listener
    facts: dict[str, Any]
    choices: Choices
    progress: dict[str, JobProgress] = field(default_factory=dict)
    cursor: int = 0
    ended: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    planned_memory: str = ""
    goodput: Goodput = field(default_factory=Goodput)
    redo_until: int = 0

    def __post_init__(self):
        self._by_name = {job.name: job for job in self.jobs}
        self._num_slots = self.state.bank.rank.shape[0]
        self._segments, self._longest = self.choices.segments, self.choices.longest
        self._make_room(self.schedule)
        self._replanner = Replanner(self._num_slots)
        for job in self.jobs:
            self.progress.setdefault(job.name, JobProgress())
        self._generation = 0
        self._feed = DeviceFeed(self._pack)
        self._place_rows()
        self._guard = SpikeGuard(spike_configs(self.jobs), self.progress, lag=self._known_after)
        self._outcomes = Outcomes(
            self._by_name,
            self.schedule,
            self.progress,
            self.ended,
            self._guard,
            self.listener,
            lambda: self.cursor,
        )
        name = self.base.reference
        self._delivery = Delivery(self.evaluator, name, self.folder, self.progress, self.listener)
        self._load_hyper()

    @property
    def finished(self) -> bool:
        """All microbatches are done, and no job waits to join."""
        done = self.cursor == len(self.schedule.plan.microbatches)
        return done and self._replanner.pending is None

    @property
    def _known_after(self) -> int:
        """Microbatches after which the loss of a step is known to the host in any case."""
        return IN_FLIGHT

    @property
    def begun(self) -> bool:
        """Whether anything was trained that a checkpoint would hold."""
        return self.cursor > 0

    def compile_ahead(self) -> None:
        """Starts to compile the programs in the background."""
        if self.cursor < len(self.schedule.plan.microbatches):
            example = self.evaluator.example(self._num_slots)
            batch = self._feed.on_host(self._want(self.cursor))
            self.programs.announce(self.state, self._hyper, batch, example)

    def evaluate_base(self, stopping: Callable[[], bool] = lambda: False) -> None:
        """Evaluates the base model on the held-out samples of every job that has not started.

        `stopping` is asked between two jobs; True leaves the rest for later.
        """
        for job in self.jobs:
            if stopping():
                return
            if self.progress[job.name].base_loss is None:
                self.goodput.enter("evaluate")
                self._delivery.evaluate(self.state.bank, job, BASE, self.cursor)

    def run_microbatch(self) -> None:
        """Trains on the next microbatch and does what is due after it.

        Raises:
            NonFiniteError: a job with policy `stop` had a non-finite gradient; all is saved.
        """
        self._swap_plan()
        if self.finished:  # what was left has ended with its jobs
            self.save()
            return
        self.goodput.enter("redone" if self.cursor < self.redo_until else "train")
        index, self.cursor = self.cursor, self.cursor + 1
        microbatch = self.schedule.plan.microbatches[index]
        for job in self.jobs:
            if self.schedule.first.get(job.name) == index and self._is_live(job.name):
                self._start(job)
        live = [stretch for stretch in microbatch.stretches if self._is_live(stretch.job)]
        if live:
            self._train(index)
        self.tokens += sum(stretch.tokens() for stretch in live)
        self._after(index)
        self._tell_saved(self.saver.finished())

    def end_job(self, name: str, status: str, *, repack: bool = True) -> None:
        """Ends a job now: it keeps what it has learnt, and nothing more of it is trained.

        Its rows are padding from the next microbatch on; a planner in the background packs the rest
        without it.

        Args:
            name: a job that has not ended.
            status: why, as the job's status.
            repack: whether the others use its room; False changes no bit of them.
        """
        self._outcomes.settle()
        job, self.progress[name].status = self._by_name[name], status
        if self.schedule.first.get(name, self.cursor) < self.cursor:
            self._delivery.end(self.state.bank, job, self.schedule.slot[name])
        else:  # it never had a slot, so there is no adapter
            self.listener(JobEnded(name, 0, status, 0, ""))
        self.ended[name] = self.cursor
        self._replanner.request(self.schedule, self.cursor, ended=(name,), repack=repack)

    def check_room(self, job: TrainJob) -> None:
        """Checks that the bank can hold a job that joins a running process.

        Raises:
            ConfigError: its rank, modules, optimizer or held-out samples would need more room; says
                what to do.
        """
        bank, problems = self.state.bank, []
        r_max = next(iter(bank.a.values())).shape[1]
        if job.max_rank > r_max:
            problems.append(f"rank {job.max_rank}, the running process has room for {r_max}")
        if missing := [path for path in job.targets if path not in bank.a]:
            problems.append(f"module {missing[0]}, which no job of the run has")
        if missing := [p for p in job.spec.patterned(job.targets) if p not in bank.ranks]:
            problems.append(f"a rank of its own for {missing[0]}, which no job of the run has")
        longest = max((s.length for b in job.eval_plan().batches for s in b), default=0)
        if longest > self.evaluator.capacity:
            problems.append(
                f"{longest} tokens for a held-out sample, the running process has room for "
                f"{self.evaluator.capacity}"
            )
        if job.config.optim.name not in self.state.opt.moments:
            problems.append(f"optimizer {job.config.optim.name}, which no job of the run has")
        if problems:
            raise ConfigError(
                f"{job.name} needs {'; '.join(problems)}. Stop the run, add the job to its "
                "configuration and start it again: there it can join"
            )

    def remember(self, config: RunConfig, added: Sequence[TrainJob]) -> None:
        """Lets checkpoints say what the run is from now on.

        Args:
            config: of the run, with all jobs.
            added: jobs that the user's configuration does not have.
        """
        self.facts["config"] = config.model_dump(mode="json")
        self.facts["data"] = self.facts["data"] | {job.name: job.fingerprint for job in added}
        self.facts["added"] = [*self.facts["added"], *(job.name for job in added)]

    def join(self, jobs: Sequence[TrainJob], *, repack: bool = True) -> None:
        """Lets jobs join; a planner in the background finds their place.

        Args:
            jobs: with names, modules, ranks and optimizers for which the bank has room. They wait
                for a slot where all are taken.
            repack: whether they share microbatches with the others; False gives them their own, and
                changes no bit of the others.

        Raises:
            PlanError: a name is taken, or a sample does not fit.
        """
        plans = [job.plan for job in jobs]
        self._replanner.request(self.schedule, self.cursor, added=plans, repack=repack)
        self._admit(jobs)

    def resume_change(self, record: dict[str, Any]) -> None:
        """Goes on with a change of plan that was being made when the run was saved.

        `record` is what the checkpoint holds of it; the jobs that join are among `jobs`.
        """
        change = Change.from_record(record)
        added = [self._by_name[name].plan for name in change.added]
        self._replanner.start(self.schedule, change, added)

    def waiting_for(self) -> str:
        """Says what the run is doing, for whom it must not wait; called from another thread."""
        return f"microbatch {self.cursor} of {len(self.schedule.plan.microbatches)}"

    def close(self) -> None:
        """Ends the threads of the planner and of the feed."""
        self._replanner.close()
        self._feed.close()

    def save(self) -> None:
        """Starts to save a checkpoint of everything, unless this one exists."""
        self._outcomes.settle()
        if self.saver.has(self.cursor):
            return
        change = self._replanner.pending
        progress = {  # nothing in it may change: it is written while training goes on
            **self.facts,
            "cursor": self.cursor,
            "jobs": {name: asdict(progress) for name, progress in self.progress.items()},
            "slots": self.schedule.slot,
            "capacities": list(self.schedule.problem.capacities),
            "choices": self.choices._asdict()
            | {"segments": self._segments, "longest": self._longest},
            "ended": dict(self.ended),
            "change": None if change is None else change.to_record(),
        }
        with self.goodput.during("save"):
            saves = self.saver.save(self.cursor, self.state, progress, self._score())
        self._tell_saved(saves)

    def finish_saving(self) -> None:
        """Saves what is not saved yet, and waits until it is on disk and verified."""
        self.save()
        with self.goodput.during("save"):
            saves = self.saver.wait()
        self._tell_saved(saves)

    def raise_failure(self) -> None:
        """Raises what a job's policy stops the run for, if it was found since the last microbatch.

        Raises:
            NonFiniteError: or `LossSpikeError`; see `run_microbatch`.
        """
        if self._outcomes.failure is not None:
            raise self._outcomes.failure

    def _tell_saved(self, saves: list[SaveDone]) -> None:
        for save in saves:
            path = str(self.folder.checkpoints / str(save.step))
            self.listener(CheckpointSaved(save.step, save.seconds, save.blocked, path))

    def _score(self) -> float | None:
        """Mean held-out loss of all jobs as of now; None if one has nothing held out."""
        losses = [
            progress.base_loss if progress.eval_loss is None else progress.eval_loss
            for progress in self.progress.values()
        ]
        known = [loss for loss in losses if loss is not None]
        return sum(known) / len(known) if len(known) == len(losses) else None

    def _train(self, index: int) -> None:
        """Dispatches one microbatch, and the update of the slots whose global batch it ends."""
        last = min(index + AHEAD, len(self.schedule.plan.microbatches) - 1)
        ahead = [self._want(coming) for coming in range(index + 1, last + 1)]
        packed, batch = self._feed.get(self._want(index), ahead)
        self.state, loss = self.programs.train(self.state, batch)
        report = None
        if np.any(packed.batch_end):
            hyper = self._with_limits(index)
            self.state, report = self.programs.update(self.state, hyper, batch.batch_end)
        self._outcomes.dispatched(index, loss, report)

    def _with_limits(self, index: int) -> Hyper:
        """The hyper-parameters with the loss limits of the batches that a microbatch ends."""
        if not self._guard.active:
            return self._hyper
        self._outcomes.settle_before(index - IN_FLIGHT)
        limits = np.full(self._num_slots, np.inf, np.float32)
        for stretch in self.schedule.plan.microbatches[index].stretches:
            if stretch.ends:
                limits[self.schedule.slot[stretch.job]] = self._guard.limit(stretch.job, index)
        return self._hyper._replace(loss_limit=jax.device_put(limits))

    def _is_live(self, job: str) -> bool:
        """Whether a job still trains."""
        return self.progress[job].status != "frozen" and job not in self.ended

    def _admit(self, jobs: Sequence[TrainJob]) -> None:
        self.jobs = (*self.jobs, *jobs)
        self._guard.admit(spike_configs(jobs))
        for job in jobs:
            self._by_name[job.name] = job
            self.progress[job.name] = JobProgress()
            self.evaluator.add(job)
            self._delivery.evaluate(self.state.bank, job, BASE, self.cursor)

    def _swap_plan(self) -> None:
        """Follows a changed plan from here on, if it is time."""
        schedule = self._replanner.take(self.cursor)
        if schedule is None:
            return
        before, left = len(self.schedule.plan.microbatches), len(schedule.plan.microbatches)
        self.schedule = schedule
        self.facts["plan"] = to_json(schedule.plan)
        self.folder.write_plan(self.facts["plan"])
        self._make_room(schedule)
        self._place_rows()
        self._outcomes.follow(schedule)
        self._load_hyper()
        if before > self.cursor:  # else the old plan ran out before the new one was there
            self.listener(
                Notice(
                    f"the rest is planned anew: {left - self.cursor} microbatches are left instead "
                    f"of {before - self.cursor}"
                )
            )

    def _make_room(self, schedule: Schedule) -> None:
        """Sets what is static of the samples' lengths; it only grows, so that programs are kept."""
        microbatches = schedule.plan.microbatches
        self._longest = max(self._longest, longest_bucket(microbatches))
        self._segments = max(self._segments, segment_bucket(microbatches, self._longest))

    def _place_rows(self) -> None:
        """Notes where each job's rows come from and go to, for the jobs that are in the plan."""
        slots = self.schedule.slot
        self._generation += 1
        self._rows = {
            job.name: JobRows(slots[job.name], job.seed, job.samples, job.batch_tokens)
            for job in self.jobs
            if job.name in slots
        }

    def _want(self, index: int) -> _Want:
        live = frozenset(name for name in self._rows if self._is_live(name))
        return _Want(self._generation, index, live)

    def _pack(self, want: _Want) -> PackedBatch:
        """Packs a microbatch, on the host."""
        batch, _ = pack(
            self.schedule.plan.microbatches[want.index],
            {name: self._rows[name] for name in want.live},
            tile=self.tile,
            num_slots=self._num_slots,
            max_segments=self._segments,
            longest=self._longest,
        )
        return batch

    def _start(self, job: TrainJob) -> None:
        """Gives a job its slot: a fresh adapter and zero moments, whatever lay there."""
        slot = self.schedule.slot[job.name]
        if job.initial is None:
            bank = write_slot(self.state.bank, slot, job.spec, job.seed, job.targets)
        else:
            bank = put_slot(self.state.bank, slot, job.spec, job.initial)
        if self._was_used(slot):
            self.state = optimizer.reset_slot(self.state, slot)
        self.state = self.state._replace(bank=bank)
        self.progress[job.name].status = "training"
        self._load_hyper()

    def _was_used(self, slot: int) -> bool:
        """Whether another job held the slot before; if not, its moments are zeros still."""
        first, now = self.schedule.first, self.cursor - 1
        return any(s == slot and first[name] < now for name, s in self.schedule.slot.items())

    def _load_hyper(self) -> None:
        """Puts the hyper-parameters of the jobs that hold a slot now on the device."""
        now = max(self.cursor - 1, 0)
        slots = {
            name: slot
            for name, slot in self.schedule.slot.items()
            if self.schedule.first[name] <= now <= self.schedule.last[name]
        }
        hyper = hyper_parameters(self.jobs, slots, self._num_slots)
        if self._guard.active:
            hyper = hyper._replace(loss_limit=np.full(self._num_slots, np.inf, np.float32))
        self._hyper = jax.device_put(hyper)

    def _after(self, index: int) -> None:
        """Evaluates, ends jobs and saves, as due after a microbatch."""
        self._deliver(index, self.schedule.plan.microbatches[index].stretches)

    def _deliver(self, index: int, stretches: Sequence[Stretch]) -> None:
        """Evaluates, ends jobs and saves, as due after a microbatch with these stretches."""
        ended = [s for s in stretches if s.ends]
        to_evaluate, to_end, save = [], [], self._outcomes.failure is not None
        for stretch in ended:
            if stretch.job in self.ended:
                continue
            job, step = self._by_name[stretch.job], stretch.batch + 1
            self.progress[job.name].step = step
            last = step == job.num_steps
            if self._is_live(job.name) or last:
                if step % job.config.eval.every == 0 or last:
                    to_evaluate.append(job)
                save = save or step % job.config.save.every == 0
            if last:
                to_end.append(job)
        if to_evaluate or to_end or save:
            self._outcomes.settle()
        bank, slot = self.state.bank, self.schedule.slot
        stopping = []
        with self.goodput.during("evaluate"):
            for job in to_evaluate:
                self._delivery.evaluate(bank, job, slot[job.name], index)
                rule = job.config.train.early_stopping
                if note_evaluation(rule, self.progress[job.name]) and job not in to_end:
                    stopping.append(job)
        for job in to_end:
            self._delivery.end(bank, job, slot[job.name])
        for job in stopping:
            self._stop_early(job)
        failure = self._outcomes.failure
        if save or self.finished or failure is not None:
            self.save()
        if failure is not None:
            self.finish_saving()
            raise failure

    def _stop_early(self, job: TrainJob) -> None:
        rule = job.config.train.early_stopping
        assert rule is not None
        progress = self.progress[job.name]
        self.listener(
            Notice(
                f"{job.name}: stopped early after step {progress.step} of {job.num_steps}: no "
                f"better held-out loss in {rule.patience} evaluations"
            )
        )
        self.end_job(job.name, STOPPED, repack=not rule.keep_bits)
