"""The commands that train: train, sweep."""

import json
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafusion_jax.cli.view import number, print_table
from lorafusion_jax.errors import ConfigError, LoraFusionError

if TYPE_CHECKING:
    from lorafusion_jax.config import RunConfig
    from lorafusion_jax.models import Base
    from lorafusion_jax.train.results import Results
    from lorafusion_jax.train.run_folder import RunFolder

ConfigArgument = Annotated[Path, typer.Argument(help="lorafusion.yaml, or TOML by its suffix.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override, such as jobs.sql.lora.r=32.")
]
ResumeOption = Annotated[
    str,
    typer.Option(
        metavar="auto|never|PATH",
        help="auto: go on where the output folder stands. never: remove what is there, finished "
        "adapters too, and start over. PATH: go on from another run folder or checkpoint.",
    ),
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Optimizer steps of every job.")]
OutputOption = Annotated[Path | None, typer.Option(help="Output folder.")]
PlainOption = Annotated[bool, typer.Option("--plain", help="Lines instead of a live table.")]
CoordinatorOption = Annotated[
    str | None,
    typer.Option(
        envvar="JAX_COORDINATOR_ADDRESS",
        help="HOST:PORT of process 0, to train with several processes.",
    ),
]
ProcessOption = Annotated[
    int | None, typer.Option(envvar="JAX_PROCESS_ID", help="Number of this one, from 0.")
]
ProcessesOption = Annotated[
    int | None, typer.Option(envvar="JAX_NUM_PROCESSES", help="How many there are.")
]
SamplesOption = Annotated[int, typer.Option(min=0, help="Held-out rows to answer at the end.")]


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(train)
    app.command()(sweep)


def train(
    config: ConfigArgument,
    overrides: SetOption = None,
    jobs: Annotated[str | None, typer.Option(help="Train these only: a,b,c.")] = None,
    resume: ResumeOption = "auto",
    max_steps: StepsOption = None,
    output: OutputOption = None,
    plain: PlainOption = False,
    samples: SamplesOption = 2,
    coordinator: CoordinatorOption = None,
    process: ProcessOption = None,
    processes: ProcessesOption = None,
) -> None:
    """Train all jobs together; run again to resume."""
    read = partial(read_config, config, overrides, jobs=jobs, max_steps=max_steps, output=output)
    if (coordinator, process, processes) == (None, None, None):
        run = read()
    else:
        from lorafusion_jax.parallel.processes import all_or_none, start_processes

        start_processes(coordinator, process, processes)
        with all_or_none():  # the file may be missing where one process runs
            run = read()
    run_training(run, config, resume=resume, plain=plain, samples=samples)


def sweep(
    config: ConfigArgument,
    job: Annotated[str, typer.Argument(help="The job to try with other values.")],
    over: Annotated[
        list[str], typer.Option(help="A key and its values: 'lora.r=[8, 32]'. Repeat for a grid.")
    ],
    overrides: SetOption = None,
    resume: ResumeOption = "auto",
    max_steps: StepsOption = None,
    output: OutputOption = None,
    plain: PlainOption = False,
    samples: SamplesOption = 0,
) -> None:
    """Train one job with all combinations of values. They train together and are compared.

    The same as a `sweep:` section in the job; other jobs are left out.
    """
    grid = ", ".join(_grid_entry(text) for text in over)
    changed = [*(overrides or []), f"jobs.{job}.sweep={{{grid}}}"]
    run = read_config(config, changed, jobs=job, max_steps=max_steps, output=output)
    run_training(run, config, resume=resume, plain=plain, samples=samples)


def _grid_entry(text: str) -> str:
    key, equals, values = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--over {text!r}: expected key=[values], such as 'lora.r=[8, 32]'")
    return f"{json.dumps(key.strip())}: {values}"


def run_training(
    run: "RunConfig", source: Path, *, resume: str, plain: bool, samples: int
) -> "Results":
    """Trains and shows what came of it; of several processes, the first shows it.

    Args:
        run: the configuration.
        source: file that it was read from.
        resume: see `MultiTrainer.fit`.
        plain: lines instead of a live table.
        samples: held-out rows of each job to answer at the end.
    """
    from lorafusion_jax.cli.progress import TrainProgress, bytes_text
    from lorafusion_jax.cli.session import device_line, start_jax
    from lorafusion_jax.cli.status import draw
    from lorafusion_jax.parallel.processes import all_or_none, is_first
    from lorafusion_jax.report import write_report
    from lorafusion_jax.train.trainer import base_of_run, trainer_from_config

    start_jax()
    with all_or_none():  # the model may be missing where one process runs
        base = base_of_run(run)
    if not is_first():
        return trainer_from_config(run, base=base, source=source).fit(resume)
    print(f"base     {base.name}, {run.base.dtype} ({bytes_text(size_of(base.model))})")
    print(f"device   {device_line()}", flush=True)
    with TrainProgress(plain=plain) as progress:
        results = trainer_from_config(run, base=base, listener=progress, source=source).fit(resume)
    show_results(results)
    show_sweeps(results)
    draw(results.folder)
    answered = {name: results.folder.job(name) / "samples.md" for name in results}
    if base.unread is not None:
        samples = 0  # the model is whole nowhere, so it answers nothing here
    if samples and not (progress.resumed_at_end and any(p.exists() for p in answered.values())):
        _answer(results.folder, base, samples)
    report = write_report(results.folder)
    for path in answered.values():
        if samples and path.exists():
            print("\n" + path.read_text(encoding="utf-8"), end="")
    print(f"\nadapters {results.folder.path}/jobs/*/adapter")
    print(f"report   {report} (open it in a browser), summary.md, loss.png, utilisation.png")
    if base.unread is not None:
        print("samples  none: the base model is spread over several devices; generate loads it")
    program = _program()
    print(f'try      {program} generate {results.folder.path} --base --prompt "..."')
    print(f"serve    {program} export {results.folder.path} --verify")
    return results


def _program() -> str:
    """How this program is called from here: its name, or its path where that would not find it."""
    beside = Path(sys.executable).with_name("lorafusion")
    if shutil.which("lorafusion") is not None or not beside.exists():
        return "lorafusion"
    return os.path.relpath(beside)


def _answer(folder: "RunFolder", base: "Base", rows: int) -> None:
    """Writes the samples; what goes wrong with them costs a trained run nothing but them."""
    import jax

    from lorafusion_jax.cli.answers import write_samples

    try:
        write_samples(folder, base, rows=rows)
    except (LoraFusionError, jax.errors.JaxRuntimeError, MemoryError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"samples  left out: {reason}")


def read_config(
    path: Path,
    overrides: list[str] | None = None,
    *,
    jobs: str | None = None,
    max_steps: int | None = None,
    output: Path | None = None,
) -> "RunConfig":
    """Reads a configuration and applies the command line's shorthands.

    Args:
        path: the file.
        overrides: dotted `key=value` texts.
        jobs: comma-separated names of the jobs to keep; None for all.
        max_steps: of every job, instead of what the file says.
        output: output folder, relative to the current one.

    Raises:
        ConfigError: the file, an override or a job's name cannot be used.
    """
    from lorafusion_jax.config import load_config

    overrides = list(overrides or [])
    if output is not None:
        overrides.append(f"output={output.resolve()}")
    config = load_config(path, overrides)
    if max_steps is not None:
        config = _of_length(config, max_steps)
    if jobs is None:
        return config
    wanted = [name.strip() for name in jobs.split(",")]
    return config.model_copy(update={"jobs": tuple(_chosen(config, wanted))})


def _of_length(config: "RunConfig", max_steps: int) -> "RunConfig":
    """The run with so many steps of every job, whatever the file says."""
    changed = []
    for job in config.jobs:
        swept = {} if job.swept is None else job.swept.values
        if lengths := {"train.epochs", "train.max_steps"} & swept.keys():
            raise ConfigError(
                f"--max-steps would undo the sweep of {min(lengths)} in job {job.identity}: "
                "leave out one of them"
            )
        train = job.train.model_copy(update={"max_steps": max_steps, "epochs": None})
        changed.append(job.model_copy(update={"train": train}))
    return config.model_copy(update={"jobs": tuple(changed)})


def _chosen(config: "RunConfig", names: list[str]):
    known = {name: None for job in config.jobs for name in (job.identity, job.name)}
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"no job {unknown[0]!r}; there are: {', '.join(known)}")
    return [job for job in config.jobs if job.name in names or job.identity in names]


