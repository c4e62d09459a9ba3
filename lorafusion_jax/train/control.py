"""Requests to a process that trains: files that appear whole in its folder and go when obeyed.

    RUN/control/TIME-PID.json    {"version": 1, "action": "cancel", "job": NAME}
                                 {"version": 1, "action": "add", "jobs": [complete job sections]}

The process looks between two microbatches. A request is removed only after a checkpoint holds what
it asked for, so that a kill in between loses nothing; asked twice, it is refused the second time.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from lorafusion_jax.config.schema import JobConfig, Section
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.train.run_folder import RunFolder, write_text

MAX_BYTES = 1 << 20


class Cancel(Section):
    """Ends a job now; it keeps what it has learnt.

    Attributes:
        job: its name.
    """

    version: Literal[1] = 1
    action: Literal["cancel"] = "cancel"
    job: str = Field(min_length=1, max_length=64)


class Add(Section):
    """Lets jobs join.

    Attributes:
        jobs: complete settings, paths absolute.
    """

    version: Literal[1] = 1
    action: Literal["add"] = "add"
    jobs: Annotated[tuple[JobConfig, ...], Field(strict=False, min_length=1)]


type Request = Cancel | Add
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Cancel | Add, Field(discriminator="action")])


def send(folder: RunFolder, request: Request) -> Path:
    """Leaves a request for the process that trains in a folder.

    Returns:
        The file, which is gone when the request was obeyed or refused.
    """
    box = _box(folder)
    box.mkdir(exist_ok=True)
    path = box / f"{time.time_ns():020}-{os.getpid()}.json"
    write_text(path, request.model_dump_json())
    return path


def waiting(folder: RunFolder) -> list[Path]:
    """Returns the requests that were not looked at yet, oldest first."""
    try:
        with os.scandir(_box(folder)) as entries:
            names = [e.name for e in entries if not e.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []
    return [_box(folder) / name for name in sorted(names) if name[:1] != "."]


def read(path: Path) -> Request:
    """Reads a request.

    Raises:
        ConfigError: it is not one; says why.
    """
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise ConfigError(f"{path.name}: expected a file of at most {MAX_BYTES} bytes")
        return _REQUEST.validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path.name}: {where}: {first['msg']}") from error
    except OSError as error:
        raise ConfigError(f"{path.name} is not a request: {str(error)[:200]}") from error


def new_jobs(folder: RunFolder, jobs: Sequence[JobConfig]) -> list[JobConfig]:
    """Returns those of a configuration's jobs that the run does not have.

    Raises:
        ConfigError: a job of the run has other settings there, or nothing is new.
    """
    known = {name.casefold(): job for name, job in folder.jobs.items()}
    for job in jobs:
        there = known.get(job.name.casefold())
        if there is not None and there != job:
            raise ConfigError(
                f"job {job.name!r} is in the run already, with other settings: choose another name"
            )
    new = [job for job in jobs if job.name.casefold() not in known]
    if not new:
        raise ConfigError("every job of this configuration is in the run already")
    return new


def _box(folder: RunFolder) -> Path:
    return folder.path / "control"
