"""Where metrics also go: TensorBoard, Weights & Biases, trackio. None of them can stop a run.

A sink that fails is told to the user once and left out from then on. The packages are optional and
imported when a run asks for them.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from lorafusion_jax.config import RunConfig
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.train.events import Evaluated, Event, Listener, Notice, StepDone
from lorafusion_jax.train.run_folder import RunFolder

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class MetricSink(Protocol):
    """What a destination of metrics must be able to do."""

    def write(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """Takes a job's values at one of its optimizer steps; 0 is the base model."""
        ...

    def close(self) -> None:
        """Ends it: all values are delivered."""
        ...


def check_sinks(names: Sequence[str]) -> None:
    """Refuses sinks whose package is not installed, before anything is computed.

    Raises:
        ConfigError: names the package and how to install it.
    """
    for name in names:
        package = PACKAGES[name]
        if importlib.util.find_spec(package) is None:
            extra = "'lorafusion-jax[tensorboard]'" if name == "tensorboard" else package
            raise ConfigError(
                f"report.to: {name} needs the package {package}: pip install {extra}, or leave "
                f"{name} out"
            )


class Sinks:
    """A listener that hands the metrics of a run to its sinks; a context manager.

    Args:
        config: of the run; its `report` section says which sinks, and how often.
        folder: of the run.
        steps: optimizer steps of each job that were done before, in a run that goes on.
        notify: told if a sink fails.
    """

    def __init__(
        self, config: RunConfig, folder: RunFolder, steps: Mapping[str, int], notify: Listener
    ):
        self._every, self._notify = config.report.every, notify
        self._sinks: dict[str, MetricSink] = {}
        for name in config.report.to:
            self._try(name, lambda name=name: self._open(name, config, folder, steps))

    def __call__(self, event: Event) -> None:
        """Passes on the metrics in an event."""
        match event:
            case StepDone():
                first_or_last = event.step in (1, event.total)
                if first_or_last or event.step % self._every == 0:
                    values = {
                        "loss": event.loss,
                        "lr": event.lr,
                        "grad_norm": event.grad_norm,
                        "tokens": float(event.tokens),
                    }
                    self._write(event.job, event.step, values)
            case Evaluated():
                values = {
                    "eval_loss": event.loss,
                    "token_accuracy": event.token_accuracy,
                    "exact_match": event.exact_match,
                }
                self._write(event.job, event.step, values)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for name, sink in list(self._sinks.items()):
            self._try(name, sink.close)

    def _open(
        self, name: str, config: RunConfig, folder: RunFolder, steps: Mapping[str, int]
    ) -> None:
        self._sinks[name] = _OPENERS[name](config, folder, steps)

    def _write(self, job: str, step: int, values: Mapping[str, float]) -> None:
        for name, sink in list(self._sinks.items()):
            self._try(name, lambda sink=sink: sink.write(job, step, values))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # of somebody else's library and service
            self._sinks.pop(name, None)
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._notify(Notice(f"report.to: {name} failed and is left out from here on: {reason}"))


class TensorBoardSink:
    """Event files in `tensorboard/JOB` of the run's folder; one curve per job in each chart.

    Args:
        config: unused; sinks are made alike.
        folder: of the run.
        steps: steps done before; what was written beyond them will be written again.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, steps: Mapping[str, int]):
        self._module = importlib.import_module("tensorboardX")
        self._folder, self._steps = folder, steps
        self._writers: dict[str, Any] = {}

    def write(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """See `MetricSink`."""
        if job not in self._writers:
            path = str(self._folder.path / "tensorboard" / job)
            purge = self._steps[job] + 1 if self._steps.get(job) else None
            self._writers[job] = self._module.SummaryWriter(path, purge_step=purge)
        for name, value in values.items():
            self._writers[job].add_scalar(name, value, step)

    def close(self) -> None:
        """See `MetricSink`."""
        for writer in self._writers.values():
            writer.close()


class WandbSink:
    """One Weights & Biases run for all jobs: `JOB/loss` over `JOB/step`, and so on.

    Args:
        config: of the run.
        folder: of the run; a run that goes on in the same folder goes on there too.
        steps: unused; sinks are made alike.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, steps: Mapping[str, int]):
        module = importlib.import_module("wandb")
        self._run = module.init(
            project=config.report.project,
            name=folder.path.resolve().name,
            id=hashlib.sha256(str(folder.path.resolve()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
        )
        self._known: set[str] = set()

    def write(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """See `MetricSink`."""
        if job not in self._known:
            self._known.add(job)
            self._run.define_metric(f"{job}/*", step_metric=f"{job}/step")
        self._run.log({f"{job}/step": step} | {f"{job}/{k}": v for k, v in values.items()})

    def close(self) -> None:
        """See `MetricSink`."""
        self._run.finish()


class TrackioSink:
    """One trackio run for all jobs: `JOB/loss`, `JOB/step`, and so on.

    Args:
        config: of the run.
        folder: of the run.
        steps: unused; sinks are made alike.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, steps: Mapping[str, int]):
        self._module = importlib.import_module("trackio")
        self._module.init(
            project=config.report.project,
            name=folder.path.resolve().name,
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def write(self, job: str, step: int, values: Mapping[str, float]) -> None:
        """See `MetricSink`."""
        self._module.log({f"{job}/step": step} | {f"{job}/{k}": v for k, v in values.items()})

    def close(self) -> None:
        """See `MetricSink`."""
        self._module.finish()


_OPENERS: dict[str, Callable[[RunConfig, RunFolder, Mapping[str, int]], MetricSink]] = {
    "tensorboard": TensorBoardSink,
    "wandb": WandbSink,
    "trackio": TrackioSink,
}
