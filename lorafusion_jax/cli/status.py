"""Commands that read a run folder and change nothing in it but figures: status, plot."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafusion_jax.cli.view import JobLine, duration, number, print_table

if TYPE_CHECKING:
    from lorafusion_jax.train.run_folder import RunFolder

RunArgument = Annotated[Path, typer.Argument(help="Output folder of a training run.")]


def register(app: typer.Typer) -> None:
    """Adds this module's commands."""
    app.command()(status)
    app.command()(plot)


def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Show how far a running or finished run is."""
    from lorafusion_jax.cli.run_status import run_status
    from lorafusion_jax.train.run_folder import open_run

    folder, now = open_run(run), time.time()
    found = run_status(folder, now)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    print(f"run      {folder.path}: {_state(found['state'], folder, now)}")
    if found["microbatches"] is not None:
        line = f"done     {found['microbatch']} of {found['microbatches']} microbatches"
        if found["tokens_per_s"] is not None:
            line += f", {found['tokens_per_s']:,.0f} tok/s"
        print(line if found["eta_s"] is None else f"{line}, ETA {duration(found['eta_s'])}")
    headings = ("job", "step", "loss", "eval, base", "best", "last", "tok/s", "progress")
    print_table(headings, [_row(name, job) for name, job in found["jobs"].items()])


def _state(state: str, folder: "RunFolder", now: float) -> str:
    words = run_state(folder.events(), now)
    return words if state == "ended" else f"{state}, {words}"


def run_state(events: list[dict[str, Any]], now: float) -> str:
    """Says in words what a run does, judged by its events and the time (seconds since 1970)."""
    if not events:
        return "nothing has happened yet"
    last = events[-1]
    if last["event"] == "RunEnded":
        return f"ended after {duration(last['seconds'])}"
    return f"last event {duration(max(0.0, now - last['time']))} ago ({last['event']})"


def job_line(metrics: list[dict[str, Any]], events: list[dict[str, Any]], name: str) -> JobLine:
    """Returns the state of a job from its metrics and the run's events."""
    line = JobLine(name=name)
    for event in events:
        if event["event"] == "RunPlanned":
            line.total = next((j["steps"] for j in event["jobs"] if j["name"] == name), 0)
        elif event["event"] == "JobEnded" and event["job"] == name:
            line.note, line.step = event["status"], event["step"]
    steps = [m for m in metrics if m.get("loss") is not None]
    evals = [m for m in metrics if m.get("eval_loss") is not None]
    if steps:
        line.step, line.loss = max(line.step, steps[-1]["step"]), steps[-1]["loss"]
        seconds = steps[-1]["time"] - steps[0]["time"]
        if seconds > 0:
            line.tokens_per_s = (steps[-1]["tokens"] - steps[0]["tokens"]) / seconds
    if evals:
        line.eval_loss = evals[-1]["eval_loss"]
    return line


def _row(name: str, job: dict[str, Any]) -> tuple[str, ...]:
    line = JobLine(
        name=name,
        step=job["step"],
        total=job["steps"] or 0,
        loss=job["loss"],
        eval_loss=job["eval_loss"],
        tokens_per_s=job["tokens_per_s"],
        note="" if job["status"] == "training" else job["status"],
    )
    _, steps, loss, last, speed, progress = line.cells()
    if job["eval_step"] is not None:
        last += f" @{job['eval_step']}"
    losses = number(job["base_loss"]), number(job["best_loss"])
    return name, steps, loss, *losses, last, speed, progress


def plot(run: RunArgument) -> None:
    """Draw a run's figures into its folder. Losses, of each job too, and utilisation."""
    from lorafusion_jax.train.run_folder import open_run

    for path in draw(open_run(run)):
        print(f"wrote  {path}")


def draw(folder: "RunFolder") -> list[Path]:
    """Draws all figures of a run; returns their paths."""
    from lorafusion_jax import plots
    from lorafusion_sched import from_json

    metrics = {name: folder.metrics(name) for name in folder.jobs}
    paths = []
    for name, records in metrics.items():
        paths.append(folder.job(name) / "loss.png")
        plots.plot_job(records, name, paths[-1])
    paths.append(folder.path / "loss.png")
    plots.plot_jobs(metrics, paths[-1])
    paths.append(folder.path / "utilisation.png")
    plan = from_json((folder.path / "plan.json").read_text(encoding="utf-8"))
    plots.plot_utilisation(plan, metrics, paths[-1])
    return paths