def size_of(tree: object) -> int:
    """Returns the bytes of all arrays of a tree or module."""
    import jax
    from flax import nnx

    leaves = jax.tree.leaves(nnx.state(tree) if isinstance(tree, nnx.Module) else tree)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))


def show_results(results: "Results") -> None:
    """Prints held-out loss and exact match of the base and of each adapter."""
    headings = ("job", "steps", "loss, base", "adapter", "change", "exact, base", "adapter")
    print()
    print_table(headings, [_result_row(results, name) for name in results])


def show_sweeps(results: "Results") -> None:
    """Prints the comparison of each sweep, the lowest held-out loss first."""
    from lorafusion_jax.train.comparison import cell

    path = results.folder.path / "sweep.json"
    tables = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, rows in tables.items():
        print(f"\nsweep of {name}, lowest held-out loss first")
        headings = tuple(key.replace("_", " ") for key in rows[0])
        print_table(headings, [tuple(map(cell, row.values())) for row in rows])


def _result_row(results: "Results", name: str) -> tuple[str, ...]:
    result = results[name]
    before, after = result.base_eval_loss, result.best_eval_loss
    change = f"{after / before - 1:+.0%}" if before and after is not None else "-"
    evals = {
        m["step"]: m["exact_match"] for m in result.history if m.get("exact_match") is not None
    }
    exact = number(evals.get(0), ".0%"), number(evals.get(result.best_step), ".0%")
    steps = str(result.steps) + ("" if result.status == "done" else f" ({result.status})")
    return name, steps, number(before), number(after), change, *exact
