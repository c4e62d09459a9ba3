"""What the screen shows: one row per job, live on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

_PLAIN_EVERY_S = 10.0


@dataclass(slots=True, kw_only=True)
class JobLine:
    """State of one job on the screen.

    Attributes:
        name: the job's name.
        step: optimizer steps done.
        total: optimizer steps in all, 0 where unknown.
        loss: training loss of the last step.
        eval_loss: held-out loss of the last evaluation.
        tokens_per_s: real tokens of this job per second.
        note: what happened to it, such as `done` or `frozen`.
    """

    name: str
    step: int = 0
    total: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    tokens_per_s: float | None = None
    note: str = ""

    def cells(self) -> tuple[str, ...]:
        """Returns the row: job, step, loss, eval, tokens/s, progress."""
        steps = f"{self.step}/{self.total}" if self.total else str(self.step)
        done = f"{self.step / self.total:.0%}" if self.total else ""
        speed = "" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}"
        progress = self.note or done
        return self.name, steps, number(self.loss), number(self.eval_loss), speed, progress


HEADINGS = ("job", "step", "loss", "eval", "tok/s", "progress")


def number(value: float | None, form: str = ".3f") -> str:
    """Formats a number; an unknown one is a dash."""
    return "-" if value is None else format(value, form)


def duration(seconds: float) -> str:
    """Formats seconds as m:ss or h:mm:ss.

    >>> duration(75), duration(3675)
    ('1:15', '1:01:15')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def make_table(headings: tuple[str, ...], rows: list[tuple[str, ...]], caption: str = "") -> Table:
    """Returns a table whose first column is text and whose others are numbers."""
    table = Table(box=None, pad_edge=False, caption=caption or None, caption_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Prints a table, as wide as it needs to be where nobody's terminal limits it."""
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(make_table(headings, rows))


class Screen:
    """Shows jobs as they train: a live table on a terminal, else a line per job now and then.

    Args:
        lines: the jobs, in order; the caller changes them and calls `refresh`.
        plain: lines even on a terminal.
        clock: seconds, for tests.

    Attributes:
        eta_s: seconds left, set by the caller.
        tokens_per_s: real tokens of all jobs per second, set by the caller: jobs train at different
            times, so their own rates do not add up to it.
    """

    def __init__(
        self,
        lines: list[JobLine],
        *,
        plain: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.lines = lines
        self._clock = clock
        self._console = Console(highlight=False)
        self._plain = plain or not self._console.is_terminal
        self._live: Live | None = None
        self._shown: dict[str, tuple[float, int]] = {}
        self._start = clock()
        self.eta_s: float | None = None
        self.tokens_per_s: float | None = None

    def __enter__(self):
        if not self._plain:
            self._live = Live(self._table(), console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def message(self, text: str) -> None:
        """Prints a line above the table."""
        if self._plain:
            print(text, flush=True)
        else:
            self._console.print(text, markup=False)

    def line(self, text: str) -> None:
        """Prints a line where there is no table that shows the same."""
        if self._plain:
            self.message(text)

    def refresh(self) -> None:
        """Shows the jobs as they are now."""
        if self._live is not None:
            self._live.update(self._table())
            return
        now = self._clock()
        for line in self.lines:
            last, step = self._shown.get(line.name, (self._start - _PLAIN_EVERY_S, 0))
            finished = bool(line.total) and line.step >= line.total
            if line.step > step and (finished or now - last >= _PLAIN_EVERY_S):
                self._shown[line.name] = now, line.step
                self.message(self._plain_line(line))

    def _plain_line(self, line: JobLine) -> str:
        name, steps, loss, held_out, speed, _ = line.cells()
        text = f"{name}  step {steps}  loss {loss}  eval {held_out}"
        text += f"  {speed} tok/s" if speed else ""
        return text if line.step == line.total else text + self._eta()

    def _eta(self) -> str:
        return "" if self.eta_s is None else f"  ETA {duration(self.eta_s)}"

    def _table(self) -> Table:
        speed = "" if self.tokens_per_s is None else f"total {self.tokens_per_s:,.0f} tok/s"
        caption = (speed + self._eta()).strip()
        return make_table(HEADINGS, [line.cells() for line in self.lines], caption)
