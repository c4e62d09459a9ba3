"""Obeys requests to a running process: jobs are cancelled and join between two microbatches."""

from collections.abc import Callable
from pathlib import Path

import jax
from pydantic import ValidationError

from lorafusion_jax.config import JobConfig, RunConfig
from lorafusion_jax.errors import ConfigError, LoraFusionError
from lorafusion_jax.train import control
from lorafusion_jax.train.events import Notice
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.loop import Run
from lorafusion_sched import PlanError


class Obedience:
    """Looks for requests in a run's folder and does what they ask for.

    A request that cannot be obeyed is refused with a notice and changes nothing.

    Args:
        run: that is asked to change.
        config: of the run; grows with its jobs.
        resolve: reads the data of a job.
    """

    def __init__(self, run: Run, config: RunConfig, resolve: Callable[[JobConfig], TrainJob]):
        self._run, self._config, self._resolve = run, config, resolve
        self._obeyed: list[Path] = []

    def __call__(self) -> None:
        """Obeys the requests that are waiting, oldest first."""
        if self._obeyed:  # a microbatch ago: this one's checkpoint can hold what was asked for
            self._run.finish_saving()
            self.forget()
        for path in control.waiting(self._run.folder):
            try:
                self._obey(path)
                self._obeyed.append(path)
            except (LoraFusionError, PlanError) as error:
                self._run.listener(Notice(f"request refused: {error}"))
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Removes the requests that were obeyed; to be called when a checkpoint holds them."""
        for path in self._obeyed:
            path.unlink(missing_ok=True)
        self._obeyed = []

    def _obey(self, path: Path) -> None:
        request = control.read(path)
        if jax.process_count() > 1:
            raise ConfigError(
                f"a run of {jax.process_count()} processes takes none: stop it, change its "
                "configuration and start all of them again"
            )
        if isinstance(request, control.Cancel):
            self._cancel(request.job)
        else:
            self._add(list(request.jobs))

    def _cancel(self, name: str) -> None:
        known = {job.name for job in self._run.jobs}
        if name not in known:
            raise ConfigError(f"no job {name!r}; there are: {', '.join(sorted(known))}")
        status = self._run.progress[name].status
        if status not in ("waiting", "training"):
            raise ConfigError(f"{name} has ended already ({status})")
        self._run.end_job(name, "cancelled", repack=False)
        self._run.listener(Notice(f"{name} is cancelled as asked; the others go on as they are"))

    def _add(self, configs: list[JobConfig]) -> None:
        """Admits jobs, all or none."""
        taken = {job.name.casefold() for job in self._run.jobs}
        for job in configs:
            if job.name.casefold() in taken:
                raise ConfigError(f"job {job.name!r} is in the run already")
            taken.add(job.name.casefold())
        jobs = [self._resolve(job) for job in configs]
        for job in jobs:
            self._run.check_room(job)
        config = self._config.model_copy(update={"jobs": (*self._config.jobs, *configs)})
        try:
            RunConfig.model_validate_json(config.model_dump_json())
        except ValidationError as error:
            raise ConfigError(error.errors(include_url=False)[0]["msg"]) from error
        self._run.join(jobs, repack=False)
        self._config = config
        self._run.folder.write_config(config)
        self._run.remember(config, jobs)
        names = ", ".join(job.name for job in jobs)
        self._run.listener(
            Notice(f"{names} will join when an adapter slot is free; no bit of the others changes")
        )
