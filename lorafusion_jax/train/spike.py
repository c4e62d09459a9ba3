"""The guard against loss spikes: a step whose loss is far above the job's recent ones is skipped.

Decided from losses of microbatches that are certainly known, whatever the device's queue holds: the
same in a repeated and in a resumed run.
"""

import math
from collections.abc import Mapping

from lorafusion_jax.config.schema import SpikeConfig
from lorafusion_jax.train.progress import JobProgress

MIN_SPREAD = 0.01
"""Deviation assumed at least, relative to the mean: a loss that hardly moves has no spikes."""


class SpikeGuard:
    """Limits of the jobs that have a guard.

    Args:
        configs: by job.
        progress: of the jobs; keeps their recent losses.
        lag: microbatches before the present one whose losses may be unknown.
    """

    def __init__(
        self, configs: Mapping[str, SpikeConfig], progress: Mapping[str, JobProgress], lag: int
    ):
        self._configs, self._progress, self._lag = dict(configs), progress, lag

    def admit(self, configs: Mapping[str, SpikeConfig]) -> None:
        """Guards jobs that join."""
        self._configs |= configs

    @property
    def active(self) -> bool:
        """Whether any job has a guard."""
        return bool(self._configs)

    def limit(self, job: str, microbatch: int) -> float:
        """Returns the loss above which a step that ends with `microbatch` is skipped."""
        config = self._configs.get(job)
        if config is None:
            return math.inf
        known = [loss for at, loss in self._progress[job].recent if at < microbatch - self._lag]
        losses = known[-config.window :]
        if len(losses) < config.window:
            return math.inf
        mean = sum(losses) / len(losses)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in losses) / len(losses))
        return mean + config.sigmas * max(deviation, MIN_SPREAD * abs(mean))

    def note(self, job: str, microbatch: int, loss: float, *, applied: bool) -> None:
        """Remembers the loss of a step; one that was skipped does not raise the limit."""
        config, progress = self._configs.get(job), self._progress[job]
        if config is None:
            return
        if applied:
            progress.spikes = 0
            # Those within the lag may not be used yet.
            progress.recent = [*progress.recent, [microbatch, loss]][-config.window - self._lag :]
        else:
            progress.spikes += 1

    def exhausted(self, job: str) -> bool:
        """Says whether more steps in a row were skipped than the job allows."""
        config = self._configs.get(job)
        return config is not None and self._progress[job].spikes >= config.max_consecutive
