"""Checkpoints that are whole and verified by content.

Orbax makes a step visible only when it is whole, but restores a flipped bit or another dtype
without a word. So each step carries a manifest with the SHA-256, dtype and shape of every leaf. A
step is written under another name, read back, and gets its own name only then; a restore that does
not match falls back to the step before.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from lorafusion_jax.errors import CheckpointError, ResourceError
from lorafusion_jax.train.manifest import checked_record, describe, make_record
from lorafusion_jax.train.orbax_alone import reading_alone, save_leaves
from lorafusion_jax.train.retention import to_remove

FAULT_POINTS = ("begin", "written", "verified", "visible", "pruning")
"""Moments of a save, in order, of which `Checkpoints` tells its hook."""

type Leaves = dict[str, np.ndarray]


class Restored(NamedTuple):
    """A verified checkpoint.

    Attributes:
        step: its number.
        leaves: of the state, by name.
        progress: of the run.
        score: its held-out loss; None if it has none.
    """

    step: int
    leaves: Leaves
    progress: dict[str, Any]
    score: float | None = None


def leaves_of(tree: PyTree) -> Leaves:
    """Copies a tree of arrays to the host, by name.

    Always a copy: on a CPU the host could otherwise look into a buffer that the next step reuses.
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    values = jax.device_get([leaf for _, leaf in flat])
    return {name: np.array(value) for name, value in zip(names, values, strict=True)}


