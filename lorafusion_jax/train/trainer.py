"""Training many adapters at once, told from beginning to end by `MultiTrainer.fit`."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import jax
from pydantic import ValidationError

from lorafusion_jax.config import (
    BaseModelConfig,
    BatchingConfig,
    DataConfig,
    EvalConfig,
    JobConfig,
    LoraConfig,
    OptimConfig,
    ParallelConfig,
    ReportConfig,
    RunConfig,
    RunTrainConfig,
    SaveConfig,
    TrainConfig,
)
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.hf_weights import Base, load_base, open_base
from lorafusion_jax.parallel.feed import for_one_device
from lorafusion_jax.parallel.mesh import check_mesh
from lorafusion_jax.parallel.order import best_schedule
from lorafusion_jax.parallel.processes import all_or_none, is_first, largest
from lorafusion_jax.train.background import BackgroundSaver
from lorafusion_jax.train.capacity import capacities_of, cost_of_run
from lorafusion_jax.train.drive import drive, explained_memory, fan_out, peak_bytes
from lorafusion_jax.train.events import Listener, RunEnded
from lorafusion_jax.train.goodput import Goodput
from lorafusion_jax.train.jobs import Data, TrainJob, resolve_job
from lorafusion_jax.train.live_status import LiveStatus
from lorafusion_jax.train.metrics import RunWriter, write_summary
from lorafusion_jax.train.obey import Obedience
from lorafusion_jax.train.prepare import prepare_run, tile_rows, within_memory
from lorafusion_jax.train.results import Results, collect_results
from lorafusion_jax.train.resume import Saved, find_saved
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_jax.train.schedule import Schedule, make_schedule, schedule_of
from lorafusion_jax.train.signals import StopSignals
from lorafusion_jax.train.sinks import Sinks, check_sinks
from lorafusion_jax.train.together import (
    check_same_everywhere,
    check_same_settings,
    find_saved_together,
    locked_folder,
    reports_of,
)
from lorafusion_jax.train.watchdog import Watchdog
from lorafusion_sched import to_json

IN_MEMORY = "(in memory)"
"""What the configuration says instead of a path for data given as Python objects."""


class MultiTrainer:
    """Trains adapters of many jobs together over one frozen base model.

    Args:
        base: the base model.
        output: folder of the run.
        tokens_per_microbatch: tokens that one forward and backward pass processes.
        seed: of initialisation, order, split and dropout, together with each job's name.
        slots: adapters that train at the same time; None for all. Other jobs wait for a slot.
        batching: all settings of batching, in place of `tokens_per_microbatch`.
        train: settings of the whole run.
        report: how often metrics are written.
        listener: called with every event (`lorafusion_jax.train.events`).

    Raises:
        ConfigError: a setting cannot be used.
    """

    def __init__(
        self,
        base: Base,
        *,
        output: str | Path,
        tokens_per_microbatch: int = 8192,
        seed: int = 0,
        slots: int | None = None,
        batching: BatchingConfig | None = None,
        train: RunTrainConfig | None = None,
        parallel: ParallelConfig | None = None,
        report: ReportConfig | None = None,
        listener: Listener | None = None,
    ):
        with _config_errors("MultiTrainer"):
            self._batching = batching or BatchingConfig(tokens_per_microbatch=tokens_per_microbatch)
        if slots is not None and slots < 1:
            raise ConfigError(f"slots={slots} must be at least 1, or None for one per job")
        self._base, self._output, self._seed, self._slots = base, Path(output), seed, slots
        self._parallel = parallel or ParallelConfig()
        self._train, self._report = train or RunTrainConfig(), report or ReportConfig()
        self._listener = listener
        self._jobs: list[tuple[JobConfig, Data]] = []
        self._config: RunConfig | None = None
        self._source: Path | None = None
        # Told when a save passes each of its fault points; crash tests die there.
        self._at: Callable[[str], None] = lambda _: None

    def add_job(
        self,
        name: str,
        data: Data,
        *,
        lora: LoraConfig | None = None,
        optim: OptimConfig | None = None,
        train: TrainConfig | None = None,
        eval: EvalConfig | None = None,
        save: SaveConfig | None = None,
    ) -> None:
        """Adds a job.

        Args:
            name: of the job, its folder and its adapter.
            data: file, a `DataConfig` for more than a path, an iterable of rows (dicts of the same
                structure as a file's), or a `Dataset` of token ids.
            lora: the adapter.
            optim: its optimizer, such as `AdamW(lr=2e-4)`.
            train: its length and global batch size.
            eval: what is held out and how often it is evaluated.
            save: how often checkpoints are written.

        Raises:
            ConfigError: the name cannot be used.
        """
        path = str(data) if isinstance(data, str | Path) else IN_MEMORY
        with _config_errors(f"job {name!r}"):
            job = JobConfig(
                name=name,
                data=data if isinstance(data, DataConfig) else DataConfig(path=path),
                lora=lora or LoraConfig(),
                optim=optim or OptimConfig(),
                train=train or TrainConfig(),
                eval=eval or EvalConfig(),
                save=save or SaveConfig(),
            )
        self._jobs.append((job, data))

    @property
    def config(self) -> RunConfig:
        """The complete configuration of the run.

        Raises:
            ConfigError: no jobs, or two of one name.
        """
        if self._config is not None:
            return self._config
        model = self._base.path or self._base.name
        dtype = str(self._base.dtype)
        with _config_errors("MultiTrainer"):
            return RunConfig(
                base=BaseModelConfig(model=model, dtype=dtype),  # pyright: ignore[reportArgumentType]
                output=str(self._output),
                seed=self._seed,
                batching=self._batching,
                train=self._train,
                parallel=self._parallel,
                report=self._report,
                jobs=tuple(job for job, _ in self._jobs),
            )

    def fit(self, resume: str = "auto") -> Results:
        """Trains all jobs to their end.

        Args:
            resume: "auto" goes on with what the output folder holds; "never" starts over; a path
                is that of a run folder, or of one of its checkpoints, to go on from.

        Returns:
            Results by job name.

        Raises:
            LoraFusionError: configuration, data, checkpoints or resources cannot be used.
            StoppedError: a signal stopped training, after a clean save.
        """
        goodput, config = Goodput(), self.config
        check_same_settings(config)
        own = self._listener if is_first() else None
        reports = reports_of(config)
        # Whatever is wrong with the data or the targets ends the run here, with nothing written.
        with all_or_none():
            check_sinks(reports.report.to)
            jobs = [self._resolve(job, data) for job, data in self._jobs]
        with (
            locked_folder(self._output) as folder,
            StopSignals() as signals,
            explained_memory(config) as planned,
        ):
            find = partial(self._find_saved, folder, jobs)
            saved = find_saved_together(self._output, resume, find)
            with all_or_none():
                schedule = self._schedule(saved)
            plan_json = to_json(schedule.plan)
            check_same_everywhere(self._base, saved, plan_json)
            folder.write_start(saved.config, plan_json, self._source)
            with (
                Watchdog(config.train.watchdog, folder.path / "stacks.txt") as watchdog,
                RunWriter(folder, config.report.every, saved.cursor) as writer,
                BackgroundSaver(saved.checkpoints) as saver,
                Sinks(reports, folder, saved.steps, fan_out(writer, own)) as sinks,
            ):
                live = LiveStatus(folder)
                listener = fan_out(watchdog.alive, writer, live, sinks, own)
                run = prepare_run(self._base, folder, schedule, saved, saver, listener, goodput)
                watchdog.waiting_for = run.waiting_for
                planned.append(run.planned_memory)
                run.redo_until = writer.lost
                with closing(run):
                    drive(run, signals, Obedience(run, saved.config, self._resolve))
                parts = goodput.seconds()
                listener(RunEnded(sum(parts.values()), run.tokens, peak_bytes(), parts))
            write_summary(folder, run.jobs, run.progress)
        largest(0)  # what process 0 has written is there for all
        return collect_results(RunFolder(self._output), run.progress)

    def _find_saved(self, folder: RunFolder, jobs: list[TrainJob], resume: str) -> Saved:
        return find_saved(folder, self.config, self._base, jobs, resume, self._resolve, self._at)

    def _resolve(self, job: JobConfig, data: Data | None = None) -> TrainJob:
        """Reads a job's data, from where its configuration says if they are not given."""
        given = job.data if data is None else data
        return resolve_job(job, given, self._base, self.config.batching, self.config.seed)

    def _adopt(self, config: RunConfig, source: Path | None) -> None:
        """Takes over a complete configuration as it is."""
        self._config, self._source = config, source
        self._jobs = [(job, job.data) for job in config.jobs]

    def _schedule(self, saved: Saved) -> Schedule:
        batching, plans = saved.config.batching, [job.plan for job in saved.jobs]
        parallel = saved.config.parallel
        plan = saved.plan
        tile = tile_rows(batching) if plan is None else plan.tile
        cost = cost_of_run(self._output, self._base.config)
        slots = self._slots or max(len(plans), 1)
        batching = within_memory(self._base, saved.jobs, batching, slots, tile, parallel)
        capacities = capacities_of(plans, batching, tile, cost)
        if parallel.devices > 1 or jax.process_count() > 1:
            check_mesh(parallel.data, parallel.stage, self._base.config)
            if plan is None:  # the stages exchange rows of one static number
                capacities = capacities[-1:]
        elif plan is not None:
            plan = for_one_device(plan)
        # Another plan of the rest would add up the same gradients in another order.
        if plan is not None and not saved.joined:
            return schedule_of(
                plan,
                [job for job in plans if job.name not in saved.joining],
                # Sizes for the jobs there are now would let a change of the plan pack differently.
                capacities=saved.capacities or capacities,
                ended=saved.ended,
                slots=saved.slots,
            )
        make = partial(
            make_schedule, plans, capacities=capacities, tile=tile, max_slots=self._slots
        )
        if plan is None:
            return best_schedule(make, data=parallel.data, stage=parallel.stage)
        return make(
            done=plan.microbatches[: saved.cursor],
            ended=saved.ended,
            slots=saved.slots,
            distance=plan.distance,
            width=plan.width,
        )


def base_of_run(config: RunConfig) -> Base:
    """Returns the base model of a run: loaded, or opened where several devices will share it.

    Raises:
        ModelError: it cannot be used.
    """
    make = open_base if config.parallel.devices > 1 else load_base
    return make(config.base.model, config.base.dtype)


def trainer_from_config(
    config: RunConfig,
    *,
    base: Base | None = None,
    source: str | Path | None = None,
    listener: Listener | None = None,
) -> MultiTrainer:
    """Returns the trainer of a configuration.

    Args:
        config: the run.
        base: its base model, if it is loaded already.
        source: the configuration file, to be kept in the run's folder.
        listener: called with every event.

    Raises:
        ModelError: the base model cannot be loaded.
    """
    trainer = MultiTrainer(
        base_of_run(config) if base is None else base,
        output=config.output,
        seed=config.seed,
        batching=config.batching,
        train=config.train,
        parallel=config.parallel,
        report=config.report,
        listener=listener,
    )
    trainer._adopt(config, None if source is None else Path(source))
    return trainer


@contextmanager
def _config_errors(what: str) -> Iterator[None]:
    """Turns pydantic's errors into ours."""
    try:
        yield
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, e['loc'])) or what}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise ConfigError(f"{what}: " + "; ".join(problems)) from error
