"""Where the time of a run went: every second belongs to one part, so the parts add up."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

type Part = Literal["start", "compile", "train", "redone", "evaluate", "save"]


class Goodput:
    """Seconds by part: starting, waiting for compilers, training, training again what a kill lost,
    evaluating, and standing still for a save.

    Args:
        clock: seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock, self._since = clock, clock()
        self._part: Part = "start"
        self._seconds: dict[Part, float] = {}

    def enter(self, part: Part) -> None:
        """Time belongs to `part` from now on."""
        now = self._clock()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._part, self._since = part, now

    @contextmanager
    def during(self, part: Part) -> Iterator[None]:
        """Time belongs to `part` inside, and to what it belonged to before, after."""
        before = self._part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of every part that took any, up to now."""
        self.enter(self._part)
        return {part: round(seconds, 3) for part, seconds in self._seconds.items()}
