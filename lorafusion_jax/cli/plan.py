"""The plan command: how a run's samples are packed, against other ways, for any pipeline."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafusion_jax.cli.prepare import Prepared, packing_line, prepare
from lorafusion_jax.cli.training import ConfigArgument, SetOption, read_config
from lorafusion_jax.cli.view import print_table
from lorafusion_jax.errors import ConfigError

if TYPE_CHECKING:
    from lorafusion_jax.config import RunConfig
    from lorafusion_jax.train.jobs import TrainJob
    from lorafusion_sched import Clock


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(plan)


def plan(
    config: ConfigArgument,
    overrides: SetOption = None,
    capacity: Annotated[
        str | None, typer.Option(help="Microbatch sizes: auto, or N[,N...]; else as configured.")
    ] = None,
    stages: Annotated[
        int | None, typer.Option(min=1, help="Pipeline stages to plan for; else as configured.")
    ] = None,
    clock: Annotated[str, typer.Option(help="How stages take turns: fbh, bfh or 1f1b.")] = "fbh",
    data_parallel: Annotated[
        int | None, typer.Option(min=1, help="Copies of the pipeline; else as configured.")
    ] = None,
    measure: Annotated[
        bool, typer.Option(help="Time microbatches here; keep their cost in the output folder.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the plan here, as JSON.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw the simulated run here: .html or .png.")
    ] = None,
) -> None:
    """Show how samples are packed. Compares with training one job at a time."""
    from lorafusion_jax.train.capacity import cost_of_run
    from lorafusion_jax.train.schedule import make_schedule, padding_share
    from lorafusion_sched import simulate, to_json

    run = read_config(config, [*(overrides or ()), *_sizes(capacity)])
    stages = run.parallel.stage if stages is None else stages
    data_parallel = run.parallel.data if data_parallel is None else data_parallel
    turns = _clock(clock, stages)
    if measure:
        _measure(run)
    ready = prepare(run, clock=turns, stages=stages, width=data_parallel)
    together, tile = ready.schedule.plan, ready.schedule.plan.tile
    print(packing_line(ready))
    rows = [_plan_row("together", together.microbatches, padding_share)]
    sizes = tuple(sorted({m.capacity for m in together.microbatches if m.stretches}))
    total = 0
    for job in ready.jobs:
        alone = make_schedule([job.plan], capacities=sizes, tile=tile).plan.microbatches
        rows.append(_plan_row(f"{job.name}, alone", alone, padding_share))
        total += sum(m.capacity for m in alone)
    print_table(("", "microbatches", "rows", "tokens", "padding"), rows)
    one_by_one = sum(_padded_rows(job) for job in ready.jobs)
    used = sum(m.capacity for m in together.microbatches if m.stretches)
    print(f"one job at a time, packed:               {total / used:.2f} x the rows")
    print(f"one job at a time, padded to its longest: {one_by_one / used:.2f} x the rows")
    cost = cost_of_run(Path(run.output), ready.base.config)
    simulated = simulate(together, cost, stages, turns)
    empty = sum(not m.stretches for m in together.microbatches)
    print(
        f"simulated: {simulated.utilisation:.1%} of the time is spent on real tokens; "
        f"{simulated.bubble:.1%} bubble, {empty} empty microbatches on {stages} stages"
    )
    if empty > len(together.microbatches) // 4:
        print("more jobs, larger global batches or fewer stages would leave fewer of them empty")
    if output is not None:
        output.write_text(to_json(together), encoding="utf-8")
    if picture is not None:
        _draw(ready, simulated, picture)


def _sizes(capacity: str | None) -> list[str]:
    """The overrides that `--capacity` stands for."""
    if capacity is None or capacity == "auto":
        return [] if capacity is None else ["batching.capacities=auto"]
    try:
        sizes = sorted({int(part) for part in capacity.split(",")})
    except ValueError:
        raise ConfigError(f"--capacity {capacity!r}: expected auto, 8192, or 4096,8192") from None
    return [f"batching.tokens_per_microbatch={sizes[-1]}", f"batching.capacities={sizes}"]


def _clock(name: str, stages: int) -> "Clock":
    """The clock of a pipeline; one stage alone has nothing to wait for."""
    if name not in ("fbh", "bfh", "1f1b"):
        raise ConfigError(f"--clock {name!r}: expected fbh, bfh or 1f1b")
    return name if stages > 1 else "1f1b"


def _measure(run: "RunConfig") -> None:
    """Times microbatches of the run on this device and writes its cost file."""
    from lorafusion_jax.cli.session import device_line, start_jax
    from lorafusion_jax.models import load_base
    from lorafusion_jax.train.capacity import COST_FILE
    from lorafusion_jax.train.jobs import resolve_job
    from lorafusion_jax.train.measure_cost import measure_cost
    from lorafusion_jax.train.prepare import tile_rows
    from lorafusion_sched import cost_to_json, padded

    start_jax()
    base = load_base(run.base.model, run.base.dtype)
    tile, largest = tile_rows(run.batching), run.batching.tokens_per_microbatch
    jobs = [resolve_job(job, job.data, base, run.batching, run.seed) for job in run.jobs]
    sizes = sorted({padded(largest // part, tile) for part in (1, 2, 4)})
    remat = "none" if run.train.remat == "auto" else run.train.remat
    cost, measured = measure_cost(base, jobs, sizes, tile, remat=remat)
    headings = ("tokens", "of samples of", "ms")
    print_table(
        headings,
        [(f"{m.rows:,}", f"{m.squares // m.rows:,}", f"{1000 * m.seconds:.1f}") for m in measured],
    )
    path = Path(run.output) / COST_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(cost_to_json(cost, device=device_line(), base=base.name), encoding="utf-8")
    print(
        f"cost     {1000 * cost.fixed:.2f} ms + {1e6 * cost.per_token:.2f} us a token + "
        f"{1e9 * cost.per_square:.2f} ns a squared length, forward; kept in {path}"
    )


def _draw(ready: Prepared, simulated, picture: Path) -> None:
    from lorafusion_sched.gantt import gantt_html

    together, title = ready.schedule.plan, f"{ready.base.name}, {len(ready.jobs)} jobs"
    if picture.suffix == ".html":
        picture.write_text(gantt_html(together, simulated, title=title), encoding="utf-8")
    elif picture.suffix == ".png":
        from lorafusion_jax.plots import plot_gantt

        plot_gantt({title: (together, simulated)}, picture)
    else:
        raise ConfigError(f"--picture {picture}: expected a name that ends in .html or .png")


def _plan_row(name: str, microbatches, padding_share) -> tuple[str, ...]:
    full = [m for m in microbatches if m.stretches]
    rows = sum(m.capacity for m in full)
    tokens = sum(s.tokens() for m in full for s in m.stretches)
    return name, f"{len(full):,}", f"{rows:,}", f"{tokens:,}", f"{padding_share(full):.1%}"


def _padded_rows(job: "TrainJob") -> int:
    """Rows of the usual way: each global batch padded to its own longest sample."""
    return sum(len(batch) * max(s.length for s in batch) for batch in job.plan.batches)
