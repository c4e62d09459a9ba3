"""SIGTERM and SIGINT: the first one asks for a clean stop, the second leaves at once."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

from lorafusion_jax.errors import LoraFusionError


class StoppedError(LoraFusionError):
    """A signal stopped training after a clean save; the same command resumes it.

    Args:
        message: what was saved.
        signum: the signal; the exit code is 128 + this.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """Catches SIGTERM and SIGINT while it is entered (in the main thread; elsewhere, nothing).

    Attributes:
        received: the first signal's number, or None.
    """

    def __init__(self):
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                self._before[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            os._exit(128 + signum)
        self.received = signum
