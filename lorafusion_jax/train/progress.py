"""How far a job is, beside its arrays."""

from dataclasses import dataclass, field


@dataclass
class JobProgress:
    """What a checkpoint remembers of a job beside its arrays.

    Attributes:
        base_loss, base_match: of the base model on the held-out samples.
        best_loss, best_step: lowest held-out loss so far.
        eval_loss, exact_match: of the last evaluation.
        step: global batches done.
        rejected: global batches rejected as non-finite.
        status: "waiting", "training", "done", "frozen", or why it ended early.
        stop_reference: held-out loss that early stopping compares with.
        stale: evaluations in a row that were not better than it.
        recent: microbatch and loss of the last steps that were applied, for the spike guard.
        spikes: steps skipped as spikes in a row.
    """

    base_loss: float | None = None
    base_match: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    eval_loss: float | None = None
    exact_match: float | None = None
    step: int = 0
    rejected: int = 0
    recent: list[list[float]] = field(default_factory=list)
    spikes: int = 0
    status: str = "waiting"
    stop_reference: float | None = None
    stale: int = 0
