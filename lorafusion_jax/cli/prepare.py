"""What can be known of a run before its first step, and the command that shows it: check."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from lorafusion_jax.cli.training import ConfigArgument, SetOption, read_config
from lorafusion_jax.cli.view import print_table
from lorafusion_jax.errors import ConfigError

if TYPE_CHECKING:
    from lorafusion_jax.config import RunConfig
    from lorafusion_jax.models import Base
    from lorafusion_jax.train.jobs import TrainJob
    from lorafusion_jax.train.schedule import Schedule
    from lorafusion_sched import Clock

# Per trained parameter, float32: itself, two moments, the gradient's accumulator.
_BYTES_PER_PARAMETER = 16
_SHOWN_TOKENS = 60


class Prepared(NamedTuple):
    """A run before its first step: base without weights, jobs with data, plan."""

    config: "RunConfig"
    base: "Base"
    jobs: "list[TrainJob]"
    schedule: "Schedule"


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(check)


def prepare(
    config: "RunConfig",
    base: "Base | None" = None,
    *,
    clock: "Clock" = "1f1b",
    stages: int = 1,
    width: int = 1,
) -> Prepared:
    """Resolves everything that can be known without weights.

    Args:
        config: the run.
        base: its model, if it was opened already.
        clock: how the stages of a pipeline take turns.
        stages: of the pipeline.
        width: microbatches at a time (data parallelism).

    Raises:
        LoraFusionError: model, data or targets cannot be used.
    """
    from lorafusion_jax.cli.session import outline_base
    from lorafusion_jax.train.capacity import capacities_of, cost_of_run
    from lorafusion_jax.train.jobs import resolve_job
    from lorafusion_jax.train.prepare import tile_rows
    from lorafusion_jax.train.schedule import make_schedule
    from lorafusion_sched import distance_of

    if base is None:
        base = outline_base(config.base.model, config.base.dtype)
    jobs = [resolve_job(job, job.data, base, config.batching, config.seed) for job in config.jobs]
    tile, plans = tile_rows(config.batching), [job.plan for job in jobs]
    cost = cost_of_run(Path(config.output), base.config)
    sizes = capacities_of(
        plans, config.batching, tile, cost, clock=clock, stages=stages, width=width
    )
    schedule = make_schedule(
        plans,
        capacities=sizes,
        tile=tile,
        distance=distance_of(clock, stages),
        width=width,
        clock=clock,
        cost=cost,
    )
    return Prepared(config, base, jobs, schedule)


def check(config: ConfigArgument, overrides: SetOption = None) -> None:
    """Validate configuration and data; writes nothing. Shows what training would do."""
    import jax

    from lorafusion_jax.cli.progress import bytes_text
    from lorafusion_jax.cli.training import size_of
    from lorafusion_jax.models.hf_weights import open_base
    from lorafusion_jax.train.sinks import check_sinks

    run = read_config(config, overrides)
    check_sinks(run.report.to)
    ready = prepare(run, open_base(run.base.model, run.base.dtype))  # with the weights' headers
    if run.parallel.devices > 1:
        ready = ready._replace(schedule=_schedule_on_mesh(ready))
    parameters = {job.name: _parameters(ready.base, job) for job in ready.jobs}
    base_bytes = size_of(ready.base.model)
    print(f"config   {config} is valid")
    print(f"base     {ready.base.name}, {run.base.dtype} ({bytes_text(base_bytes)})")
    headings = ("job", "samples", "held out", "steps", "tokens", "supervised", "cut", "left out")
    headings += ("r", "modules", "parameters")
    print_table(headings, [_job_row(job, parameters[job.name]) for job in ready.jobs])
    print(packing_line(ready))
    if run.parallel.devices > 1:
        mesh, here = run.parallel, jax.device_count()
        print(f"mesh     {mesh.data} x {mesh.stage} devices; this machine has {here}")
    trained = bytes_text(_BYTES_PER_PARAMETER * bank_parameters(ready))
    print(
        f"memory   base {bytes_text(base_bytes)}, adapters with optimizer state {trained}, "
        "and working memory that `train` prints once it has compiled"
    )
    job = ready.jobs[0]
    print(f"sample   first of {job.name}; loss is on what is marked")
    for learnt, text in shown_sample(job, ready.base.tokenizer):
        print(f"  {'learnt' if learnt else 'given '}  {text!r}")


def _schedule_on_mesh(ready: Prepared) -> "Schedule":
    """The plan that training makes for `parallel`, whose devices may be on another machine.

    Raises:
        ConfigError: such a mesh cannot work with this model.
    """
    from lorafusion_jax.parallel.mesh import check_sizes
    from lorafusion_jax.parallel.order import best_schedule
    from lorafusion_jax.train.schedule import make_schedule

    mesh, problem = ready.config.parallel, ready.schedule.problem
    check_sizes(
        mesh.data,
        mesh.stage,
        num_devices=mesh.devices,
        num_layers=ready.base.config.num_hidden_layers,
    )
    # The stages exchange rows of one static number.
    make = partial(
        make_schedule, problem.jobs, capacities=problem.capacities[-1:], tile=problem.tile
    )
    return best_schedule(make, data=mesh.data, stage=mesh.stage)


def shown_sample(job: "TrainJob", tokenizer) -> list[tuple[bool, str]]:
    """Returns the first sample's text in stretches: (whether it is learnt, text)."""
    tokens, supervised = job.samples[0]
    parts: list[tuple[bool, list[int]]] = []
    for token, learnt in zip(tokens[:_SHOWN_TOKENS], supervised, strict=False):
        if not parts or parts[-1][0] != bool(learnt):
            parts.append((bool(learnt), []))
        parts[-1][1].append(int(token))
    return [(learnt, tokenizer.decode(ids)) for learnt, ids in parts]


def bank_parameters(ready: Prepared) -> int:
    """Returns the parameters of all slots: each has room for the largest rank and all modules."""
    from lorafusion_jax.lora.bank import multi_linears

    linears = multi_linears(ready.base.model)
    paths = {path for job in ready.jobs for path in job.targets}
    widths = sum(linears[path].in_features + linears[path].out_features for path in paths)
    return ready.schedule.num_slots * max(job.max_rank for job in ready.jobs) * widths


def _parameters(base: "Base", job: "TrainJob") -> int:
    from lorafusion_jax.lora.bank import multi_linears

    linears = multi_linears(base.model)
    return sum(
        job.spec.rank_of(path) * (linears[path].in_features + linears[path].out_features)
        for path in job.targets
    )


def _job_row(job: "TrainJob", parameters: int) -> tuple[str, ...]:
    data = job.samples
    tokens = sum(s.length for batch in job.plan.batches for s in batch)
    counts = (job.num_train, len(job.eval_indices), job.num_steps, tokens)
    adapter = (job.config.lora.r, len(job.targets), parameters)
    return (
        job.name,
        *(f"{count:,}" for count in counts),
        f"{data.supervised.mean():.0%}",
        *(f"{count:,}" for count in (data.truncated, data.dropped, *adapter)),
    )


def packing_line(ready: Prepared) -> str:
    from lorafusion_jax.train.schedule import padding_share

    microbatches = ready.schedule.plan.microbatches
    if not microbatches:
        raise ConfigError("there is nothing to train: no job has a global batch")
    sizes = " and ".join(f"{size:,}" for size in sorted({m.capacity for m in microbatches}))
    return (
        f"packing  {len(microbatches):,} microbatches of {sizes} tokens in tiles of "
        f"{ready.schedule.plan.tile}, {padding_share(microbatches):.1%} padding"
    )
