"""What a checkpoint must match before a run goes on from it, and how later jobs join it."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from pydantic import ValidationError

from lorafusion_jax.config import JobConfig, RunConfig, config_diff
from lorafusion_jax.errors import CheckpointError, ConfigError
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.models.weights import tensor_name
from lorafusion_jax.train.checkpoint import Checkpoints, Leaves, Restored, leaves_of, unflatten_like
from lorafusion_jax.train.choices import Choices
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_jax.train.step import TrainState
from lorafusion_sched import Plan, PlanError, from_json


def base_fingerprint(base: Base) -> str:
    """Returns a hash of the base model's shape, its norm weights and one row of every matrix.

    Those few megabytes differ between any two trainings of one architecture; hashing all weights
    would read gigabytes at every start. Rows are those of the files, so that a model that is not
    loaded has the same hash and little of it is read.
    """
    digest = hashlib.sha256(repr(base.config).encode())
    for name, tensor in sorted(base.tensors.items()):
        row = tensor.rows(0, 1) if len(tensor.shape) > 1 else tensor.read()
        digest.update(f"{name}{base.dtype}{tensor.shape}".encode())
        digest.update(jax.numpy.asarray(row).astype(base.dtype).tobytes())
    return _BY_ROWS + digest.hexdigest()


_BY_ROWS = "rows:"


def _is_base(fingerprint: str, base: Base) -> bool:
    """Whether a checkpoint's fingerprint is this base model's."""
    if fingerprint.startswith(_BY_ROWS):
        return fingerprint == base_fingerprint(base)
    return fingerprint == _fingerprint_by_columns(base)


def _fingerprint_by_columns(base: Base) -> str:
    """The fingerprint of release 0.1.0, which reads the files' columns: all of them."""
    digest = hashlib.sha256(repr(base.config).encode())
    for path, variable in nnx.to_flat_state(nnx.state(base.model)):
        leaf, (name, transposed) = variable.get_value(), tensor_name(path)
        whole = jax.numpy.asarray(base.tensors[name].read()).astype(base.dtype)
        row = whole[:, 0] if transposed else whole[(0,) * (whole.ndim - 1)]
        digest.update(f"{leaf.dtype}{leaf.shape}".encode())
        digest.update(np.asarray(row).tobytes())
    return digest.hexdigest()


