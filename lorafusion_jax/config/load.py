"""From a configuration file to a RunConfig: overrides, defaults, validation."""

import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lorafusion_jax.config.data import HUB
from lorafusion_jax.config.problems import Problem, describe, nearest, report
from lorafusion_jax.config.schema import JobConfig, RunConfig
from lorafusion_jax.config.source import Key, Lines, parse_value, read_source
from lorafusion_jax.config.sweep import Expanded, expand, sweep_problems
from lorafusion_jax.errors import ConfigError

INHERITED = ("data", "lora", "optim", "train", "eval", "save")
ALIASES = {
    "lora": {"lora_alpha": "alpha", "lora_dropout": "dropout", "rslora": "use_rslora"},
    "optim": {
        "learning_rate": "lr",
        "loraplus_ratio": "lora_plus_ratio",
        "loraplus_lr_ratio": "lora_plus_ratio",
    },
    "train": {"num_train_epochs": "epochs"},
}
# Of these, the one a job sets replaces whichever its defaults set.
EXCLUSIVE = {
    "train": ("epochs", "max_steps"),
    "data": ("path", "sources"),
    "eval": ("split", "path"),
    "optim": ("warmup_ratio", "warmup_steps"),
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Loads, completes and checks a configuration file.

    Relative paths in it, `output` included, are taken from the file's own folder. No other file is
    opened.

    Args:
        path: YAML file, or TOML by its suffix.
        overrides: `key=value` texts, keys dotted, jobs by name (`jobs.sql.lora.r=32`), values YAML.

    Returns:
        The configuration; every job has its defaults filled in.

    Raises:
        ConfigError: lists every problem found.
    """
    raw, lines = read_source(path)
    return config_from_dict(raw, overrides, name=str(path), folder=Path(path).parent, lines=lines)


def config_from_dict(
    raw: dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    name: str = "config",
    folder: str | Path | None = None,
    lines: Lines | None = None,
) -> RunConfig:
    """Completes and checks a configuration given as plain types; see `load_config`.

    Args:
        raw: content of a configuration file; it is not changed.
        overrides: as for `load_config`.
        name: what error messages call it.
        folder: what relative paths are taken from; None leaves them as they are.
        lines: line of each key path, for messages.
    """
    lines = dict(lines or {})
    raw = _copy(raw)
    problems = _rename_aliases(raw)
    for text in overrides:
        problems += _override(raw, text, lines)
    problems += _check_defaults(raw) + _check_names(raw) + _check_sweeps(raw)
    config = None
    run, jobs = _resolve(raw)
    try:
        config = RunConfig.model_validate(run)
    except ValidationError as error:
        problems += _problems(error, lambda key: _origin(raw, jobs, key))
    if problems or config is None:
        raise ConfigError(report(name, problems, lines, raw))
    return config if folder is None else _anchor_paths(config, Path(folder))


def resolved_yaml(config: RunConfig) -> str:
    """Returns the complete configuration as YAML: equal text for equal configurations.

    Loading it gives an equal configuration.
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def template_yaml() -> str:
    """Returns a commented configuration file to start from."""
    return resources.files("lorafusion_jax.config").joinpath("template.yaml").read_text("utf-8")


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _copy(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_copy(item) for item in value]
    return value


def _holders(raw: dict[str, Any]) -> list[tuple[Key, dict[str, Any]]]:
    """The mappings that hold per-job sections: the defaults and each job."""
    jobs = raw.get("jobs")
    found: list[tuple[Key, Any]] = [(("defaults",), raw.get("defaults"))]
    found += [(("jobs", i), job) for i, job in enumerate(jobs if isinstance(jobs, list) else [])]
    return [(key, holder) for key, holder in found if isinstance(holder, dict)]


def _rename_aliases(raw: dict[str, Any]) -> list[Problem]:
    problems = []
    for key, holder in _holders(raw):
        for section, aliases in ALIASES.items():
            values = holder.get(section)
            if not isinstance(values, dict):
                continue
            for alias, name in aliases.items():
                if alias in values and name in values:
                    message = f'the same setting as "{name}", which is given too'
                    problems.append(Problem((*key, section, alias), message))
                    del values[alias]
                elif alias in values:
                    values[name] = values.pop(alias)
    return problems


def _override(raw: dict[str, Any], text: str, lines: Lines) -> list[Problem]:
    """Sets one `key=value` in `raw`; an unknown key is left to validation."""
    dotted, equals, value_text = text.partition("=")
    dotted = dotted.strip()
    if not equals or not all(dotted.split(".")):
        raise ConfigError(f"--set {text!r}: expected key=value, such as jobs.sql.lora.r=32")
    value = parse_value(value_text, f"--set {dotted}")
    target: Any = raw
    key: Key = ()
    parts = dotted.split(".")
    if parts[0] == "jobs" and len(parts) > 1:
        found = _find_job(raw, parts[1:])
        if found is None:
            names = [str(job.get("name")) for key, job in _holders(raw) if key[0] == "jobs"]
            hint = nearest(parts[1], names) or f"; jobs are {', '.join(names) or 'none'}"
            lines[tuple(parts)] = 0
            return [Problem(tuple(parts), f"--set names a job that is not there{hint}")]
        index, parts = found
        key, target = ("jobs", index), raw["jobs"][index]
    for part in parts[:-1]:
        key = (*key, part)
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            return [Problem(key, f"--set {dotted} needs a section here, got a value")]
    section = str(key[-1]) if key else ""
    name = ALIASES.get(section, {}).get(parts[-1], parts[-1])
    rivals = EXCLUSIVE.get(section, ()) if key[:1] in (("jobs",), ("defaults",)) else ()
    for rival in rivals if name in rivals and value is not None else ():
        target.pop(rival, None)
    target[name] = value
    lines[(*key, name)] = 0
    return []


def _find_job(raw: dict[str, Any], parts: list[str]) -> tuple[int, list[str]] | None:
    """Index of the job whose name, which may have dots, starts `parts`, and what follows it."""
    names = {str(job.get("name")): key[1] for key, job in _holders(raw) if key[0] == "jobs"}
    for length in range(len(parts) - 1, 0, -1):
        index = names.get(".".join(parts[:length]))
        if isinstance(index, int):
            return index, parts[length:]
    return None


def _check_defaults(raw: dict[str, Any]) -> list[Problem]:
    """Problems of the defaults by themselves, even of those that every job replaces."""
    defaults = raw.get("defaults")
    if defaults is None:
        return []
    if not isinstance(defaults, dict):
        return [Problem(("defaults",), "expected sections such as lora, optim, train")]
    job = _drop_empty(defaults)
    if isinstance(job.get("data", {}), dict):
        own = job.get("data", {})
        job["data"] = own if "sources" in own else {"path": "-", **own}
    problems = []
    for key in [key for key in job if key not in INHERITED]:
        hint = nearest(key, list(INHERITED)) or ","
        message = f"unknown key{hint} known here: {', '.join(INHERITED)}"
        problems.append(Problem(("defaults", key), message))
        del job[key]
    try:
        JobConfig.model_validate({**job, "name": "defaults"})
    except ValidationError as error:
        problems += _problems(error, lambda key: ("defaults", *key), prefix=("jobs", 0))
    return problems


def _check_names(raw: dict[str, Any]) -> list[Problem]:
    """Job names that are not unique; not a validator, since those wait until all jobs are valid."""
    seen: dict[str, str] = {}
    problems = []
    for key, job in _holders(raw):
        name = job.get("name")
        if key[0] != "jobs" or not isinstance(name, str):
            continue
        if name.casefold() in seen:
            message = (
                f"got {name[:70]!r} beside {seen[name.casefold()][:70]!r}, expected names that "
                "differ in more than case, because each is a folder"
            )
            problems.append(Problem((*key, "name"), message))
        seen[name.casefold()] = name
    return problems


def _check_sweeps(raw: dict[str, Any]) -> list[Problem]:
    """Problems of the sweeps; those of the values are found where they are used."""
    problems = []
    for key, job in _holders(raw):
        if key[0] != "jobs":
            continue
        found = sweep_problems(job, INHERITED, ALIASES, EXCLUSIVE)
        problems += [Problem((*key, *below), message) for below, message in found]
        if found:
            job["sweep"] = None
    if not problems:
        _, jobs = _resolve(raw)
        names = [str(one.job.get("name")).casefold() for one in jobs if isinstance(one.job, dict)]
        for one in jobs:
            name = str(one.job.get("name")) if isinstance(one.job, dict) else ""
            if one.point is not None and names.count(name.casefold()) > 1:
                message = f"gives a job {name!r}, which is there already: rename one of them"
                problems.append(Problem(("jobs", one.number, "sweep"), message))
    return problems


def _resolve(raw: dict[str, Any]) -> tuple[dict[str, Any], list[Expanded]]:
    """The content without `defaults`, each job merged with them and sweeps expanded; the jobs."""
    defaults = raw.get("defaults")
    defaults = _drop_empty(defaults) if isinstance(defaults, dict) else {}
    run = _drop_empty(raw)
    run.pop("defaults", None)
    jobs: list[Expanded] = []
    if isinstance(run.get("jobs"), list):
        merged = [_merge(defaults, job) for job in run["jobs"]]
        jobs = expand(merged, ALIASES, EXCLUSIVE)
        run["jobs"] = [one.job for one in jobs]
    return run, jobs


def _merge(defaults: dict[str, Any], job: Any) -> Any:
    if not isinstance(job, dict):
        return job
    merged = _drop_empty(job)
    for section in INHERITED:
        inherited, own = defaults.get(section), merged.get(section, {})
        if not isinstance(inherited, dict) or not isinstance(own, dict):
            continue
        rivals = EXCLUSIVE.get(section, ())
        replaced = rivals if any(own.get(name) is not None for name in rivals) else ()
        kept = {name: value for name, value in inherited.items() if name not in replaced}
        merged[section] = {**kept, **own}
    return merged


def _drop_empty(section: dict[str, Any]) -> dict[str, Any]:
    """Without the keys that have nothing behind the colon: `lora:` means no setting there."""
    return {key: value for key, value in section.items() if value is not None}


def _origin(raw: dict[str, Any], jobs: list[Expanded], key: Key) -> Key | None:
    """Where the value at `key` of the resolved content was written; None if in the defaults.

    Problems of inherited values are found by `_check_defaults`.
    """
    if key[:1] != ("jobs",) or len(key) < 2 or not isinstance(key[1], int):
        return key
    one = jobs[key[1]]
    key = ("jobs", one.number, *key[2:])
    for swept in one.point or {}:
        if ".".join(map(str, key[2:])).startswith(swept):
            return (*key[:2], "sweep", swept)
    if len(key) < 4 or key[2] not in INHERITED:
        return key
    return key if _has(raw, key) or not _has(raw, ("defaults", *key[2:])) else None


def _has(raw: Any, key: Key) -> bool:
    for part in key:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def _problems(error: ValidationError, origin: Any, prefix: Key = ()) -> list[Problem]:
    problems = []
    for details in error.errors(include_url=False):
        key = origin(details["loc"])
        # A list whose entries all failed also counts as too short.
        echo = details["type"] == "too_short" and details["input"]
        if key is None or echo or details["type"] == "default_factory_not_called":
            continue
        details["loc"] = (*prefix, *details["loc"])
        problems.append(Problem(key, describe(details)))
    return problems


def _anchor_paths(config: RunConfig, folder: Path) -> RunConfig:
    def anchored(path: str) -> str:
        if path.startswith(HUB):
            return path
        return os.path.abspath(folder / os.path.expanduser(path))

    def changed[T: BaseModel](record: T, **values: Any) -> T:
        return record.model_copy(update=values)

    jobs = []
    for job in config.jobs:
        data = job.data
        if data.path is not None:
            data = changed(data, path=anchored(data.path))
        if data.sources:
            parts = tuple(changed(part, path=anchored(part.path)) for part in data.sources)
            data = changed(data, sources=parts)
        held_out = job.eval
        if held_out.path is not None:
            held_out = changed(held_out, path=anchored(held_out.path))
        lora = job.lora
        if lora.init_from is not None:
            lora = changed(lora, init_from=anchored(lora.init_from))
        jobs.append(changed(job, data=data, eval=held_out, lora=lora))
    model = config.base.model
    if not model.startswith("hf://"):
        model = anchored(model)
    base = changed(config.base, model=model)
    return changed(config, base=base, output=anchored(config.output), jobs=tuple(jobs))
