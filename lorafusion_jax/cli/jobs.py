"""The jobs commands: change what a running process trains."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafusion_jax.errors import ConfigError

if TYPE_CHECKING:
    from lorafusion_jax.train.run_folder import RunFolder

RunArgument = Annotated[Path, typer.Argument(help="Output folder of a training run.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    jobs = typer.Typer(no_args_is_help=True, help="Change the jobs of a run while it trains.")
    jobs.command("add")(add)
    jobs.command("cancel")(cancel)
    app.add_typer(jobs, name="jobs")


def add(
    run: RunArgument,
    config: Annotated[Path, typer.Argument(help="Configuration; its jobs that are new join.")],
) -> None:
    """Let jobs join a run; no bit of the others changes."""
    from lorafusion_jax.config import load_config
    from lorafusion_jax.train.control import Add, new_jobs, send
    from lorafusion_jax.train.run_folder import open_run

    folder, asked = open_run(run), load_config(config)
    if asked.base != folder.config.base:
        raise ConfigError(
            f"{config}: base {asked.base.model} ({asked.base.dtype}) is not the run's "
            f"{folder.config.base.model} ({folder.config.base.dtype})"
        )
    jobs = new_jobs(folder, asked.jobs)
    send(folder, Add(jobs=tuple(jobs)))
    _tell(folder, f"{', '.join(job.name for job in jobs)} will join")


def cancel(
    run: RunArgument, name: Annotated[str, typer.Argument(help="Job to end; it keeps its adapter.")]
) -> None:
    """End a job now; it keeps what it has learnt, and no bit of the others changes."""
    from lorafusion_jax.train.control import Cancel, send
    from lorafusion_jax.train.run_folder import open_run

    folder = open_run(run)
    if name not in folder.jobs:
        raise ConfigError(f"no job {name!r}; there are: {', '.join(folder.jobs)}")
    if (status := _ended(folder, name)) is not None:
        raise ConfigError(f"{name} has ended already ({status}): there is nothing to cancel")
    send(folder, Cancel(job=name))
    _tell(folder, f"{name} will be cancelled")


def _ended(folder: "RunFolder", name: str) -> str | None:
    """How a job ended in the run's last process; None if it goes on, or is not known to have ended.

    An earlier process that was killed may have ended a job later than its last checkpoint.
    """
    status = None
    for event in folder.events():
        if event["event"] == "RunPlanned":
            status = None
        elif event["event"] == "JobEnded" and event["job"] == name:
            status = event["status"]
    return status


def _tell(folder: "RunFolder", what: str) -> None:
    from lorafusion_jax.train.lock import holder

    owner = holder(folder.path)
    when = "when the run goes on" if owner is None else f"by {owner}, after its microbatch"
    print(f"{what} {when}; train.log says how it went")
