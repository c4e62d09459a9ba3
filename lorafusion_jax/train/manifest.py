"""What a checkpoint says of itself: SHA-256, dtype and shape of every leaf, and the progress."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lorafusion_jax.errors import CheckpointError

FORMAT_VERSION = 1


def describe(leaf: np.ndarray) -> list[Any]:
    """Returns [SHA-256 of the bytes, dtype, shape] of a leaf."""
    content = np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)
    return [hashlib.sha256(content).hexdigest(), str(leaf.dtype), list(leaf.shape)]


def make_record(
    leaves: Mapping[str, np.ndarray], progress: dict[str, Any], score: float | None
) -> dict[str, Any]:
    """Returns the manifest and the progress, with a checksum of its own.

    Args:
        leaves: of the state.
        progress: JSON values.
        score: held-out loss of the checkpoint, for retention; None if there is none.
    """
    body = {
        "version": FORMAT_VERSION,
        "leaves": {name: describe(leaf) for name, leaf in leaves.items()},
        "progress": progress,
        "score": score,
    }
    return {"sha256": _checksum(body), **body}


def checked_record(saved: Any) -> dict[str, Any]:
    """Returns a record that was read back, without its checksum.

    Raises:
        CheckpointError: it is of another version, or damaged.
    """
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
