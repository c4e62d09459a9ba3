"""Plans as JSON: versioned, compact, the same bytes for the same plan, refused when damaged."""

import hashlib
import json
from typing import Any

from lorafusion_sched.problem import Microbatch, Plan, PlanError, Sample, Stretch

FORMAT = "lorafusion-plan"
VERSION = 1


def to_json(plan: Plan) -> str:
    """Returns the plan as one JSON document with a checksum of its content."""
    names = list(dict.fromkeys(s.job for mb in plan.microbatches for s in mb.stretches))
    number = {name: i for i, name in enumerate(names)}
    body = {
        "format": FORMAT,
        "version": VERSION,
        "tile": plan.tile,
        "distance": plan.distance,
        "width": plan.width,
        "jobs": names,
        "microbatches": [
            [
                mb.capacity,
                [
                    [number[s.job], s.batch, s.ends, [list(x) for x in s.samples]]
                    for s in mb.stretches
                ],
            ]
            for mb in plan.microbatches
        ],
    }
    text = _canonical(body)
    return f'{{"sha256":"{_digest(text)}",{text[1:]}\n'


def from_json(text: str) -> Plan:
    """Reads a plan written by `to_json`.

    Args:
        text: the JSON document.

    Returns:
        The plan; `to_json` of it gives the same bytes.

    Raises:
        PlanError: not JSON, another format or version, a wrong type, or a checksum that does not
            match.
    """
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not a plan: invalid JSON ({error}); plan again") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise PlanError(f'not a plan: expected a JSON object with "format": "{FORMAT}"')
    if body.get("version") != VERSION:
        raise PlanError(f"plan version {body.get('version')!r}, this program reads {VERSION}")
    digest = body.pop("sha256", None)
    if digest != _digest(_canonical(body)):
        raise PlanError("the plan is damaged: its SHA-256 does not match its content; plan again")
    fields = {"format", "version", "tile", "distance", "width", "jobs", "microbatches"}
    if set(body) != fields:
        raise PlanError(f"the plan has fields {sorted(body)}, expected {sorted(fields)}")
    names = _list(body["jobs"], "jobs")
    if not all(isinstance(name, str) for name in names):
        raise PlanError(f"jobs must be names, got {names}")
    return Plan(
        microbatches=tuple(
            _microbatch(item, names) for item in _list(body["microbatches"], "microbatches")
        ),
        tile=_integer(body["tile"], "tile", least=1),
        distance=_integer(body["distance"], "distance", least=1),
        width=_integer(body["width"], "width", least=1),
    )


def _microbatch(item: Any, names: list[str]) -> Microbatch:
    capacity, stretches = _list(item, "microbatch", length=2)
    return Microbatch(
        stretches=tuple(_stretch(s, names) for s in _list(stretches, "stretches")),
        capacity=_integer(capacity, "capacity", least=1),
    )


def _stretch(item: Any, names: list[str]) -> Stretch:
    job, batch, ends, samples = _list(item, "stretch", length=4)
    if _integer(job, "job") >= len(names):
        raise PlanError(f"the plan names job {job}, but has {len(names)} jobs")
    if not isinstance(ends, bool):
        raise PlanError(f"ends must be true or false, got {ends!r}")
    return Stretch(
        job=names[job],
        batch=_integer(batch, "batch"),
        samples=tuple(_sample(sample) for sample in _list(samples, "samples")),
        ends=ends,
    )


def _sample(item: Any) -> Sample:
    epoch, index, length = _list(item, "sample", length=3)
    return Sample(
        _integer(epoch, "epoch"), _integer(index, "index"), _integer(length, "length", least=1)
    )


def _list(item: Any, what: str, *, length: int | None = None) -> list[Any]:
    if not isinstance(item, list) or length not in (None, len(item)):
        size = "" if length is None else f" of {length}"
        raise PlanError(f"{what} must be a list{size}, got {str(item)[:80]}")
    return item


def _integer(item: Any, what: str, *, least: int = 0) -> int:
    if type(item) is not int or item < least:
        raise PlanError(f"{what} must be an integer of at least {least}, got {item!r}")
    return item


def _canonical(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
