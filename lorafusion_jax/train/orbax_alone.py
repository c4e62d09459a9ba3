"""Orbax in one of several processes, without the others.

The state of a run is whole on each process's host, so one of them saves it, beside training. V1 of
orbax lets a part of the processes save, but still exchanges the path over all devices first, which
would meet the exchanges of training. The older interface writes the same files without that.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
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
    """
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


def _only_this() -> dict[str, Any]:
    me = jax.process_index()
    return {
        "primary_host": me,
        "active_processes": {me},
        "barrier_sync_key_prefix": f"process{me}",
    }
