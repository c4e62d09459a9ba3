"""Saving while training goes on: a copy of the state is hashed, written and verified beside it."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

from jaxtyping import PyTree

from lorafusion_jax.train.checkpoint import Checkpoints, leaves_of


class SaveDone(NamedTuple):
    """A checkpoint that is on disk and verified.

    Attributes:
        step: its number.
        seconds: from the copy of the state until it was verified.
        blocked: of them, seconds in which training stood still.
    """

    step: int
    seconds: float
    blocked: float


class BackgroundSaver:
    """Saves one step at a time in a thread; leaving it waits for the last one.

    What goes wrong in the thread is raised by the next call of any method.

    Args:
        checkpoints: where steps go.
    """

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints
        self._pool = ThreadPoolExecutor(1, "save")
        self._saving: tuple[int, float, float, Future[float]] | None = None
        self._newest = max(checkpoints.steps(), default=-1)

    def has(self, step: int) -> bool:
        """Says whether a step is saved or being saved."""
        return step == self._newest or step in self._checkpoints.steps()

    def save(
        self, step: int, state: PyTree, progress: dict[str, Any], score: float | None
    ) -> list[SaveDone]:
        """Copies the state and starts to save it; waits for an unfinished save first.

        Args: see `Checkpoints.save`.

        Returns:
            The save that was waited for, if there was one.

        Raises:
            CheckpointError: that one failed, or this step is not the newest.
            ResourceError: the disk is full.
        """
        start = time.perf_counter()
        done = self.wait()
        leaves = leaves_of(state)
        blocked = time.perf_counter() - start
        future = self._pool.submit(self._write, start, step, leaves, progress, score)
        self._saving, self._newest = (step, start, blocked, future), step
        return done

    def finished(self) -> list[SaveDone]:
        """Returns the save under way if it has ended since the last call; does not wait."""
        return self.wait() if self._saving is not None and self._saving[3].done() else []

    def wait(self) -> list[SaveDone]:
        """Waits for the save under way, if there is one, and returns it."""
        if self._saving is None:
            return []
        (step, _, blocked, future), self._saving = self._saving, None
        return [SaveDone(step, future.result(), blocked)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)
        if error is None:
            self.wait()

    def _write(self, start: float, step: int, *content: Any) -> float:
        self._checkpoints.write(step, *content)
        return time.perf_counter() - start
