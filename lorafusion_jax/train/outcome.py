"""What becomes of a dispatched microbatch: the wait for it, its report, and each job's policies."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from lorafusion_jax.errors import LossSpikeError, NonFiniteError
from lorafusion_jax.train.events import Listener, MicrobatchDone, Notice, StepDone
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.progress import JobProgress
from lorafusion_jax.train.schedule import Schedule
from lorafusion_jax.train.spike import SpikeGuard
from lorafusion_jax.train.step import StepReport
from lorafusion_sched import Microbatch, Stretch

IN_FLIGHT = 2
"""Microbatches that may be under way on the device before the host waits for the oldest."""


class Outcomes:
    """Microbatches under way on the device, reported in order as they end.

    Args:
        jobs: of the run, by name.
        schedule: plan and slots.
        progress: of each job; policies change it.
        ended: jobs that ended early, and the microbatch from which on they are skipped.
        guard: told the loss of every step.
        listener: told everything.
        cursor: returns the next microbatch, for messages.

    Attributes:
        failure: why the run must stop, after all is saved; None while it may go on.
    """

    def __init__(
        self,
        jobs: Mapping[str, TrainJob],
        schedule: Schedule,
        progress: Mapping[str, JobProgress],
        ended: Mapping[str, int],
        guard: SpikeGuard,
        listener: Listener,
        cursor: Callable[[], int],
    ):
        self.failure: NonFiniteError | LossSpikeError | None = None
        self._jobs, self._progress, self._ended, self._guard = jobs, progress, ended, guard
        self._listener, self._cursor = listener, cursor
        self._under_way: deque[tuple[int, jax.Array | np.ndarray, StepReport | None]] = deque()
        self.follow(schedule)

    def follow(self, schedule: Schedule) -> None:
        """Takes over a changed schedule; what is under way is the same in both."""
        self._schedule = schedule
        self._tokens_at = _tokens_at_ends(schedule.plan.microbatches)

    def dispatched(
        self, index: int, loss: jax.Array | np.ndarray, report: StepReport | None
    ) -> None:
        """Takes note of a microbatch and waits for the oldest if too many are under way.

        Args:
            index: in the plan.
            loss: of the microbatch: small, and ready when it is done.
            report: of the update, if it ended a global batch.
        """
        self._under_way.append((index, loss, report))
        self.settle(IN_FLIGHT)

    def settle(self, limit: int = 0) -> None:
        """Waits until at most `limit` microbatches are under way, and reports the others."""
        while len(self._under_way) > limit:
            index, loss, report = self._under_way.popleft()
            jax.block_until_ready(loss)
            self._report(index, None if report is None else jax.device_get(report))

    def settle_before(self, index: int) -> None:
        """Waits for the microbatches before `index`: their losses are known then."""
        while self._under_way and self._under_way[0][0] < index:
            self.settle(len(self._under_way) - 1)

    def _report(self, index: int, report: StepReport | None) -> None:
        microbatches = self._schedule.plan.microbatches
        microbatch, tokens = microbatches[index], 0
        for stretch in microbatch.stretches:
            live = self._progress[stretch.job].status != "frozen"
            live = live and index < self._ended.get(stretch.job, index + 1)
            tokens += stretch.tokens() if live else 0  # others were padding
            if stretch.ends and live and report is not None:
                self._report_step(index, stretch, report)
        self._listener(MicrobatchDone(index, len(microbatches), tokens, microbatch.capacity))

    def _report_step(self, index: int, stretch: Stretch, report: StepReport) -> None:
        job, slot = self._jobs[stretch.job], self._schedule.slot[stretch.job]
        applied, loss = bool(report.applied[slot]), float(report.loss[slot])
        finite = bool(np.isfinite(loss) and np.isfinite(report.grad_norm[slot]))
        if finite:
            self._guard.note(job.name, index, loss, applied=applied)
        self._listener(
            StepDone(
                job=job.name,
                step=stretch.batch + 1,
                total=job.num_steps,
                loss=loss,
                tokens=self._tokens_at[job.name, stretch.batch],
                lr=float(report.lr[slot]),
                grad_norm=float(report.grad_norm[slot]),
                applied=applied,
                microbatch=index,
            )
        )
        if not applied and finite:
            self._skip_spike(job, stretch.batch + 1, loss)
        elif not applied:
            self._reject(job, stretch.batch + 1)

    def _skip_spike(self, job: TrainJob, step: int, loss: float) -> None:
        """Reports a spike, which the device has skipped already, and stops after too many."""
        progress = self._progress[job.name]
        progress.rejected += 1
        message = (
            f"{job.name}: step {step} skipped, its loss {loss:.4g} is a spike (train.spike; "
            f"{progress.spikes} in a row)"
        )
        self._listener(Notice(message))
        if self._guard.exhausted(job.name):
            self.failure = LossSpikeError(
                f"{message}; stopped. All jobs are saved at microbatch {self._cursor()}; the same "
                "command goes on after the skipped steps. Look at the data there, lower optim.lr, "
                "or raise train.spike.sigmas"
            )

    def _reject(self, job: TrainJob, step: int) -> None:
        """Obeys a job's policy after a non-finite batch, which the device has rejected already."""
        progress, policy = self._progress[job.name], job.config.train.on_nonfinite
        progress.rejected += 1
        message = f"{job.name}: step {step} rejected, its loss or gradient is not finite"
        if policy == "freeze":
            progress.status = "frozen"
            message += "; the adapter is frozen as it was before (on_nonfinite: freeze)"
        self._listener(Notice(message))
        if policy == "stop":
            self.failure = NonFiniteError(
                f"{message}; stopped (on_nonfinite: stop). All jobs are saved at microbatch "
                f"{self._cursor()}; the same command goes on after the rejected step"
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
