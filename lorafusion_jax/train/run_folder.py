"""The folder of a run: what is written where, and how it is read back.

    config.yaml  config.resolved.yaml  environment.json  plan.json  train.log  events.jsonl
    jobs/NAME/{metrics.jsonl, adapter/, adapter_last/}
    checkpoints/STEP/    the state of all jobs together
    control/             requests to the process that trains
    status.json          how far it is now, for `lorafusion status`
    stacks.txt           of every thread, if the watchdog ended the run
    summary.md  report.html  loss.png  utilisation.png

`adapter/` is the best by held-out loss, or the last where nothing is held out; `adapter_last/` is
the last.
"""

import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from lorafusion_jax.config import JobConfig, RunConfig, load_config, resolved_yaml
from lorafusion_jax.errors import ConfigError

_CONTENTS = (
    "config.yaml",
    "config.resolved.yaml",
    "environment.json",
    "plan.json",
    "train.log",
    "events.jsonl",
    "jobs",
    "tensorboard",
    "checkpoints",
    "control",
    "status.json",
    "stacks.txt",
    "summary.md",
    "sweep.json",
    "loss.png",
    "utilisation.png",
    "report.html",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


@dataclass(frozen=True)
class RunFolder:
    """Paths and contents of a run; reading never changes anything.

    Attributes:
        path: the run's folder.
    """

    path: Path

    @cached_property
    def config(self) -> RunConfig:
        """The complete configuration of the run."""
        return load_config(self.path / "config.resolved.yaml")

    @property
    def jobs(self) -> dict[str, JobConfig]:
        """The jobs by name, in order."""
        return {job.name: job for job in self.config.jobs}

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def job(self, name: str) -> Path:
        """Returns the folder of a job."""
        return self.path / "jobs" / name

    def adapter(self, name: str, which: str = "best") -> Path:
        """Returns the PEFT folder of a job's "best" or "last" adapter; it may not exist yet."""
        return self.job(name) / ("adapter" if which == "best" else "adapter_last")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Returns the lines of a job's metrics.jsonl so far."""
        return read_lines(self.job(name) / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """Returns the lines of events.jsonl so far."""
        return read_lines(self.path / "events.jsonl")

    def remove_run(self) -> bool:
        """Removes what an earlier run left here, nothing else; returns whether there was any."""
        there = [path for name in _CONTENTS if os.path.lexists(path := self.path / name)]
        for path in there:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return bool(there)

    def live(self) -> dict[str, Any]:
        """Returns what status.json holds; empty where there is none that can be read."""
        try:
            found = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_plan(self, plan_json: str) -> None:
        """Writes the plan: at the start, and when it has changed."""
        write_text(self.path / "plan.json", plan_json)

    def write_start(self, config: RunConfig, plan_json: str, source: Path | None) -> None:
        """Writes the configuration, the environment and the plan.

        Args:
            config: complete configuration.
            plan_json: the plan.
            source: the user's configuration file, copied as it is.
        """
        for job in config.jobs:
            self.job(job.name).mkdir(parents=True, exist_ok=True)
        if source is not None:
            write_text(self.path / "config.yaml", source.read_text(encoding="utf-8"))
        self.write_config(config)
        write_text(self.path / "environment.json", json.dumps(environment(), indent=2) + "\n")
        self.write_plan(plan_json)

    def write_config(self, config: RunConfig) -> None:
        """Writes the complete configuration again, when jobs have joined."""
        write_text(self.path / "config.resolved.yaml", resolved_yaml(config))
        self.__dict__.pop("config", None)


def open_run(path: str | Path) -> RunFolder:
    """Opens the folder of a running or finished run.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = Path(path)
    if not (path / "config.resolved.yaml").is_file():
        raise ConfigError(f"{path} holds no run: expected the output folder of a training run")
    return RunFolder(path)


def environment() -> dict[str, Any]:
    """Returns versions and devices, for the record."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "command": sys.argv,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the whole lines of a JSONL file; one that is being written, or was cut, is left."""
    if not path.is_file():
        return []
    content = path.read_text(encoding="utf-8")
    whole = content[: content.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def write_text(path: Path, text: str) -> None:
    """Writes a file so that readers see the old or the new content, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
