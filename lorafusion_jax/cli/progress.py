"""Draws a training run from its events."""

import time
from collections.abc import Callable
from types import TracebackType

from lorafusion_jax.cli.view import JobLine, Screen, duration
from lorafusion_jax.train import events


def bytes_text(count: float) -> str:
    """Formats bytes."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count / 1024:.1f} KiB"


class TrainProgress:
    """A listener of a trainer that shows what happens; a context manager.

    Args:
        plain: lines instead of a live table.
        clock: seconds, for tests.

    Attributes:
        base: evaluation of the base model, by job.
        best: best evaluation of each adapter, by job.
        ended: how each finished job ended.
        resumed_at_end: the output folder holds the finished run already.
    """

    def __init__(self, *, plain: bool = False, clock: Callable[[], float] = time.monotonic):
        self.base: dict[str, events.Evaluated] = {}
        self.best: dict[str, events.Evaluated] = {}
        self.ended: dict[str, events.JobEnded] = {}
        self.resumed_at_end = False
        self._lines: dict[str, JobLine] = {}
        self._screen = Screen([], plain=plain, clock=clock)
        self._clock = clock
        self._first_step: dict[str, tuple[float, int]] = {}
        self._first_microbatch: tuple[float, int] | None = None
        self._tokens = 0  # since then

    def __enter__(self):
        self._screen.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._screen.__exit__(kind, error, trace)

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.RunPlanned():
                self._planned(event)
            case events.Compiling():
                self._compiling(event)
            case events.MicrobatchDone():
                self._microbatch(event)
            case events.StepDone():
                self._step(event)
            case events.Evaluated():
                self._evaluated(event)
            case events.JobEnded():
                self.ended[event.job] = event
                line = self._line(event.job)
                line.note = event.status
                self._screen.refresh()
            case events.Notice():
                self._screen.message(event.message)
            case events.RunEnded():
                self._screen.eta_s = None
                self._screen.message(ended_text(event))

    def _line(self, job: str) -> JobLine:
        if job not in self._lines:
            self._lines[job] = JobLine(name=job)
            self._screen.lines = list(self._lines.values())
        return self._lines[job]

    def _planned(self, event: events.RunPlanned) -> None:
        self.resumed_at_end = event.start == event.microbatches
        for line in planned_text(event):
            self._screen.message(line)
        for job in event.jobs:
            self._line(job.name).total = job.steps

    def _compiling(self, event: events.Compiling) -> None:
        what = f"{event.program} step" + (f" for {event.capacity} tokens" if event.capacity else "")
        if event.seconds is None:
            self._screen.message(f"compiling {what} ...")
            return
        memory = (
            ""
            if event.temp_bytes is None
            else f", {bytes_text(event.temp_bytes)} of working memory"
        )
        self._screen.message(f"compiled  {what} in {event.seconds:.0f} s{memory}")

    def _microbatch(self, event: events.MicrobatchDone) -> None:
        now = self._clock()
        if self._first_microbatch is None:
            self._first_microbatch = now, event.index
            self._tokens = 0
        else:
            self._tokens += event.tokens
        start, first = self._first_microbatch
        if event.index > first and now > start:
            left = event.total - event.index - 1
            self._screen.eta_s = (now - start) * left / (event.index - first)
            self._screen.tokens_per_s = self._tokens / (now - start)
        self._screen.refresh()

    def _step(self, event: events.StepDone) -> None:
        now = self._clock()
        line = self._line(event.job)
        line.step, line.total, line.loss = event.step, event.total, event.loss
        start, tokens = self._first_step.setdefault(event.job, (now, event.tokens))
        if now > start:
            line.tokens_per_s = (event.tokens - tokens) / (now - start)
        self._screen.refresh()

    def _evaluated(self, event: events.Evaluated) -> None:
        if event.step == 0:
            self.base[event.job] = event
        elif event.best:
            self.best[event.job] = event
        who = "base model" if event.step == 0 else f"step {event.step}"
        self._screen.line(f"{event.job}  {who}, eval {event.loss:.3f}")
        self._line(event.job).eval_loss = event.loss
        self._screen.refresh()


def planned_text(event: events.RunPlanned) -> list[str]:
    """Says in a few lines what will run: jobs, packing, memory."""
    parameters = sum(job.parameters for job in event.jobs)
    tokens = sum(job.tokens for job in event.jobs)
    sizes = " and ".join(f"{size:,}" for size in event.capacities)
    left = f", {event.microbatches - event.start} of them to do" if event.start else ""
    return [
        f"jobs     {len(event.jobs)}, {parameters:,} adapter parameters, {tokens:,} tokens",
        f"packing  {event.microbatches} microbatches of {sizes} tokens{left}, "
        f"{event.padding:.1%} padding (packed one job at a time: {event.padding_alone:.1%})",
        f"memory   base {bytes_text(event.base_bytes)}, adapters with optimizer state "
        f"{bytes_text(event.adapter_bytes)}",
    ]


def ended_text(event: events.RunEnded) -> str:
    """Says how much was trained, how fast, and the most memory it took."""
    if not event.tokens:
        return "done     nothing was left to train"
    speed = event.tokens / max(event.seconds, 1e-9)
    peak = "" if event.peak_bytes is None else f", peak {bytes_text(event.peak_bytes)}"
    return (
        f"trained  {event.tokens:,} tokens in {duration(event.seconds)} "
        f"({speed:,.0f} tok/s, compilation and evaluation included){peak}"
    )
