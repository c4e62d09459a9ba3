"""What `fit` returns: one result per job, with its history and its adapter."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.train.progress import JobProgress
from lorafusion_jax.train.run_folder import RunFolder


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter on disk.

    Attributes:
        path: its PEFT folder.
    """

    path: Path

    def save_peft(self, directory: str | Path) -> Path:
        """Copies the adapter as a PEFT folder.

        Raises:
            AdapterError: the folder exists and is not empty.
        """
        directory = Path(directory)
        if directory.exists() and any(directory.iterdir()):
            raise AdapterError(f"{directory} is not empty: choose a new folder for the adapter")
        shutil.copytree(self.path, directory, dirs_exist_ok=True)
        return directory


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        name: of the job.
        status: "done", or "frozen" where its non-finite policy ended it.
        steps: global batches it took.
        rejected: global batches rejected as non-finite.
        base_eval_loss: held-out loss of the base model; None where nothing is held out, as below.
        best_eval_loss: lowest held-out loss.
        best_step: step it was measured at.
        eval_loss: held-out loss at the end.
        exact_match: share of held-out samples answered exactly at the end.
        history: lines of metrics.jsonl.
        adapter: the best adapter by held-out loss, or the last where nothing is held out.
        last_adapter: the adapter at the end.
    """

    name: str
    status: str
    steps: int
    rejected: int
    base_eval_loss: float | None
    best_eval_loss: float | None
    best_step: int | None
    eval_loss: float | None
    exact_match: float | None
    history: list[dict[str, Any]]
    adapter: TrainedAdapter
    last_adapter: TrainedAdapter


class Results(Mapping[str, JobResult]):
    """Results by job name.

    Attributes:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder, jobs: Mapping[str, JobResult]):
        self.folder, self._jobs = folder, dict(jobs)

    def __getitem__(self, name: str) -> JobResult:
        return self._jobs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._jobs)

    def __len__(self) -> int:
        return len(self._jobs)

    def __repr__(self) -> str:
        """One line for each job."""

        def shown(loss: float | None) -> str:
            return "-" if loss is None else f"{loss:.4g}"

        lines = [
            f"  {job.name}: {job.status} after {job.steps} steps, held-out loss "
            f"{shown(job.base_eval_loss)} -> {shown(job.eval_loss)}"
            for job in self._jobs.values()
        ]
        return "\n".join([f"Results of {self.folder.path}:", *lines])


def collect_results(folder: RunFolder, progress: Mapping[str, JobProgress]) -> Results:
    """Reads the results of a finished run from its folder."""
    jobs = {
        name: JobResult(
            name=name,
            status=done.status,
            steps=done.step,
            rejected=done.rejected,
            base_eval_loss=done.base_loss,
            best_eval_loss=done.best_loss,
            best_step=done.best_step,
            eval_loss=done.eval_loss,
            exact_match=done.exact_match,
            history=folder.metrics(name),
            adapter=TrainedAdapter(folder.adapter(name)),
            last_adapter=TrainedAdapter(folder.adapter(name, "last")),
        )
        for name, done in progress.items()
    }
    return Results(folder, jobs)
