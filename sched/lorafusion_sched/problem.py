"""The packing problem in words and types.

Several jobs fine-tune adapters of one base model. A *job* is a list of *global batches*; a global
batch is a list of *samples* whose gradients make one optimizer step. A *microbatch* is one static
row of `capacity` tokens that one forward and backward processes. It may hold samples of several
jobs, but of each job samples of one global batch only. In a microbatch the samples of a job are
contiguous, a *stretch*, and each stretch is padded to a multiple of `tile` tokens, because the
kernels route adapters tile by tile.

On a pipeline, an optimizer step is seen by forwards that start `distance` slots after the last
microbatch of its global batch; a *slot* is a row of `width` microbatches (data parallelism), and a
microbatch without stretches is a *no-op*.

A *plan* is the ordered list of microbatches. It says where each job's global batch ends.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

type Clock = Literal["1f1b", "bfh", "fbh"]


class PlanError(ValueError):
    """The problem has no plan, or a plan breaks a rule; the message says which and where."""


class Sample(NamedTuple):
    """One training sample of one pass over a job's data.

    Attributes:
        epoch: 0-based pass over the data.
        index: 0-based row in the job's data set.
        length: tokens.
    """

    epoch: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride] (hides tuple.index)
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job: its name and its global batches, in the order in which they must be trained.

    Attributes:
        name: unique in a problem.
        batches: samples of each global batch.
        ready: first slot in which it may train.
        unfinished: the job was cancelled in its last global batch, which therefore never ends.
    """

    name: str
    batches: tuple[tuple[Sample, ...], ...]
    ready: int = 0
    unfinished: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of one microbatch on one pipeline stage, in any unit.

    forward = fixed + per_token * rows + per_square * sum(length^2), and the backward takes
    `backward` times as long. A no-op takes no time.

    Attributes:
        fixed: time per microbatch whatever it holds.
        per_token: time per row.
        per_square: time per squared sample length (attention).
        backward: backward time over forward time; about 1 for LoRA, 2 with recomputation.
        whole_bucket: rows are the microbatch's capacity (static shapes) instead of the rows of its
            padded stretches.
    """

    fixed: float = 0.0
    per_token: float = 1.0
    per_square: float = 0.0
    backward: float = 2.0
    whole_bucket: bool = True

    def __post_init__(self):
        values = (self.fixed, self.per_token, self.per_square, self.backward)
        if not all(0.0 <= value < float("inf") for value in values) or not any(values[:3]):
            raise PlanError(f"cost terms must be finite and not negative, not all 0, got {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What has to be planned.

    Attributes:
        jobs: jobs with unique names.
        capacities: allowed microbatch sizes in tokens, ascending (the buckets; one compilation
            each). Multiples of `tile`.
        tile: padding multiple of each job stretch in tokens.
        distance: slots between the last microbatch of a global batch and the first of the same
            job's next one; 1 means no constraint beyond order.
        width: microbatches per slot (data parallelism).
        max_jobs: jobs per microbatch at most; None is no limit.
        max_active: jobs in training at the same time at most (adapter slots); the others wait, in
            order, and start `distance` slots after one has ended. None is no limit.
        clock: how pipeline stages take turns: "1f1b" (asynchronous, distance = stages), or the
            lockstep engine's "bfh" (distance = 2 stages - 1) and "fbh" (distance = 2 stages).
        cost: time of a microbatch; plans are compared by the time that it predicts.
    """

    jobs: tuple[Job, ...]
    capacities: tuple[int, ...]
    tile: int = 128
    distance: int = 1
    width: int = 1
    max_jobs: int | None = None
    max_active: int | None = None
    clock: Clock = "1f1b"
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self):
        if not self.capacities or list(self.capacities) != sorted(set(self.capacities)):
            raise PlanError(f"capacities={self.capacities} must be ascending and not empty")
        if self.tile < 1 or any(c < 1 or c % self.tile for c in self.capacities):
            raise PlanError(
                f"capacities={self.capacities} must be positive multiples of tile={self.tile}"
            )
        if self.distance < 1 or self.width < 1:
            raise PlanError(f"distance={self.distance} and width={self.width} must be at least 1")
        for limit in ("max_jobs", "max_active"):
            if (value := getattr(self, limit)) is not None and value < 1:
                raise PlanError(f"{limit}={value} must be at least 1, or None for no limit")
        if self.clock not in get_args(Clock.__value__):
            raise PlanError(f"clock={self.clock!r} must be one of {get_args(Clock.__value__)}")
        if self.distance != distance_of(self.clock, self.stages):
            raise PlanError(
                f"distance={self.distance} fits no number of stages of clock {self.clock!r}; take "
                "distance_of(clock, stages)"
            )
        names = [job.name for job in self.jobs]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise PlanError(f"job names must be unique, got twice: {', '.join(twice)}")
        for job in self.jobs:
            for number, batch in enumerate(job.batches):
                if not batch:
                    raise PlanError(f"job {job.name}: global batch {number} has no samples")
                for sample in batch:
                    if not 1 <= sample.length <= self.capacities[-1]:
                        raise PlanError(
                            f"job {job.name}: epoch {sample.epoch}, sample {sample.index} has "
                            f"{sample.length} tokens, expected 1 to {self.capacities[-1]}: "
                            "raise the capacity or truncate the sample"
                        )

    @property
    def stages(self) -> int:
        """Returns the pipeline stages that the distance stands for."""
        if self.clock == "1f1b":
            return self.distance
        return max(1, (self.distance + 1) // 2)


def distance_of(clock: Clock, stages: int) -> int:
    """Returns the slots between two global batches of a job that a pipeline needs.

    Args:
        clock: how stages take turns, see `Problem`.
        stages: pipeline stages.

    >>> [distance_of(clock, 4) for clock in ("1f1b", "bfh", "fbh")]
    [4, 7, 8]
    """
    return {"1f1b": stages, "bfh": 2 * stages - 1, "fbh": 2 * stages}[clock]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The samples of one job in one microbatch, in order.

    Attributes:
        job: name of the job.
        batch: 0-based number of the global batch that all samples belong to.
        samples: the samples, contiguous in the microbatch.
        ends: the job's global batch is complete with this microbatch (for `width` > 1: with this
            microbatch's slot).
    """

    job: str
    batch: int
    samples: tuple[Sample, ...]
    ends: bool

    def tokens(self) -> int:
        """Returns the tokens before padding."""
        return sum(sample.length for sample in self.samples)


@dataclass(frozen=True, slots=True)
class Microbatch:
    """One static row of tokens: its stretches and the capacity it is padded to."""

    stretches: tuple[Stretch, ...]
    capacity: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An ordered list of microbatches; `width` consecutive ones make a slot.

    Attributes:
        microbatches: in order of execution, no-ops included; a multiple of `width`.
        tile: padding multiple it was made for.
        distance: dependency distance it respects, in slots.
        width: microbatches per slot.
    """

    microbatches: tuple[Microbatch, ...]
    tile: int
    distance: int
    width: int


def padded(tokens: int, tile: int) -> int:
    """Returns `tokens` rounded up to a multiple of `tile`.

    >>> padded(129, 128)
    256
    """
    return -(-tokens // tile) * tile


def job_from_lengths(
    name: str, lengths: list[int], *, global_batch_size: int, epochs: int = 1
) -> Job:
    """Returns a job that walks over `lengths` `epochs` times, in order.

    >>> job = job_from_lengths("sql", [30, 20, 50], global_batch_size=2, epochs=2)
    >>> [[sample.length for sample in batch] for batch in job.batches]
    [[30, 20], [50], [30, 20], [50]]
    """
    batches: list[tuple[Sample, ...]] = []
    for epoch in range(epochs):
        samples = [Sample(epoch, index, length) for index, length in enumerate(lengths)]
        for start in range(0, len(samples), global_batch_size):
            batches.append(tuple(samples[start : start + global_batch_size]))
    return Job(name=name, batches=tuple(batches))
