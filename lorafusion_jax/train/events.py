"""What a run tells its listeners. One callable gets every event; the CLI draws them."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class JobSummary:
    """One job as planned.

    Attributes:
        name: of the job.
        steps: optimizer steps.
        samples: training samples of one epoch.
        eval_samples: held-out samples.
        tokens: tokens it will train on, all epochs.
        supervised: share of its tokens that are targets.
        r: rank.
        parameters: trainable parameters.
    """

    name: str
    steps: int
    samples: int
    eval_samples: int
    tokens: int
    supervised: float
    r: int
    parameters: int


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """The plan is made and verified; nothing was compiled yet.

    Attributes:
        jobs: in order of the configuration.
        microbatches: in the whole plan.
        start: first one to run; above 0 for a resumed run.
        capacities: microbatch sizes in tokens.
        tile: padding multiple of a stretch.
        padding: share of rows without a token.
        padding_alone: the same if every job were packed alone.
        slots: adapter slots.
        r_max: largest rank.
        base_bytes: frozen weights.
        adapter_bytes: adapters, moments and gradient accumulators.
    """

    jobs: tuple[JobSummary, ...]
    microbatches: int
    start: int
    capacities: tuple[int, ...]
    tile: int
    padding: float
    padding_alone: float
    slots: int
    r_max: int
    base_bytes: int
    adapter_bytes: int


@dataclass(frozen=True, slots=True)
class Compiling:
    """A program is being compiled; `seconds` and `temp_bytes` are None until it is done.

    Attributes:
        program: "train", "eval" or "update".
        capacity: tokens of the bucket; 0 for "update", which serves all.
        seconds: it took.
        temp_bytes: memory it needs beside its arguments.
    """

    program: str
    capacity: int
    seconds: float | None = None
    temp_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MicrobatchDone:
    """A microbatch was trained.

    Attributes:
        index: in the plan.
        total: microbatches of the plan.
        tokens: real tokens it held.
        capacity: rows it had.
    """

    index: int
    total: int
    tokens: int
    capacity: int


@dataclass(frozen=True, slots=True)
class StepDone:
    """A job's global batch ended.

    Attributes:
        job: name.
        step: global batches done, this one included.
        total: of them all.
        loss: mean over the supervised tokens of the global batch.
        tokens: tokens the job has trained on so far.
        lr: learning rate of the update.
        grad_norm: before clipping.
        applied: False where a non-finite gradient rejected the batch.
        microbatch: index in the plan.
    """

    job: str
    step: int
    total: int
    loss: float
    tokens: int
    lr: float
    grad_norm: float
    applied: bool
    microbatch: int


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A job was evaluated on its held-out samples.

    Attributes:
        job: name.
        step: global batches done; 0 is the base model.
        loss: mean over supervised tokens.
        token_accuracy: share of supervised tokens predicted first.
        exact_match: share of samples that greedy decoding would answer exactly.
        samples: how many there are.
        best: no evaluation of the job was better.
        microbatch: after which it was evaluated; for the base model, before which.
    """

    job: str
    step: int
    loss: float
    token_accuracy: float
    exact_match: float
    samples: int
    best: bool
    microbatch: int


@dataclass(frozen=True, slots=True)
class JobEnded:
    """A job is complete and its adapter exported.

    Attributes:
        job: name.
        step: global batches done.
        status: "done", or "frozen" where the non-finite policy ended it.
        rejected: global batches rejected as non-finite.
        adapter: folder of the PEFT adapter.
    """

    job: str
    step: int
    status: str
    rejected: int
    adapter: str


@dataclass(frozen=True, slots=True)
class CheckpointSaved:
    """A checkpoint is on disk and verified.

    Attributes:
        step: microbatches done.
        seconds: from the copy of the state until it was verified.
        blocked: of them, seconds in which training stood still.
        path: of the checkpoint.
    """

    step: int
    seconds: float
    blocked: float
    path: str


@dataclass(frozen=True, slots=True)
class Notice:
    """Something the user should read: resumed, joined, damaged, rejected, stopped."""

    message: str


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over.

    Attributes:
        seconds: of this process, from planning on.
        tokens: real tokens trained in this process.
        peak_bytes: most device memory used, where the device tells.
        parts: seconds by what they went into (`lorafusion_jax.train.goodput`).
    """

    seconds: float
    tokens: int
    peak_bytes: int | None
    parts: dict[str, float] = field(default_factory=dict)


type Event = (
    RunPlanned
    | Compiling
    | MicrobatchDone
    | StepDone
    | Evaluated
    | JobEnded
    | CheckpointSaved
    | Notice
    | RunEnded
)
type Listener = Callable[[Event], None]
