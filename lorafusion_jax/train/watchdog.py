"""Ends a run that is stuck: a stack of every thread, and an exit code of its own.

A collective that waits for a device that never comes, or a file system that hangs, would otherwise
hold its devices all night. Nothing can be saved then: the state is in the step that is stuck. The
last checkpoint is, and the same command goes on from it.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from lorafusion_jax.errors import WatchdogError


class Watchdog:
    """A thread that ends the process when nobody has called `beat` for too long.

    Args:
        limit: seconds between two beats; None never ends anything.
        stacks: file for the stacks; they go to standard error too.
        end: called with the exit code, in place of leaving the process.

    Attributes:
        waiting_for: returns in words what the run waits for; must not wait itself.
    """

    def __init__(
        self,
        limit: float | None,
        stacks: Path,
        end: Callable[[int], None] = os._exit,
    ):
        self.waiting_for: Callable[[], str] = lambda: ""
        self._limit, self._stacks, self._end = limit, stacks, end
        self._last, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self) -> None:
        """Says that the run is alive."""
        self._last = time.monotonic()

    def alive(self, event: object) -> None:
        """A listener for which every event is a beat."""
        self.beat()

    def __enter__(self) -> Self:
        self.beat()
        if self._limit is not None:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._limit is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._limit is not None
        while not self._over.wait(min(1.0, self._limit / 4)):
            silent = time.monotonic() - self._last
            if silent > self._limit:
                self._leave(silent)
                return

    def _leave(self, silent: float) -> None:
        """Nothing here may keep the process alive, a full disk or a closed terminal neither."""
        try:
            message = (
                f"error: nothing happened for {silent:.0f} s (train.watchdog: {self._limit:g})"
                f"{self._where()}; the stack of every thread is in {self._stacks}. The last "
                "checkpoint is intact: the same command goes on from it\n"
            )
            with open(self._stacks, "w", encoding="utf-8") as file:
                file.write(message)
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            os.write(2, message.encode())
        except (OSError, ValueError):
            pass
        finally:
            self._end(WatchdogError.exit_code)

    def _where(self) -> str:
        try:
            text = self.waiting_for()
        except Exception as error:  # it reads what other threads change
            text = f"what it waits for could not be said: {error!r}"
        return text and f": {text}"
