"""Checkpoints that are whole and verified by content, and the lock of a run folder.

Orbax makes a step visible only when it is whole, but restores a flipped bit or another dtype
without a word. So each step carries a manifest with the SHA-256, dtype and shape of every leaf, and
a restore that does not match falls back to the step before.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from lorafusion_jax.errors import CheckpointError, ResourceError, RunLockedError

FORMAT_VERSION = 1

type Leaves = dict[str, np.ndarray]


class Restored(NamedTuple):
    """A verified checkpoint: its step, the state's leaves by name, and the run's progress."""

    step: int
    leaves: Leaves
    progress: dict[str, Any]


def leaves_of(tree: PyTree) -> Leaves:
    """Copies a tree of arrays to the host, by name."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat]
    values = jax.device_get([leaf for _, leaf in flat])
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


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
        digest.update(json.dumps([name, _describe(leaf)]).encode())
    return digest.hexdigest()


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: holds one folder per step.
        keep_last: how many of the newest steps to keep; older ones go only after a newer one was
            read back and verified.
        say: told about steps that cannot be used.
    """

    def __init__(
        self, directory: Path, *, keep_last: int = 2, say: Callable[[str], None] = lambda _: None
    ):
        self._directory, self._keep_last, self._say = directory.absolute(), keep_last, say
        self._verified: set[int] = set()

    def steps(self) -> list[int]:
        """Returns the visible steps, ascending."""
        if not self._directory.is_dir():
            return []
        return sorted(int(p.name) for p in self._directory.iterdir() if p.name.isdigit())

    def save(self, step: int, state: PyTree, progress: dict[str, Any]) -> float:
        """Saves and verifies a step, then removes those that retention no longer wants.

        Args:
            step: a number above those saved so far.
            state: tree of arrays.
            progress: JSON values to keep beside it.

        Returns:
            Seconds taken.

        Raises:
            CheckpointError: the step exists, or what was written reads back differently.
            ResourceError: the disk is full.
        """
        start = time.perf_counter()
        if self._path(step).exists():
            raise CheckpointError(f"{self._path(step)} was not written: it exists already")
        leaves = leaves_of(state)
        record = _record(leaves, progress)
        try:
            ocp.save_checkpointables(
                str(self._path(step)), {"state": leaves}, custom_metadata=record
            )
            _sync_directory(self._directory)
        except (OSError, ValueError) as error:
            raise self._explain(step, error) from error
        self._load(step)
        self._verified.add(step)
        self._prune()
        return time.perf_counter() - start

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
                restored = self._load(candidate)
            except CheckpointError as error:
                damage.append(str(error))
                self._say(f"{error}; trying the step before")
                continue
            self._verified.add(candidate)
            return restored
        if damage:
            raise CheckpointError(
                f"no usable checkpoint in {self._directory}:\n  " + "\n  ".join(damage)
            )
        return None

    def discard_after(self, step: int) -> None:
        """Removes steps newer than `step`: damaged ones that a restore skipped."""
        for newer in self.steps():
            if newer > step:
                shutil.rmtree(self._path(newer))

    def sweep(self) -> list[str]:
        """Removes what interrupted saves left behind; returns the names."""
        if not self._directory.is_dir():
            return []
        names = [p.name for p in self._directory.iterdir() if not p.name.isdigit()]
        for name in names:
            path = self._directory / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return names

    def _path(self, step: int) -> Path:
        return self._directory / str(step)

    def _load(self, step: int) -> Restored:
        path = self._path(step)
        try:
            record = _checked_record(ocp.checkpointables_metadata(str(path)).custom_metadata)
            abstract = {
                name: np.empty(shape, dtype) for name, (_, dtype, shape) in record["leaves"].items()
            }
            leaves = ocp.load_checkpointables(str(path), {"state": abstract})["state"]
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error
        except Exception as error:  # orbax and tensorstore raise many types for damaged files
            raise CheckpointError(f"{path} cannot be read: {_first_line(error)}") from error
        for name, expected in record["leaves"].items():
            if _describe(leaves[name]) != expected:
                raise CheckpointError(f"{path} is damaged: the content of {name} has changed")
        return Restored(step, leaves, record["progress"])

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep_last]:
            shutil.rmtree(self._path(step))

    def _explain(self, step: int, error: Exception) -> Exception:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or (
            "No space left" in str(error)
        ):
            return ResourceError(
                f"the disk is full: checkpoint {step} could not be written to {self._directory}; "
                "earlier checkpoints are intact, free some space and run the same command again"
            )
        return CheckpointError(f"checkpoint {step} was not written: {_first_line(error)}")


def _describe(leaf: np.ndarray) -> list[Any]:
    content = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return [hashlib.sha256(content).hexdigest(), str(leaf.dtype), list(leaf.shape)]


def _record(leaves: Leaves, progress: dict[str, Any]) -> dict[str, Any]:
    """The manifest and the progress, with a checksum of its own."""
    body = {
        "version": FORMAT_VERSION,
        "leaves": {name: _describe(leaf) for name, leaf in leaves.items()},
        "progress": progress,
    }
    return {"sha256": _checksum(body), **body}


def _checked_record(saved: Any) -> dict[str, Any]:
    record = dict(saved or {})
    if record.get("version") != FORMAT_VERSION:
        raise CheckpointError(
            f"format version {record.get('version')!r}, this program reads {FORMAT_VERSION}"
        )
    if record.pop("sha256", None) != _checksum(record):
        raise CheckpointError("damaged: its record does not match its checksum")
    return record


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _sync_directory(directory: Path) -> None:
    """Makes the rename of a finished step survive a power loss."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Holds the run folder for this process; the system drops the lock when the process dies.

    Raises:
        RunLockedError: another process holds it; names its pid and host.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "an unknown process"
            raise RunLockedError(
                f"{directory} is in use by {owner}: wait for it, stop it, or choose another output"
            ) from error
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
