"""Turns everything that is wrong with a configuration into one readable list."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from lorafusion_jax.config.schema import RunConfig
from lorafusion_jax.config.source import Key, Lines

_REMOVE = "not supported in this version: remove it"
# Keys that users of other tools expect here, by section and name.
HINTS: dict[tuple[str, str], str] = {
    ("base", "quantize"): f"{_REMOVE} (base.dtype is float32 or bfloat16)",
    ("batching", "packing"): "remove it: samples are always packed, and never see each other",
    ("parallel", "pipeline"): "unknown key: the length of the pipeline is parallel.stage",
    ("parallel", "fsdp"): f"{_REMOVE} (parallel has data and stage)",
    ("parallel", "tensor"): f"{_REMOVE} (parallel has data and stage)",
    ("", "sweep"): "unknown key: a sweep belongs to a job, as jobs: [{sweep: {lora.r: [8, 32]}}]",
    ("jobs", "init_from"): 'unknown key, did you mean "lora.init_from"?',
    ("lora", "rank"): 'unknown key, did you mean "r"?',
    ("lora", "modules_to_save"): _REMOVE,
    ("lora", "use_dora"): _REMOVE,
    ("lora", "bias"): f"{_REMOVE} (biases stay frozen)",
    ("eval", "early_stopping_patience"): "unknown key: it is train.early_stopping.patience",
}
_EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a text",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "model_type": "a section with keys",
    "model_attributes_type": "a section with keys",
    "string_too_short": "a text that is not empty",
}
_BOUND = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: under which key, and what was got and expected."""

    key: Key
    message: str


def report(name: str, problems: list[Problem], lines: Lines, raw: dict[str, Any]) -> str:
    """Returns the text of a ConfigError: one line for each problem, in file order.

    Args:
        name: of the file.
        problems: what is wrong; repetitions are dropped.
        lines: line of each key path; 0 is a key given on the command line.
        raw: content, for the names of the jobs.
    """
    rows = []
    for problem in sorted(dict.fromkeys(problems), key=lambda p: _line(p.key, lines) or 0):
        line = _line(problem.key, lines)
        where = name if line is None else f"{name}:{line}" if line else "--set"
        rows.append(f"  {where}: {dotted(problem.key, raw)}: {problem.message}")
    count = "1 problem" if len(rows) == 1 else f"{len(rows)} problems"
    return "\n".join([f"{count} in the configuration", *rows])


def dotted(key: Key, raw: dict[str, Any]) -> str:
    """Returns a key path as users write it: `jobs.sql.lora.r`, or `jobs[0]` for a nameless job."""
    text = ""
    for depth, part in enumerate(key):
        if isinstance(part, int):
            job = _job(raw, part) if depth == 1 and key[0] == "jobs" else None
            named = job is not None and isinstance(job.get("name"), str) and job["name"]
            text += f".{job['name'][:70]}" if job is not None and named else f"[{part}]"
        else:
            text += f".{part[:70]}" if text else part[:70]
    return text or "file"


def describe(error: ErrorDetails) -> str:
    """Returns what one of pydantic's errors got and expected."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "missing"
    if kind == "extra_forbidden":
        return _unknown_key(error["loc"])
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUND:
        name, words = _BOUND[kind]
        expected = f"{words} {context[name]}"
    elif kind == "literal_error":
        expected = f"{context['expected']}"
    elif kind == "too_short":
        expected = f"at least {context['min_length']} of them"
    else:
        expected = _EXPECTED.get(kind, error["msg"])
    if error["loc"] == ("jobs",) and kind == "tuple_type":
        expected = "a list of jobs, each `- name: ...`"
    return f"got {shown(error['input'])}, expected {expected}"


def nearest(word: str, known: list[str]) -> str:
    """Returns `, did you mean "x"?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word.casefold(), known, n=1, cutoff=0.6)
    return f', did you mean "{close[0]}"?' if close else ""


def shown(value: Any) -> str:
    """Returns a value as it looks in the file, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section with keys"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    *sections, name = loc
    names = [part for part in sections if isinstance(part, str)]
    section, word = names[-1] if names else "", str(name)
    if (section, word) in HINTS:
        return HINTS[section, word]
    model = _model_at(tuple(sections))
    known = [*model.model_fields, *(["defaults"] if model is RunConfig else [])]
    elsewhere = [*_all_keys(model), *_all_keys(RunConfig)]
    homes = [key for key in elsewhere if key == word or key.endswith(f".{word}")]
    hint = f', did you mean "{homes[0]}"?' if homes else nearest(word, known) or ","
    return f"unknown key{hint} known here: {', '.join(sorted(known))}"


def _model_at(loc: tuple[int | str, ...]) -> type[BaseModel]:
    model: type[BaseModel] = RunConfig
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _record(model.model_fields[part].annotation) or model
    return model


def _record(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for arg in get_args(annotation) if (model := _record(arg))), None)


def _all_keys(model: type[BaseModel], path: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        key = path + ("defaults" if name == "jobs" else name)
        yield key
        inner = _record(field.annotation)
        if inner is not None:
            yield from _all_keys(inner, f"{key}.")


def _job(raw: dict[str, Any], index: int) -> dict[str, Any] | None:
    jobs = raw.get("jobs")
    inside = isinstance(jobs, list) and index < len(jobs) and isinstance(jobs[index], dict)
    return jobs[index] if isinstance(jobs, list) and inside else None


def _line(key: Key, lines: Lines) -> int | None:
    """Line of the key, or of the closest section around it."""
    for length in range(len(key), 0, -1):
        if key[:length] in lines:
            return lines[key[:length]]
    return None
