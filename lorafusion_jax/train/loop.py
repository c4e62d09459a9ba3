"""The machinery of a run: its state, one microbatch at a time, evaluation, saving, exporting."""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import jax
import numpy as np

from lorafusion_jax.errors import AdapterError, NonFiniteError
from lorafusion_jax.lora.bank import read_slot, write_slot
from lorafusion_jax.lora.peft_io import save_peft
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.train import optimizer
from lorafusion_jax.train.batch import JobRows, PackedBatch, pack, segment_bucket
from lorafusion_jax.train.checkpoint import Checkpoints
from lorafusion_jax.train.evaluate import BASE, Evaluator
from lorafusion_jax.train.events import (
    CheckpointSaved,
    Evaluated,
    JobEnded,
    Listener,
    MicrobatchDone,
    Notice,
    StepDone,
)
from lorafusion_jax.train.jobs import TrainJob, hyper_parameters, lora_spec
from lorafusion_jax.train.programs import Programs
from lorafusion_jax.train.progress import JobProgress
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_jax.train.schedule import Schedule
from lorafusion_jax.train.step import StepReport, TrainState
from lorafusion_sched import Microbatch, Stretch

IN_FLIGHT = 2
"""Microbatches that may be under way on the device before the host waits for the oldest."""


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
        checkpoints: where states go.
        listener: told everything.
        facts: what identifies the run; saved with every checkpoint.
        progress: of each job.
        cursor: next microbatch.
        tokens: real tokens trained by this process.
    """

    base: Base
    jobs: Sequence[TrainJob]
    schedule: Schedule
    tile: int
    evaluator: Evaluator
    programs: Programs
    state: TrainState
    folder: RunFolder
    checkpoints: Checkpoints
    listener: Listener
    facts: dict[str, Any]
    progress: dict[str, JobProgress] = field(default_factory=dict)
    cursor: int = 0
    tokens: int = 0

    def __post_init__(self):
        self._by_name = {job.name: job for job in self.jobs}
        self._num_slots = self.state.bank.rank.shape[0]
        self._segments = segment_bucket(self.schedule.plan.microbatches)
        self._in_flight: deque[tuple[int, jax.Array, StepReport | None]] = deque()
        self._failure: NonFiniteError | None = None
        self._tokens_at = _tokens_at_ends(self.schedule.plan.microbatches)
        for job in self.jobs:
            self.progress.setdefault(job.name, JobProgress())
        self._rows = {
            job.name: JobRows(self.schedule.slot[job.name], job.seed, job.samples, job.batch_tokens)
            for job in self.jobs
            if self.progress[job.name].status != "frozen"
        }
        self._load_hyper()

    @property
    def finished(self) -> bool:
        """All microbatches are done."""
        return self.cursor == len(self.schedule.plan.microbatches)

    def compile_ahead(self) -> None:
        """Starts to compile the programs in the background."""
        if not self.finished:
            example = self.evaluator.example(self._num_slots)
            self.programs.announce(self.state, self._hyper, self._pack(self.cursor), example)

    def evaluate_base(self) -> None:
        """Evaluates the base model on the held-out samples of every job that has not started."""
        for job in self.jobs:
            if self.progress[job.name].base_loss is None:
                self._evaluate(job, BASE)

    def run_microbatch(self) -> None:
        """Trains on the next microbatch and does what is due after it.

        Raises:
            NonFiniteError: a job with policy `stop` had a non-finite gradient; all is saved.
        """
        index, self.cursor = self.cursor, self.cursor + 1
        microbatch = self.schedule.plan.microbatches[index]
        for job in self.jobs:
            if self.schedule.first[job.name] == index:
                self._start(job)
        if any(stretch.job in self._rows for stretch in microbatch.stretches):
            self._train(index)
            self._settle(IN_FLIGHT)
        self.tokens += sum(stretch.tokens() for stretch in microbatch.stretches)
        self._after(index)

    def save(self) -> None:
        """Saves a verified checkpoint of everything, unless this one exists."""
        self._settle(0)
        if self.cursor in self.checkpoints.steps():
            return
        progress = {
            **self.facts,
            "cursor": self.cursor,
            "jobs": {name: asdict(progress) for name, progress in self.progress.items()},
        }
        seconds = self.checkpoints.save(self.cursor, self.state, progress)
        path = str(self.folder.checkpoints / str(self.cursor))
        self.listener(CheckpointSaved(self.cursor, seconds, path))

    def _train(self, index: int) -> None:
        """Dispatches one microbatch, and the update of the slots whose global batch it ends."""
        batch = self._pack(index)
        self.state, loss = self.programs.train(self.state, batch)
        report = None
        if np.any(batch.batch_end):
            self.state, report = self.programs.update(self.state, self._hyper, batch.batch_end)
        self._in_flight.append((index, loss, report))

    def _pack(self, index: int) -> PackedBatch:
        batch, _ = pack(
            self.schedule.plan.microbatches[index],
            self._rows,
            tile=self.tile,
            num_slots=self._num_slots,
            max_segments=self._segments,
        )
        return batch

    def _start(self, job: TrainJob) -> None:
        """Gives a job its slot: a fresh adapter and zero moments, whatever lay there."""
        slot = self.schedule.slot[job.name]
        bank = write_slot(self.state.bank, slot, lora_spec(job.config), job.seed, job.targets)
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
        self._hyper = jax.device_put(hyper_parameters(self.jobs, slots, self._num_slots))

    def _after(self, index: int) -> None:
        """Evaluates, ends jobs and saves, as due after a microbatch."""
        ended = [s for s in self.schedule.plan.microbatches[index].stretches if s.ends]
        to_evaluate, to_end, save = [], [], self._failure is not None
        for stretch in ended:
            job, step = self._by_name[stretch.job], stretch.batch + 1
            self.progress[job.name].step = step
            last = step == job.num_steps
            if job.name in self._rows or last:
                if step % job.config.eval.every == 0 or last:
                    to_evaluate.append(job)
                save = save or step % job.config.save.every == 0
            if last:
                to_end.append(job)
        if to_evaluate or to_end or save:
            self._settle(0)
        for job in to_evaluate:
            self._evaluate(job, self.schedule.slot[job.name])
        for job in to_end:
            self._end(job)
        if save or self.finished or self._failure is not None:
            self.save()
        if self._failure is not None:
            raise self._failure

    def _evaluate(self, job: TrainJob, slot: int) -> None:
        """Evaluates a job, or the base on its samples; the best adapter so far is exported."""
        result = self.evaluator(self.state.bank, job, slot)
        if result is None:
            return
        progress, best = self.progress[job.name], False
        if slot == BASE:
            progress.base_loss, progress.base_match = result.loss, result.exact_match
        else:
            progress.eval_loss, progress.exact_match = result.loss, result.exact_match
            best = result.loss < (math.inf if progress.best_loss is None else progress.best_loss)
        if best:
            progress.best_loss, progress.best_step = result.loss, progress.step
            self._export(job, "best")
        self.listener(
            Evaluated(
                job=job.name,
                step=progress.step,
                loss=result.loss,
                token_accuracy=result.token_accuracy,
                exact_match=result.exact_match,
                samples=result.samples,
                best=best,
                microbatch=self.cursor if slot == BASE else self.cursor - 1,
            )
        )

    def _end(self, job: TrainJob) -> None:
        """Exports a finished job; its slot is free from now on."""
        progress = self.progress[job.name]
        self._export(job, "last")
        if progress.best_loss is None:
            self._export(job, "best")
        if progress.status == "training":
            progress.status = "done"
        adapter = str(self.folder.adapter(job.name))
        self.listener(
            JobEnded(job.name, progress.step, progress.status, progress.rejected, adapter)
        )

    def _export(self, job: TrainJob, which: str) -> None:
        adapter = read_slot(self.state.bank, self.schedule.slot[job.name])
        name = self.base.path or self.base.name
        try:
            save_peft(self.folder.adapter(job.name, which), adapter, lora_spec(job.config), name)
        except AdapterError as error:  # not finite; the other jobs go on
            self.listener(Notice(f"{job.name}: the {which} adapter is not exported: {error}"))

    def _settle(self, limit: int) -> None:
        """Waits until at most `limit` microbatches are under way, and reports the others."""
        while len(self._in_flight) > limit:
            index, loss, report = self._in_flight.popleft()
            loss.block_until_ready()
            self._report(index, None if report is None else jax.device_get(report))

    def _report(self, index: int, report: StepReport | None) -> None:
        microbatch = self.schedule.plan.microbatches[index]
        for stretch in microbatch.stretches:
            if stretch.ends and stretch.job in self._rows and report is not None:
                self._report_step(index, stretch, report)
        tokens = sum(stretch.tokens() for stretch in microbatch.stretches)
        total = len(self.schedule.plan.microbatches)
        self.listener(MicrobatchDone(index, total, tokens, microbatch.capacity))

    def _report_step(self, index: int, stretch: Stretch, report: StepReport) -> None:
        job, slot = self._by_name[stretch.job], self.schedule.slot[stretch.job]
        applied = bool(report.applied[slot])
        self.listener(
            StepDone(
                job=job.name,
                step=stretch.batch + 1,
                total=job.num_steps,
                loss=float(report.loss[slot]),
                tokens=self._tokens_at[job.name, stretch.batch],
                lr=float(report.lr[slot]),
                grad_norm=float(report.grad_norm[slot]),
                applied=applied,
                microbatch=index,
            )
        )
        if not applied:
            self._reject(job, stretch.batch + 1)

    def _reject(self, job: TrainJob, step: int) -> None:
        """Obeys a job's policy after a non-finite batch, which the device has rejected already."""
        progress, policy = self.progress[job.name], job.config.train.on_nonfinite
        progress.rejected += 1
        message = f"{job.name}: step {step} rejected, its loss or gradient is not finite"
        if policy == "freeze":
            progress.status = "frozen"
            del self._rows[job.name]
            message += "; the adapter is frozen as it was before (on_nonfinite: freeze)"
        self.listener(Notice(message))
        if policy == "stop":
            self._failure = NonFiniteError(
                f"{message}; stopped (on_nonfinite: stop). All jobs are saved at microbatch "
                f"{self.cursor}; the same command goes on after the rejected step"
            )


def _tokens_at_ends(microbatches: Sequence[Microbatch]) -> dict[tuple[str, int], int]:
    """Tokens each job has trained on by the end of each of its global batches."""
    total: dict[str, int] = {}
    at_end = {}
    for microbatch in microbatches:
        for stretch in microbatch.stretches:
            total[stretch.job] = total.get(stretch.job, 0) + stretch.tokens()
            if stretch.ends:
                at_end[stretch.job, stretch.batch] = total[stretch.job]
    return at_end
