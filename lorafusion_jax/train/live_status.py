"""How far a run is now, in one small file: metrics.jsonl has a line only every so many steps."""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from lorafusion_jax.train.events import (
    CheckpointSaved,
    Event,
    MicrobatchDone,
    RunEnded,
    StepDone,
)
from lorafusion_jax.train.run_folder import RunFolder, write_text

_EVERY_S = 1.0


class LiveStatus:
    """A listener that keeps status.json up to date, at most once a second.

    The file holds `time`, `microbatch` (how many are done), `since` (time and microbatch of the
    first of this process), `tokens` (real ones trained since then) and `jobs`: step, loss and
    tokens_per_s of each that has made a step. Rates leave out what came before the first
    microbatch ended: compilation, and the evaluation of the base.

    Args:
        folder: of the run.
        clock: seconds since 1970.
    """

    def __init__(self, folder: RunFolder, clock: Callable[[], float] = time.time):
        self._folder, self._clock, self._written = folder, clock, 0.0
        self._status: dict[str, Any] = {}
        self._jobs: dict[str, dict[str, Any]] = {}
        self._first_step: dict[str, tuple[float, int]] = {}

    def __call__(self, event: Event) -> None:
        """Takes note of an event, and writes when it is time."""
        now = self._clock()
        match event:
            case StepDone():
                self._step(event, now)
            case MicrobatchDone():
                self._microbatch(event, now)
                if now - self._written >= _EVERY_S:
                    self._write(now)
            case CheckpointSaved() | RunEnded():  # a run that is stopped saves last of all
                self._write(now)

    def _step(self, event: StepDone, now: float) -> None:
        start, tokens = self._first_step.setdefault(event.job, (now, event.tokens))
        rate = (event.tokens - tokens) / (now - start) if now > start else None
        self._jobs[event.job] = {"step": event.step, "loss": event.loss, "tokens_per_s": rate}

    def _microbatch(self, event: MicrobatchDone, now: float) -> None:
        if not self._status:
            since = {"time": now, "microbatch": event.index + 1}
            self._status = {"since": since, "tokens": 0}
        else:
            self._status["tokens"] += event.tokens
        self._status |= {"time": now, "microbatch": event.index + 1}

    def _write(self, now: float) -> None:
        if not self._status:
            return
        self._written = now
        text = json.dumps({**self._status, "jobs": self._jobs})
        # A full disk is reported by those who write what matters.
        with suppress(OSError):
            write_text(self._folder.path / "status.json", text + "\n")
