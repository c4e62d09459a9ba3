"""Orbax in one of several processes, without the others.

The state of a run is whole on each process's host, so one of them saves it, beside training. V1 of
orbax lets a part of the processes save, but still exchanges the path over all devices first, which
would meet the exchanges of training. The older interface writes the same files without that.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as orbax
from orbax.checkpoint import v1 as ocp


def save_leaves(path: Path, leaves: Mapping[str, np.ndarray], record: dict[str, Any]) -> None:
    """Saves leaves and a record beside them, in this process only.

    Args:
        path: to be created.
        leaves: by name.
        record: JSON values.

    Raises:
        OSError, ValueError: it could not be written; a full disk is a ValueError of tensorstore.
    """
    with _errors_told_once():
        _save(path, leaves, record)


def _save(path: Path, leaves: Mapping[str, np.ndarray], record: dict[str, Any]) -> None:
    if jax.process_count() == 1:
        ocp.save_checkpointables(str(path), {"state": leaves}, custom_metadata=record)
        return
    options = orbax.options.MultiprocessingOptions(**_only_this())
    handler = orbax.CompositeCheckpointHandler(
        state=orbax.StandardCheckpointHandler(multiprocessing_options=options),
        composite_options=orbax.CompositeOptions(multiprocessing_options=options),
    )
    state = orbax.args.Composite(state=orbax.args.StandardSave(dict(leaves)))
    with orbax.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        checkpointer.save(path, args=state, custom_metadata=record)


def reading_alone() -> AbstractContextManager[object]:
    """Lets orbax read in this process without waiting for others."""
    if jax.process_count() == 1:
        return nullcontext()
    return ocp.Context(multiprocessing_options=ocp.options.MultiprocessingOptions(**_only_this()))


@contextmanager
def _errors_told_once() -> Iterator[None]:
    """Lets an error be raised, and not printed besides.

    When a write fails, orbax logs a traceback in each of its threads, and closes the event loop to
    which tensorstore then still reports every other array: hundreds of tracebacks around the one
    message that counts. Some come after the error was raised, so after one this stays in force.
    """
    others, logger = sys.unraisablehook, logging.getLogger("absl")

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            others(unraisable)

    sys.unraisablehook = hook
    logger.addFilter(_is_no_threads_error)
    yield
    sys.unraisablehook = others
    logger.removeFilter(_is_no_threads_error)


def _is_no_threads_error(record: logging.LogRecord) -> bool:
    return "_SignalingThread.run() raised an exception" not in record.getMessage()


def _only_this() -> dict[str, Any]:
    me = jax.process_index()
    return {
        "primary_host": me,
        "active_processes": {me},
        "barrier_sync_key_prefix": f"process{me}",
    }
