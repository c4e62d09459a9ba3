"""What a job gets out of the bank: held-out results, its best adapter so far, its last one."""

import math
from collections.abc import Mapping

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.bank import AdapterBank, read_slot
from lorafusion_jax.lora.peft_io import save_peft
from lorafusion_jax.train.evaluate import BASE, Evaluator
from lorafusion_jax.train.events import Evaluated, JobEnded, Listener, Notice
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.progress import JobProgress
from lorafusion_jax.train.run_folder import RunFolder


class Delivery:
    """Evaluates and exports adapters.

    Args:
        evaluator: of held-out samples.
        base_name: path or name of the base model, for the adapters' configuration.
        folder: where adapters go.
        progress: of each job; results are noted in it.
        listener: told the results.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        base_name: str,
        folder: RunFolder,
        progress: Mapping[str, JobProgress],
        listener: Listener,
    ):
        self._evaluator, self._base_name, self._folder = evaluator, base_name, folder
        self._progress, self._listener = progress, listener

    def evaluate(self, bank: AdapterBank, job: TrainJob, slot: int, microbatch: int) -> None:
        """Evaluates a job, or the base on its samples; the best adapter so far is exported.

        Args:
            bank: the adapters.
            job: whose held-out samples are used.
            slot: of its adapter, or `BASE`.
            microbatch: after which this is, for the record.
        """
        result = self._evaluator(bank, job, slot)
        if result is None:
            return
        progress, best = self._progress[job.name], False
        if slot == BASE:
            progress.base_loss, progress.base_match = result.loss, result.exact_match
        else:
            progress.eval_loss, progress.exact_match = result.loss, result.exact_match
            best = result.loss < (math.inf if progress.best_loss is None else progress.best_loss)
        if best:
            progress.best_loss, progress.best_step = result.loss, progress.step
            self._export(bank, job, slot, "best")
        self._listener(
            Evaluated(
                job=job.name,
                step=progress.step,
                loss=result.loss,
                token_accuracy=result.token_accuracy,
                exact_match=result.exact_match,
                samples=result.samples,
                best=best,
                microbatch=microbatch,
            )
        )

    def end(self, bank: AdapterBank, job: TrainJob, slot: int) -> None:
        """Exports a finished job's adapter; its slot is free from now on."""
        progress = self._progress[job.name]
        self._export(bank, job, slot, "last")
        if progress.best_loss is None:
            self._export(bank, job, slot, "best")
        if progress.status == "training":
            progress.status = "done"
        adapter = str(self._folder.adapter(job.name))
        self._listener(
            JobEnded(job.name, progress.step, progress.status, progress.rejected, adapter)
        )

    def _export(self, bank: AdapterBank, job: TrainJob, slot: int, which: str) -> None:
        adapter, spec = read_slot(bank, slot), job.spec
        try:
            save_peft(self._folder.adapter(job.name, which), adapter, spec, self._base_name)
        except AdapterError as error:  # not finite; the other jobs go on
            self._listener(Notice(f"{job.name}: the {which} adapter is not exported: {error}"))
