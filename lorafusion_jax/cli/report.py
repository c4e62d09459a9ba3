"""The report command."""

import typer

from lorafusion_jax.cli.status import RunArgument


def register(app: typer.Typer) -> None:
    """Adds this module's command."""
    app.command()(report)


def report(run: RunArgument) -> None:
    """Write a run's page, report.html. It shows losses, packing, samples, and opens from disk."""
    from lorafusion_jax.report import write_report
    from lorafusion_jax.train.run_folder import open_run

    print(f"wrote  {write_report(open_run(run))}")
