"""A sweep: one job of the file becomes one job for each combination of values.

    jobs:
      - name: sql
        data: {path: sql.jsonl}
        sweep: {lora.r: [8, 32], optim.lr: [1.0e-4, 3.0e-4]}    # four jobs, trained together

The jobs share what the original's name decides: held-out rows, order, initialisation, dropout. So
they differ in the swept values only, and each is bit for bit the job one would write by hand.
"""

import copy
import itertools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lorafusion_jax.config.source import Key

MAX_JOBS = 256
_NAME_LENGTH = 64


class Expanded(NamedTuple):
    """A job of the resolved configuration.

    Attributes:
        job: its content.
        number: of the job in the file that it comes from, from 0.
        point: the swept values, by dotted key; None for a job without a sweep.
    """

    job: Any
    number: int
    point: dict[str, Any] | None = None


def sweep_problems(
    job: Any,
    sections: tuple[str, ...],
    aliases: Mapping[str, Mapping[str, str]],
    exclusive: Mapping[str, tuple[str, ...]],
) -> list[tuple[Key, str]]:
    """Returns what is wrong with a job's `sweep`: (key below the job, message).

    Args:
        job: content of the job.
        sections: of a job, whose keys can be swept.
        aliases: see `expand`; also `exclusive`.
        exclusive: of a section's keys, those of which a job has one at most.
    """
    grid = job.get("sweep") if isinstance(job, dict) else None
    if grid is None:
        return []
    if not isinstance(grid, dict) or not grid:
        return [(("sweep",), "expected dotted keys with lists of values, as in {lora.r: [8, 32]}")]
    problems: list[tuple[Key, str]] = _rivals(grid, aliases, exclusive)
    count = 1
    for key, values in grid.items():
        section, dot, rest = key.partition(".")
        if section not in sections or not dot or not all(rest.split(".")):
            known = ", ".join(sections)
            message = f"expected a dotted key of this job's sections ({known}), such as lora.r"
            problems.append((("sweep", key), message))
        if not isinstance(values, list) or not values:
            problems.append((("sweep", key), "expected a list of values"))
        elif any(value in values[:i] for i, value in enumerate(values)):
            problems.append((("sweep", key), "a value is given twice"))
        else:
            count *= len(values)
    if count > MAX_JOBS:
        problems.append((("sweep",), f"gives {count} jobs, expected at most {MAX_JOBS}"))
    return problems


def expand(
    jobs: list[Any],
    aliases: Mapping[str, Mapping[str, str]],
    exclusive: Mapping[str, tuple[str, ...]],
) -> list[Expanded]:
    """Replaces each job that has a (valid) `sweep` by its combinations, the last key fastest.

    Args:
        jobs: content of the jobs, defaults filled in.
        aliases: other names of a section's keys.
        exclusive: of a section's keys, those of which a job has one at most.
    """
    expanded = []
    for index, job in enumerate(jobs):
        grid = job.pop("sweep", None) if isinstance(job, dict) else None
        if not isinstance(grid, dict):
            expanded.append(Expanded(job, index))
            continue
        keys = [_true_name(key, aliases) for key in grid]
        points = [
            dict(zip(keys, values, strict=True)) for values in itertools.product(*grid.values())
        ]
        labels = [_label(point) for point in points]
        name = str(job.get("name"))
        too_long = any(len(f"{name}-{label}") > _NAME_LENGTH for label in labels)
        if too_long or len({label.casefold() for label in labels}) < len(labels):
            labels = [f"{number:02d}" for number in range(1, len(points) + 1)]
        for point, label in zip(points, labels, strict=True):
            one = copy.deepcopy(job)
            for key, value in point.items():
                _set(one, key, copy.deepcopy(value), exclusive)
            one |= {"name": f"{name}-{label}", "swept": {"job": name, "values": point}}
            expanded.append(Expanded(one, index, point))
    return expanded


def _rivals(
    grid: dict[str, Any],
    aliases: Mapping[str, Mapping[str, str]],
    exclusive: Mapping[str, tuple[str, ...]],
) -> list[tuple[Key, str]]:
    """Keys that mean the same setting, or settings of which a job has one at most."""
    found: list[tuple[Key, str]] = []
    seen: dict[str, str] = {}
    for key in grid:
        name = _true_name(key, aliases)
        section, _, last = name.partition(".")
        names = exclusive.get(section, ())
        same = [f"{section}.{one}" for one in names] if last in names else [name]
        other = next((seen[one] for one in same if one in seen), None)
        if other is not None:
            message = f'stands beside "{other}", expected one of them: each replaces the other'
            found.append((("sweep", key), message))
        seen[name] = key
    return found


def _true_name(key: str, aliases: Mapping[str, Mapping[str, str]]) -> str:
    section, _, rest = key.partition(".")
    return f"{section}.{aliases.get(section, {}).get(rest, rest)}"


def _set(job: dict[str, Any], key: str, value: Any, exclusive: Mapping[str, tuple[str, ...]]):
    section, *parts, last = key.split(".")
    holder = job.setdefault(section, {})
    if not isinstance(holder, dict):  # left for validation to refuse
        return
    for rival in exclusive.get(section, ()):
        if not parts and last in exclusive[section]:
            holder.pop(rival, None)
    for part in parts:
        if not isinstance(holder.get(part), dict):
            holder[part] = {}
        holder = holder[part]
    holder[last] = value


def _label(point: dict[str, Any]) -> str:
    """The values as a part of a folder's name: lr0.0001-r8."""
    parts = []
    for key, value in point.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        parts.append(key.rpartition(".")[2] + re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_."))
    return "-".join(parts)
