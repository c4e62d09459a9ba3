"""The lock of a run folder: one process trains in it, and says which."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lorafusion_jax.errors import ConfigError, ResourceError, RunLockedError

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Holds the run folder for this process; the system drops the lock when the process dies.

    Raises:
        RunLockedError: another process holds it; names its pid and host.
        ConfigError: nothing can be written there.
        ResourceError: the disk is full.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = open(directory / ".lock", "a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(directory, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "an unknown process"
            raise RunLockedError(
                f"{directory} is in use by {owner}: wait for it, stop it, or choose another output"
            ) from error
        try:
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        except OSError as error:
            raise _unwritable(directory, error) from error
        yield


def _unwritable(directory: Path, error: OSError) -> Exception:
    if error.errno in _FULL:
        return ResourceError(f"{directory}: the disk is full; free some space or choose another")
    return ConfigError(
        f"output {directory} cannot be written: {error.strerror or error}; choose another output "
        "or change its permissions"
    )


def holder(directory: Path) -> str | None:
    """Returns who holds the run folder, in words, or None; takes nothing."""
    try:
        with open(directory / ".lock", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return file.read().strip() or "an unknown process"
    except OSError:
        pass
    return None
