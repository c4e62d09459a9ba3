"""What a sweep comes to: its jobs side by side, the lowest held-out loss first."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorafusion_jax.config import JobConfig
from lorafusion_jax.train.progress import JobProgress


def sweep_tables(
    jobs: Sequence[JobConfig], progress: Mapping[str, JobProgress]
) -> dict[str, list[dict[str, Any]]]:
    """Returns the rows of each sweep, by the name of its job in the file.

    A row holds the job, the swept values by dotted key, steps, status, and the held-out loss of
    the base model, the best one with its step, and the exact match of the last evaluation; None
    where nothing is held out.
    """
    tables: dict[str, list[dict[str, Any]]] = {}
    for job in jobs:
        if job.swept is None:
            continue
        done = progress[job.name]
        row = {
            "job": job.name,
            **job.swept.values,
            "steps": done.step,
            "status": done.status,
            "base_loss": done.base_loss,
            "best_loss": done.best_loss,
            "best_step": done.best_step,
            "exact_match": done.exact_match,
        }
        tables.setdefault(job.swept.job, []).append(row)
    for rows in tables.values():
        rows.sort(key=lambda row: math.inf if row["best_loss"] is None else row["best_loss"])
    return tables


def cell(value: Any) -> str:
    """Formats one value of a row."""
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
