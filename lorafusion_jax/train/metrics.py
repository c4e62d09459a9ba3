"""Listeners that write: metrics.jsonl of each job, events.jsonl, train.log and summary.md."""

import errno
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self, TextIO

from lorafusion_jax.errors import ResourceError
from lorafusion_jax.train.comparison import cell, sweep_tables
from lorafusion_jax.train.events import (
    CheckpointSaved,
    Compiling,
    Evaluated,
    Event,
    JobEnded,
    MicrobatchDone,
    Notice,
    RunEnded,
    RunPlanned,
    StepDone,
)
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.progress import JobProgress
from lorafusion_jax.train.run_folder import RunFolder, read_lines, write_text


class JsonLines:
    """A JSONL file that survives kills: a cut last line is removed when it is opened again.

    Args:
        path: the file.
        keep: which of the lines that are there already to keep.
    """

    def __init__(self, path: Path, keep: Callable[[dict[str, Any]], bool] = lambda _: True):
        if path.exists():
            kept = [line for line in read_lines(path) if keep(line)]
            write_text(path, "".join(_json_line(line) for line in kept))
        self._file: TextIO = open(path, "a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
            ResourceError: the disk is full.
        """
        text = _json_line(line)
        try:
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ResourceError(
                f"the disk is full: {len(text)} bytes could not be written to {self._file.name}; "
                "the last checkpoint is intact, free some space and run the same command again"
            ) from error

    def close(self) -> None:
        """Closes the file; what a full disk did not take was reported when it was written."""
        with suppress(OSError):
            self._file.close()


def _json_line(line: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    return json.dumps(finite, allow_nan=False, ensure_ascii=False) + "\n"


class RunWriter:
    """Writes a run's events into its folder. Lines of microbatches that will be redone are removed.

    Args:
        folder: the run's folder, prepared by `write_start`.
        every: optimizer steps of each job between two lines of its metrics.
        cursor: first microbatch that will run.

    Attributes:
        lost: microbatches before it were trained before, as far as the removed lines tell.
    """

    def __init__(self, folder: RunFolder, every: int, cursor: int):
        self._every, self._folder, self._cursor = every, folder, cursor
        self._metrics: dict[str, JsonLines] = {}
        self.lost = cursor
        for name in folder.jobs:
            self._lines_of(name)
        self._events = JsonLines(folder.path / "events.jsonl")
        self._log = open(folder.path / "train.log", "a", encoding="utf-8")

    def __call__(self, event: Event) -> None:
        """Writes one event."""
        now = round(time.time(), 3)
        match event:
            case MicrobatchDone():
                return
            case StepDone():
                first_or_last = event.step in (1, event.total)
                if first_or_last or event.step % self._every == 0 or not event.applied:
                    self._lines_of(event.job).write(_step_line(event, now))
                return
            case Evaluated():
                self._lines_of(event.job).write(_eval_line(event, now))
        self._events.write({"event": type(event).__name__, "time": now, **asdict(event)})
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._log.write(f"{stamp} {describe(event)}\n")
        self._log.flush()

    def _lines_of(self, job: str) -> JsonLines:
        """The metrics of a job; one that joins gets its folder here."""
        if job not in self._metrics:
            path = self._folder.job(job) / "metrics.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            self._metrics[job] = JsonLines(path, self._stays)
        return self._metrics[job]

    def _stays(self, line: dict[str, Any]) -> bool:
        """Whether a line is of a microbatch that will not be trained again."""
        if line["microbatch"] >= self._cursor:
            self.lost = max(self.lost, line["microbatch"] + 1)
        return line["microbatch"] < self._cursor

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for lines in (*self._metrics.values(), self._events):
            lines.close()
        self._log.close()


def _step_line(event: StepDone, now: float) -> dict[str, Any]:
    return {
        "step": event.step,
        "tokens": event.tokens,
        "loss": event.loss,
        "lr": event.lr,
        "grad_norm": event.grad_norm,
        "eval_loss": None,
        "applied": event.applied,
        "microbatch": event.microbatch,
        "time": now,
    }


def _eval_line(event: Evaluated, now: float) -> dict[str, Any]:
    return {
        "step": event.step,
        "loss": None,
        "eval_loss": event.loss,
        "token_accuracy": event.token_accuracy,
        "exact_match": event.exact_match,
        "microbatch": event.microbatch,
        "time": now,
    }


def describe(event: Event) -> str:
    """Returns an event as one line of text."""
    match event:
        case RunPlanned():
            names = ", ".join(f"{job.name} ({job.steps} steps)" for job in event.jobs)
            return (
                f"{len(event.jobs)} jobs in {event.slots} slots: {names}; "
                f"{event.microbatches} microbatches of up to {event.capacities[-1]} tokens, "
                f"padding {event.padding:.1%} (alone {event.padding_alone:.1%})"
            )
        case Compiling(seconds=None):
            return f"compiling {event.program} step{_bucket(event)} ..."
        case Compiling():
            return f"compiled {event.program} step{_bucket(event)} in {event.seconds:.1f} s"
        case MicrobatchDone():
            return f"microbatch {event.index + 1}/{event.total}"
        case StepDone():
            return f"{event.job} step {event.step}/{event.total} loss {event.loss:.4f}"
        case Evaluated():
            return (
                f"{event.job} step {event.step} held-out loss {event.loss:.4f} "
                f"exact match {event.exact_match:.1%}" + (" (best)" if event.best else "")
            )
        case JobEnded():
            return f"{event.job} {event.status} after {event.step} steps: {event.adapter}"
        case CheckpointSaved():
            return f"checkpoint {event.step} saved in {event.seconds:.1f} s"
        case Notice():
            return event.message
        case RunEnded():
            parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in event.parts.items())
            return f"{event.tokens} tokens in {event.seconds:.1f} s" + (
                f": {parts}" if parts else ""
            )


def _bucket(event: Compiling) -> str:
    return f" for {event.capacity} tokens" if event.capacity else ""


def write_summary(
    folder: RunFolder, jobs: Sequence[TrainJob], progress: Mapping[str, JobProgress]
) -> None:
    """Writes summary.md: one row per job, base against adapter on held-out samples.

    The comparison tables of sweeps are there too, and as data in sweep.json.
    """
    lines = [
        f"# {folder.path.resolve().name}",
        "",
        "| job | r | steps | held-out loss: base | best | last | exact match: base | last |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for job in jobs:
        done = progress[job.name]
        losses = (done.base_loss, done.best_loss, done.eval_loss)
        cells = [job.name, str(job.config.lora.r), str(done.step), *map(_number, losses)]
        cells += map(_percent, (done.base_match, done.exact_match))
        lines.append("| " + " | ".join(cells) + " |")
    tables = sweep_tables([job.config for job in jobs], progress)
    for name, rows in tables.items():
        lines += ["", f"## Sweep of {name}", "", "Lowest held-out loss first.", ""]
        lines += [_row(rows[0]), "|---|" + "--:|" * (len(rows[0]) - 1)]
        lines += [_row([cell(value) for value in row.values()]) for row in rows]
    write_text(folder.path / "summary.md", "\n".join(lines) + "\n")
    if tables:
        write_text(folder.path / "sweep.json", json.dumps(tables, indent=2) + "\n")


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