def run_facts(
    config: RunConfig,
    base: Base,
    jobs: Sequence[TrainJob],
    plan_json: str,
    added: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns what identifies a run, to be saved with every checkpoint.

    Args:
        config: of the run.
        base: the base model.
        jobs: of the run.
        plan_json: the plan.
        added: jobs that joined the running process, and that the user's configuration lacks.
    """
    return {
        "config": config.model_dump(mode="json"),
        "base": base_fingerprint(base),
        "data": {job.name: job.fingerprint for job in jobs},
        "plan": plan_json,
        "added": list(added),
    }


def check_same_run(
    saved: Mapping[str, Any], config: RunConfig, base: Base, jobs: Sequence[TrainJob]
) -> list[str]:
    """Checks that a checkpoint's run is this one, perhaps with jobs added.

    Args:
        saved: progress of the checkpoint.
        config: of this run.
        base: of this run.
        jobs: of this run.

    Returns:
        Names of the jobs that are new.

    Raises:
        ConfigError: something that decides the result has changed; lists all of it.
    """
    old = _config_of(saved)
    problems = [str(change) for change in config_diff(old, config) if change.kind == "refused"]
    if not _is_base(saved["base"], base):
        problems.append("base.model: it has other weights or another shape than before")
    for job in jobs:
        before = saved["data"].get(job.name)
        if before is not None and before != job.fingerprint:
            problems.append(f"jobs.{job.name}.data: its tokenised samples have changed")
    if problems:
        raise ConfigError(
            "this is not the run that the output folder holds:\n  "
            + "\n  ".join(problems)
            + "\nundo the changes, choose another output, or start over with --resume never"
        )
    return [job.name for job in jobs if job.name not in saved["data"]]


def _config_of(saved: Mapping[str, Any]) -> RunConfig:
    """Returns the configuration of the run that saved.

    Raises:
        CheckpointError: it is none for this release.
    """
    try:
        return RunConfig.model_validate_json(json.dumps(saved["config"]))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(
            f"the configuration that was saved with the checkpoint is not one of this release: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}; go "
            "on with the release that saved it, or start over with --resume never"
        ) from error


@dataclass(frozen=True)
class Saved:
    """What a run goes on from; nothing for a new one.

    Attributes:
        config: of the run, with jobs that joined a running process.
        jobs: of the run, likewise.
        checkpoints: where the run saves.
        restored: the verified checkpoint, or None.
        plan: of the run that saved it.
        joined: jobs that are new since.
        notices: what the user should know.
    """

    config: RunConfig
    jobs: tuple[TrainJob, ...]
    checkpoints: Checkpoints
    restored: Restored | None = None
    plan: Plan | None = None
    joined: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def cursor(self) -> int:
        """First microbatch to run."""
        return 0 if self.restored is None else self.restored.progress["cursor"]

    @property
    def added(self) -> tuple[str, ...]:
        """Jobs that joined a running process."""
        return () if self.restored is None else tuple(self.restored.progress.get("added", ()))

    @property
    def num_slots(self) -> int:
        """Slots that the checkpoint has."""
        return 0 if self.restored is None else len(self.restored.leaves["bank/rank"])

    @property
    def ended(self) -> dict[str, int]:
        """Jobs that ended early, and the microbatch from which on they were skipped."""
        return {} if self.restored is None else self.restored.progress.get("ended", {})

    @property
    def slots(self) -> dict[str, int]:
        """Adapter slots of the jobs of the saved plan."""
        return {} if self.restored is None else self.restored.progress.get("slots", {})

    @property
    def capacities(self) -> tuple[int, ...]:
        """Microbatch sizes that the run may use; () where an older release did not save them."""
        return () if self.restored is None else tuple(self.restored.progress.get("capacities", ()))

    @property
    def choices(self) -> Choices | None:
        """What the run chose by itself; None where it has to choose again.

        So it is for a new run, after jobs have joined, and on another number of devices.
        """
        if self.restored is None or self.joined:
            return None
        saved = Choices.from_record(self.restored.progress.get("choices"))
        return saved if saved and saved.devices == self.config.parallel.devices else None

    @property
    def change(self) -> dict[str, Any] | None:
        """A change of plan that was being made (`lorafusion_jax.train.replan`)."""
        return None if self.restored is None else self.restored.progress.get("change")

    @property
    def joining(self) -> tuple[str, ...]:
        """Jobs that this change lets join; they are not in the saved plan."""
        return () if self.change is None else tuple(self.change["added"])

    @property
    def steps(self) -> dict[str, int]:
        """Optimizer steps that each job has taken."""
        return {name: values["step"] for name, values in self.progress.items()}

    @property
    def progress(self) -> dict[str, dict[str, Any]]:
        """Progress of each job."""
        return {} if self.restored is None else self.restored.progress["jobs"]


def find_saved(
    folder: RunFolder,
    config: RunConfig,
    base: Base,
    jobs: Sequence[TrainJob],
    resume: str,
    resolve: Callable[[JobConfig], TrainJob],
    at: Callable[[str], None] = lambda _: None,
) -> Saved:
    """Finds the newest usable checkpoint of this run, and sweeps what cannot be used.

    Args:
        folder: of the run, locked.
        config: of this run.
        base: of this run.
        jobs: of this run.
        resume: see `MultiTrainer.fit`.
        resolve: reads the data of a job that joined a running process.
        at: see `Checkpoints`.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
        ConfigError: they belong to another run; says what has changed.
    """
    notices: list[str] = []
    own = Checkpoints(
        folder.checkpoints,
        keep_last=max(job.config.save.keep_last for job in jobs),
        keep_best=max(job.config.save.keep_best for job in jobs),
        say=notices.append,
        at=at,
    )
    if resume == "never":
        if folder.remove_run():
            notices.append(f"--resume never: removed the run that was in {folder.path}")
        own.prepare()
        return Saved(config, tuple(jobs), own, notices=tuple(notices))
    source = Path(os.path.abspath(resume))  # also where it is said from inside: `.`, `..`, `5`
    restored = own.restore() if resume == "auto" else _restore_from(source, notices)
    if restored is None:
        own.prepare()
        own.sweep()
        return Saved(config, tuple(jobs), own)
    config, jobs = _with_added(restored.progress, config, jobs, resolve)
    joined = check_same_run(restored.progress, config, base, jobs)
    try:
        plan = from_json(restored.progress["plan"])
    except PlanError as error:
        raise CheckpointError(f"checkpoint {restored.step}: {error}") from error
    if resume != "auto":
        _adopt_files(source, folder)
    own.prepare()
    own.sweep()
    own.discard_after(restored.step)
    saved = Saved(config, tuple(jobs), own, restored, plan, tuple(joined))
    notices.append(f"going on after microbatch {saved.cursor} of {len(plan.microbatches)}")
    notices += [f"{name} joins" for name in joined]
    return replace(saved, notices=tuple(notices))


def _with_added(
    saved: Mapping[str, Any],
    config: RunConfig,
    jobs: Sequence[TrainJob],
    resolve: Callable[[JobConfig], TrainJob],
) -> tuple[RunConfig, Sequence[TrainJob]]:
    """Adds the jobs that joined the process that saved; the user's configuration may lack them."""
    names = {*saved.get("added", ())} - {job.name for job in jobs}
    if not names:
        return config, jobs
    old = _config_of(saved)
    added = [job for job in old.jobs if job.name in names]
    config = config.model_copy(update={"jobs": (*config.jobs, *added)})
    return config, (*jobs, *map(resolve, added))


def _restore_from(path: Path, notices: list[str]) -> Restored:
    """Restores from a run folder or from one checkpoint of it."""
    if (path / "checkpoints").is_dir():
        restored = Checkpoints(path / "checkpoints", say=notices.append).restore()
    elif path.is_dir() and path.name.isdecimal() and path.name.isascii():
        restored = Checkpoints(path.parent, say=notices.append).restore(int(path.name))
    else:
        restored = None
    if restored is None:
        raise ConfigError(
            f"resume={path}: expected auto, never, a run folder with checkpoints, or one of them"
        )
    return restored


def _adopt_files(path: Path, folder: RunFolder) -> None:
    """Copies the metrics and adapters of another run, of which this one is the continuation.

    A checkpoint may also have come alone, without the run's folder around it.
    """
    in_run = path.parent.name == folder.checkpoints.name
    source = path if (path / "checkpoints").is_dir() else path.parent.parent if in_run else None
    if source is not None and source.resolve() == folder.path.resolve():
        return
    if folder.checkpoints.exists():
        raise ConfigError(f"{folder.path} holds a run already: choose another output")
    if source is not None and (source / "jobs").is_dir():
        shutil.copytree(source / "jobs", folder.path / "jobs", dirs_exist_ok=True)


def restore_state(fresh: TrainState, leaves: Leaves, *, joined: bool) -> TrainState:
    """Returns a checkpoint's state, in a larger bank if jobs have joined.

    Args:
        fresh: state of an empty bank for all jobs.
        leaves: of the checkpoint.
        joined: whether slots, rank, modules or optimizers may have been added.

    Raises:
        CheckpointError: the leaves do not fit.
    """
    saved = set(leaves)
    if joined:
        leaves = leaves_of(fresh) | {
            name: _enlarged(name, leaf, new)
            for name, new in leaves_of(fresh).items()
            if (leaf := leaves.get(name)) is not None
        }
    state = jax.tree.map(jax.numpy.asarray, unflatten_like(fresh, leaves))
    # Modules that only a joined job has patterns for: there the others have their usual rank.
    bank = state.bank
    ranks = {
        path: rank if f"bank/ranks/{path}" in saved else jax.numpy.array(bank.rank)
        for path, rank in bank.ranks.items()
    }
    return state._replace(bank=bank._replace(ranks=ranks))


def _enlarged(name: str, leaf: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Puts a leaf into the corner of a larger one of zeros: more slots, a larger rank."""
    if leaf.ndim != new.ndim or any(a > b for a, b in zip(leaf.shape, new.shape, strict=True)):
        raise CheckpointError(f"{name}: {list(leaf.shape)} does not fit {list(new.shape)}")
    larger = np.zeros_like(new)
    larger[tuple(slice(0, size) for size in leaf.shape)] = leaf
    return larger
