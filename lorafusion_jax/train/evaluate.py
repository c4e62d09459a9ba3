"""Held-out loss and exact match of adapters, or of the base model, over packed samples."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from lorafusion_jax.lora.bank import AdapterBank
from lorafusion_jax.train.batch import (
    JobRows,
    PackedBatch,
    RowOwner,
    longest_bucket,
    pack,
    segment_bucket,
)
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.loss import TokenLosses
from lorafusion_sched import Plan, Problem, plan

BASE = -1
"""The slot that stands for the base model without an adapter."""


class EvalResult(NamedTuple):
    """How a model does on held-out samples.

    Attributes:
        loss: mean cross-entropy over supervised tokens.
        token_accuracy: share of supervised tokens that are the model's arg-max.
        exact_match: share of samples whose supervised tokens all are: what greedy decoding would
            answer exactly.
        tokens: supervised tokens.
        samples: held-out samples.
    """

    loss: float
    token_accuracy: float
    exact_match: float
    tokens: int
    samples: int


class EvalPrograms(Protocol):
    """What runs held-out microbatches: one device's programs, or a mesh's."""

    def evaluate_all(
        self, bank: AdapterBank, batches: Sequence[PackedBatch], /
    ) -> Iterable[TokenLosses]:
        """Returns each row's loss and whether its label is the arg-max, per microbatch."""
        ...


class Evaluator:
    """Evaluates one job at a time, so that its result does not depend on the others.

    Args:
        programs: compiled steps.
        jobs: jobs to evaluate; those without held-out samples are left out.
        capacity: tokens per microbatch.
        tile: rows per tile.

    Attributes:
        capacity: see above.
    """

    def __init__(self, programs: EvalPrograms, jobs: Sequence[TrainJob], capacity: int, tile: int):
        self._programs, self._tile, self.capacity = programs, tile, capacity
        self._jobs: list[TrainJob] = []
        self._plans: dict[str, Plan] = {}
        self._segments, self._longest = 1, 1  # the same for all jobs: one program
        for job in jobs:
            self.add(job)

    def add(self, job: TrainJob) -> None:
        """Takes on another job."""
        self._jobs.append(job)
        if job.eval_indices:
            jobs = (job.eval_plan(),)
            answer = plan(Problem(jobs=jobs, capacities=(self.capacity,), tile=self._tile))
            self._plans[job.name] = answer
            self._longest = max(self._longest, longest_bucket(answer.microbatches))
            segments = segment_bucket(answer.microbatches, self._longest)
            self._segments = max(self._segments, segments)

    def __call__(self, bank: AdapterBank, job: TrainJob, slot: int) -> EvalResult | None:
        """Evaluates the adapter in `slot`, or the base model (`BASE`), on a job's held-out samples.

        Returns:
            The result, or None for a job without held-out samples.
        """
        if job.name not in self._plans:
            return None
        found: list[_Sample] = []
        batches, owners = zip(*self._batches(job, slot, bank.rank.shape[0]), strict=True)
        for batch, owner, losses in zip(
            batches, owners, self._programs.evaluate_all(bank, batches), strict=True
        ):
            found += _samples(losses, np.asarray(batch.loss_weight) != 0, owner)
        return _summary(found)

    def example(self, num_slots: int) -> PackedBatch | None:
        """Returns a batch of the shapes that will be evaluated, or None if there is none."""
        job = next((job for job in self._jobs if job.name in self._plans), None)
        return None if job is None else next(self._batches(job, BASE, num_slots))[0]

    def _batches(
        self, job: TrainJob, slot: int, num_slots: int
    ) -> Iterator[tuple[PackedBatch, list[RowOwner]]]:
        rows = {job.name: JobRows(slot, job.seed, job.eval_samples)}
        sizes = {"tile": self._tile, "num_slots": num_slots}
        sizes |= {"max_segments": self._segments, "longest": self._longest}
        for microbatch in self._plans[job.name].microbatches:
            yield pack(microbatch, rows, **sizes)


class _Sample(NamedTuple):
    loss: float
    tokens: int
    right: int


def _samples(
    losses: TokenLosses, supervised: np.ndarray, owners: Sequence[RowOwner]
) -> list[_Sample]:
    weighted = np.asarray(losses.weighted, np.float64)
    correct = np.asarray(losses.correct) & supervised
    spans = [slice(owner.start, owner.stop) for owner in owners]
    return [
        _Sample(float(weighted[s].sum()), int(supervised[s].sum()), int(correct[s].sum()))
        for s in spans
    ]


def _summary(samples: list[_Sample]) -> EvalResult:
    tokens = sum(sample.tokens for sample in samples)
    return EvalResult(
        loss=sum(sample.loss for sample in samples) / tokens,
        token_accuracy=sum(sample.right for sample in samples) / tokens,
        exact_match=sum(sample.right == sample.tokens for sample in samples) / len(samples),
        tokens=tokens,
        samples=len(samples),
    )
