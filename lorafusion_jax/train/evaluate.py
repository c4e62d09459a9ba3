"""Held-out loss and exact match of adapters, or of the base model, over packed samples."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lorafusion_jax.lora.bank import AdapterBank
from lorafusion_jax.train.batch import JobRows, RowOwner, pack, segment_bucket
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.loss import TokenLosses
from lorafusion_jax.train.step import Programs
from lorafusion_sched import Microbatch, Problem, plan

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


def plan_evaluation(
    jobs: Sequence[TrainJob], capacities: tuple[int, ...], tile: int
) -> tuple[Microbatch, ...]:
    """Packs the held-out samples of jobs into microbatches."""
    plans = tuple(job.eval_plan() for job in jobs if job.eval_indices)
    return plan(Problem(jobs=plans, capacities=capacities, tile=tile)).microbatches


def evaluate(
    programs: Programs,
    bank: AdapterBank,
    jobs: Sequence[TrainJob],
    slots: Mapping[str, int],
    microbatches: Sequence[Microbatch],
    *,
    tile: int,
) -> dict[str, EvalResult]:
    """Evaluates jobs on their held-out samples.

    Args:
        programs: compiled steps.
        bank: adapters.
        jobs: jobs that `microbatches` hold.
        slots: slot of each job, `BASE` for the base model.
        microbatches: from `plan_evaluation`.
        tile: rows per tile.

    Returns:
        Results of the jobs that have held-out samples, by name.
    """
    rows = {job.name: JobRows(slots[job.name], job.seed, job.eval_samples) for job in jobs}
    num_slots, max_segments = bank.rank.shape[0], segment_bucket(microbatches)
    found: dict[str, list[tuple[float, int, int]]] = {}
    for microbatch in microbatches:
        batch, owners = pack(
            microbatch, rows, tile=tile, num_slots=num_slots, max_segments=max_segments
        )
        losses = programs.evaluate(bank, batch)
        _collect(found, losses, batch.loss_weight != 0, owners)  # pyright: ignore[reportArgumentType]
    return {job.name: _summary(found[job.name]) for job in jobs if job.name in found}


def _collect(
    found: dict[str, list[tuple[float, int, int]]],
    losses: TokenLosses,
    supervised: np.ndarray,
    owners: Sequence[RowOwner],
) -> None:
    """Adds (loss, supervised tokens, right tokens) of each sample."""
    weighted = np.asarray(losses.weighted, np.float64)
    correct = np.asarray(losses.correct) & supervised
    for owner in owners:
        span = slice(owner.start, owner.stop)
        counts = int(supervised[span].sum()), int(correct[span].sum())
        found.setdefault(owner.job, []).append((float(weighted[span].sum()), *counts))


def _summary(samples: list[tuple[float, int, int]]) -> EvalResult:
    tokens = sum(count for _, count, _ in samples)
    return EvalResult(
        loss=sum(loss for loss, _, _ in samples) / tokens,
        token_accuracy=sum(right for _, _, right in samples) / tokens,
        exact_match=sum(right == count for _, count, right in samples) / len(samples),
        tokens=tokens,
        samples=len(samples),
    )