def unflatten_like(tree: PyTree, leaves: Leaves) -> PyTree:
    """Returns a tree of `tree`'s structure with these leaves.

    Raises:
        CheckpointError: a leaf is missing, unknown, or of another shape or dtype.
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree)
    expected = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in flat}
    problems = [f"{name}: unexpected" for name in leaves.keys() - expected.keys()]
    for name, leaf in expected.items():
        got = leaves.get(name)
        if got is None:
            problems.append(f"{name}: missing")
        elif got.shape != leaf.shape or got.dtype != leaf.dtype:
            problems.append(
                f"{name}: got {got.dtype}{list(got.shape)}, expected {leaf.dtype}{list(leaf.shape)}"
            )
    if problems:
        raise CheckpointError(f"the checkpoint belongs to another state: {problems[0]}")
    return jax.tree.unflatten(treedef, [leaves[name] for name in expected])


def tree_hash(tree: PyTree) -> str:
    """Returns the SHA-256 of a tree: names, dtypes, shapes and bytes of all leaves."""
    digest = hashlib.sha256()
    for name, leaf in sorted(leaves_of(tree).items()):
        digest.update(json.dumps([name, describe(leaf)]).encode())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: holds one folder per step.
        keep_last: how many of the newest steps to keep.
        keep_best: how many of lowest held-out loss to keep besides.
        say: told about steps that cannot be used.
        at: told when a save passes each of `FAULT_POINTS`; tests die there.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep_last: int = 2,
        keep_best: int = 0,
        say: Callable[[str], None] = lambda _: None,
        at: Callable[[str], None] = lambda _: None,
    ):
        self._directory, self._say, self._at = directory.absolute(), say, at
        self._keep_last, self._keep_best = keep_last, keep_best
        self._verified: set[int] = set()
        self._scores: dict[int, float] = {}

    def steps(self) -> list[int]:
        """Returns the visible steps, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if _is_step(p))

    def prepare(self) -> None:
        """Creates the folder, so that one that has vanished is noticed later.

        Raises:
            CheckpointError: it cannot be created.
        """
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self._directory} cannot be created: {error.strerror}"
            ) from error

    def save(
        self, step: int, state: PyTree, progress: dict[str, Any], score: float | None = None
    ) -> float:
        """Saves and verifies a step, then removes those that retention no longer wants.

        Args:
            step: a number above those saved so far.
            state: tree of arrays.
            progress: JSON values to keep beside it.
            score: held-out loss, for retention.

        Returns:
            Seconds taken.

        Raises:
            CheckpointError: the step is not the newest, or what was written reads back differently.
            ResourceError: the disk is full.
        """
        start = time.perf_counter()
        self.write(step, leaves_of(state), progress, score)
        return time.perf_counter() - start

    def write(
        self, step: int, leaves: Leaves, progress: dict[str, Any], score: float | None = None
    ) -> None:
        """Saves leaves that are on the host already; see `save`."""
        self._at("begin")
        newest = max(self.steps(), default=-1)
        if step <= newest:
            raise CheckpointError(
                f"{self._path(step)} was not written: expected a step above {newest}"
            )
        if not self._directory.is_dir():
            raise CheckpointError(
                f"checkpoint {step} was not written: {self._directory} has vanished"
            )
        partial = self._directory / f"{step}{_PARTIAL}"
        try:
            if partial.exists():
                shutil.rmtree(partial)
            record = make_record(leaves, progress, score)
            save_leaves(partial, leaves, record)
            self._at("written")
            self._load(partial, step)
            self._at("verified")
            partial.rename(self._path(step))
            _sync_directory(self._directory)
        except (OSError, ValueError) as error:
            raise self._explain(step, leaves, error) from error
        self._note(step, score)
        self._at("visible")
        self._prune()

    def restore(self, step: int | None = None) -> Restored | None:
        """Returns the newest step that verifies, or None where there is no step at all.

        Args:
            step: this one and no other.

        Raises:
            CheckpointError: there are steps, but none can be used.
        """
        steps = self.steps() if step is None else [step]
        damage = []
        for candidate in reversed(steps):
            try:
                restored = self.load(candidate)
            except CheckpointError as error:
                damage.append(str(error))
                self._say(f"{error}; trying the step before")
                continue
            return restored
        if damage:
            raise CheckpointError(
                f"no usable checkpoint in {self._directory}:\n  " + "\n  ".join(damage)
            )
        return None

    def load(self, step: int) -> Restored:
        """Returns a step, verified; changes nothing on the disk.

        Raises:
            CheckpointError: it is damaged; names the leaf or the file.
        """
        restored = self._load(self._path(step), step)
        self._note(step, restored.score)
        return restored

    def discard_after(self, step: int) -> None:
        """Removes steps newer than `step`: damaged ones that a restore skipped."""
        for newer in self.steps():
            if newer > step:
                self._remove(newer)

    def leftovers(self) -> list[str]:
        """Returns the names of what interrupted saves left behind."""
        if not self._directory.is_dir():
            return []
        return sorted(p.name for p in self._directory.iterdir() if not _is_step(p))

    def sweep(self) -> list[str]:
        """Removes the leftovers; returns their names."""
        names = self.leftovers()
        for name in names:
            path = self._directory / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return names

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _note(self, step: int, score: float | None) -> None:
        self._verified.add(step)
        if score is not None:
            self._scores[step] = score

    def _load(self, path: Path, step: int) -> Restored:
        try:
            with reading_alone():
                record = checked_record(_read_record(path))
                abstract = {
                    name: np.empty(shape, dtype)
                    for name, (_, dtype, shape) in record["leaves"].items()
                }
                leaves = ocp.load_checkpointables(str(path), {"state": abstract})["state"]
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # orbax and tensorstore raise many types for damaged files
            raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
        for name, expected in record["leaves"].items():
            if describe(leaves[name]) != expected:
                raise CheckpointError(f"{path} is damaged: the content of {name} has changed")
        return Restored(step, leaves, record["progress"], record.get("score"))

    def _prune(self) -> None:
        steps = self.steps()
        for step in to_remove(
            steps,
            verified=self._verified & {*steps},
            scores=self._scores,
            keep_last=self._keep_last,
            keep_best=self._keep_best,
        ):
            self._remove(step)

    def _remove(self, step: int) -> None:
        """Removes a step so that at no moment a part of it looks like one."""
        removed = self._directory / f"{step}{_REMOVED}"
        self._path(step).rename(removed)
        self._at("pruning")
        shutil.rmtree(removed)
        self._verified.discard(step)
        self._scores.pop(step, None)

    def _explain(self, step: int, leaves: Leaves, error: Exception) -> Exception:
        needed = sum(leaf.nbytes for leaf in leaves.values())
        if isinstance(error, CheckpointError):
            return error
        if not self._directory.is_dir():
            return CheckpointError(
                f"checkpoint {step} was not written: {self._directory} has vanished"
            )
        if getattr(error, "errno", None) in _FULL or any(x in str(error) for x in _FULL_WORDS):
            free = shutil.disk_usage(self._directory).free
            return ResourceError(
                f"the disk is full: checkpoint {step} of {needed} bytes could not be written to "
                f"{self._directory}, which has {free} bytes free; earlier checkpoints are intact, "
                "free some space and run the same command again"
            )
        return CheckpointError(
            f"checkpoint {step} was not written to {self._directory}: {_first_line(error)}"
        )


_PARTIAL, _REMOVED = ".partial", ".removed"
_METADATA = "_CHECKPOINT_METADATA"  # where orbax puts `custom_metadata`
# EFBIG is what a quota of the process looks like.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "Disk quota exceeded", "File too large")


def _is_step(path: Path) -> bool:
    return path.name.isdecimal() and path.name.isascii() and path.is_dir()


def _read_record(path: Path) -> Any:
    """Returns what was saved beside the arrays of a step.

    Not by orbax, which then also asks tensorstore to spell out every array's specification; what
    `to_json` of tensorstore 0.1.86 returns there stays in memory for good, 3 KB per array.
    """
    return json.loads((path / _METADATA).read_bytes())["custom_metadata"]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _sync_directory(directory: Path) -> None:
    """Makes the rename of a finished step survive a power loss."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
