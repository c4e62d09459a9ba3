"""A run of several processes: process 0 has the run's folder, the others only work.

All processes go through the same motions, exports included; those of the others end in a folder of
their own that goes with them. What a run goes on from, all of them read in the run's folder.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax

from lorafusion_jax.config import RunConfig, settings_of
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.parallel.processes import all_or_none, check_same, from_first, is_first
from lorafusion_jax.train.checkpoint import Checkpoints, Leaves
from lorafusion_jax.train.lock import run_lock
from lorafusion_jax.train.resume import Saved, base_fingerprint
from lorafusion_jax.train.run_folder import RunFolder

_NO_STEP = -1


@contextmanager
def locked_folder(output: Path) -> Iterator[RunFolder]:
    """Yields the folder that this process writes into: the run's, locked, or one of its own.

    Raises:
        RunLockedError: another run holds it.
        ConfigError: nothing can be written there, or another process was refused.
    """
    with ExitStack() as stack:
        folder = output
        with all_or_none():
            if is_first():
                stack.enter_context(run_lock(output))
            else:
                folder = Path(stack.enter_context(TemporaryDirectory(prefix="lorafusion-")))
        yield RunFolder(folder)


def find_saved_together(output: Path, resume: str, find: Callable[[str], Saved]) -> Saved:
    """Lets all processes go on from the checkpoint that process 0 finds.

    Args:
        output: the run's folder.
        resume: see `MultiTrainer.fit`.
        find: finds what is to be resumed, and prepares the folder of this process.

    Raises:
        CheckpointError: it cannot be used.
        ConfigError: likewise, or another process was refused.
    """
    if jax.process_count() == 1:
        return find(resume)
    saved = None
    with all_or_none():
        if is_first():
            saved = find(resume)
    restored = None if saved is None else saved.restored
    step = from_first(_NO_STEP if restored is None else restored.step)
    with all_or_none():
        if saved is None:
            saved = find(_resume_of_others(output, resume, step))
            saved = replace(saved, checkpoints=NoCheckpoints(output))
    assert saved is not None
    return saved


def _resume_of_others(output: Path, resume: str, step: int) -> str:
    if step == _NO_STEP:
        return "never"
    source = output if resume == "auto" else Path(os.path.abspath(resume))
    return str(source if source.name == str(step) else source / "checkpoints" / str(step))


class NoCheckpoints(Checkpoints):
    """The checkpoints of a process that saves none: process 0 does."""

    def steps(self) -> list[int]:
        """None."""
        return []

    def write(
        self, step: int, leaves: Leaves, progress: dict[str, Any], score: float | None = None
    ) -> None:
        """Writes nothing."""


def check_same_settings(config: RunConfig) -> None:
    """Checks that all processes were started alike; else they would not even exchange the same.

    Raises:
        ConfigError: they differ in more than paths and reports.
    """
    if jax.process_count() > 1:
        check_same("configuration", settings_of(config))


def check_same_everywhere(base: Base, saved: Saved, plan_json: str) -> None:
    """Checks that all processes train the same.

    Raises:
        ConfigError: they differ in base model, data or plan.
    """
    if jax.process_count() > 1:
        data = [job.fingerprint for job in saved.jobs]
        facts = json.dumps([base_fingerprint(base), data, saved.cursor, plan_json])
        check_same("base model, data or plan", facts)


def reports_of(config: RunConfig) -> RunConfig:
    """Returns a configuration as far as this process reports: only process 0 has sinks."""
    if is_first():
        return config
    return config.model_copy(update={"report": config.report.model_copy(update={"to": ()})})
