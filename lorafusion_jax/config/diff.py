"""What changed between two configurations, and whether a run may go on with it."""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

from lorafusion_jax.config.schema import RunConfig

# They change what is written and when, not what is learnt.
ALLOWED = (
    "output",
    "report.*",
    "train.watchdog",
    "parallel.*",  # the same sums in another order, as for any other change of devices
    "jobs.*.eval.every",
    "jobs.*.save.every",
    "jobs.*.save.keep_last",
    "jobs.*.save.keep_best",
)
# The same content may have moved; whoever has its fingerprint decides.
PATHS = (
    "base.model",
    "jobs.*.data.path",
    "jobs.*.data.sources.*.path",
    "jobs.*.eval.path",
    "jobs.*.lora.init_from",
)


class Change(NamedTuple):
    """One difference between two configurations.

    Attributes:
        key: dotted, jobs by name.
        old: value before; None where there was none.
        new: value now; None where there is none.
        kind: `allowed` on resume, `path` (allowed if the content behind it has the same
            fingerprint), or `refused`.
    """

    key: str
    old: Any
    new: Any
    kind: Literal["allowed", "path", "refused"]

    def __str__(self) -> str:
        return f"{self.key}: {_text(self.old)} -> {_text(self.new)}"


def config_diff(old: RunConfig, new: RunConfig) -> list[Change]:
    """Compares two resolved configurations key by key.

    A job only in `new` is one allowed change (`jobs.NAME`), one only in `old` a refused one. The
    order of the jobs does not matter.

    Returns:
        The changes in the order of the keys; empty for equal configurations.
    """
    before, after = _flat(old), _flat(new)
    old_jobs = {job.name for job in old.jobs}
    new_jobs = {job.name for job in new.jobs}
    changes = []
    for name in (job.name for job in old.jobs if job.name not in new_jobs):
        changes.append(Change(f"jobs.{name}", "present", None, "refused"))
    for name in (job.name for job in new.jobs if job.name not in old_jobs):
        changes.append(Change(f"jobs.{name}", None, "present", "allowed"))
    for job, key in dict.fromkeys([*before, *after]):
        if job is not None and job not in old_jobs & new_jobs:
            continue
        value, now = before.get((job, key)), after.get((job, key))
        if now != value:
            pattern = key if job is None else f"jobs.*.{key}"
            shown = key if job is None else f"jobs.{job}.{key}"
            changes.append(Change(shown, value, now, _kind(pattern)))
    return changes


def settings_of(config: RunConfig) -> str:
    """Returns all of a configuration but where things are and are reported, as text.

    It is the same for runs that compute the same if the same is found at their paths.
    """
    elsewhere = (*PATHS, "output", "report.*")
    kept = [
        (job, key, value)
        for (job, key), value in _flat(config).items()
        if not _matches(key if job is None else f"jobs.*.{key}", elsewhere)
    ]
    return json.dumps(kept)


def _flat(config: RunConfig) -> dict[tuple[str | None, str], Any]:
    content = config.model_dump(mode="json")
    flat: dict[tuple[str | None, str], Any] = {}
    for job in content.pop("jobs"):
        name = job.pop("name")
        flat |= {(name, key): value for key, value in _leaves(job, "")}
    return {(None, key): value for key, value in _leaves(content, "")} | flat


def _leaves(section: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    leaves = []
    for key, value in section.items():
        if isinstance(value, dict) and not key.endswith("_pattern"):
            leaves += _leaves(value, f"{prefix}{key}.")
        elif key == "sources":
            for number, source in enumerate(value):
                leaves += _leaves(source, f"{prefix}{key}.{number}.")
        else:  # the order of patterns counts
            leaf = list(value.items()) if isinstance(value, dict) else value
            leaves.append((prefix + key, leaf))
    return leaves


def _kind(pattern: str) -> Literal["allowed", "path", "refused"]:
    if _matches(pattern, ALLOWED):
        return "allowed"
    return "path" if _matches(pattern, PATHS) else "refused"


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _text(value: Any) -> str:
    return "nothing" if value is None else repr(value)
