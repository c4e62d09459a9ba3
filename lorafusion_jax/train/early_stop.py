"""When a job ends before its last step: a held-out loss that no longer gets better."""

import math

from lorafusion_jax.config import EarlyStoppingConfig
from lorafusion_jax.train.progress import JobProgress

STOPPED = "stopped early"
"""Status of a job that ended so."""


def note_evaluation(rule: EarlyStoppingConfig | None, progress: JobProgress) -> bool:
    """Counts evaluations without a better loss, and says whether the job shall end.

    A loss is better if it is lower than that of the last better one by more than `min_delta`; one
    that is not a number never is.

    Args:
        rule: of the job; None never ends it.
        progress: of the job, with the loss of the evaluation that was just made.
    """
    if rule is None or progress.eval_loss is None:
        return False
    reference = math.inf if progress.stop_reference is None else progress.stop_reference
    if progress.eval_loss < reference - rule.min_delta:
        progress.stop_reference, progress.stale = progress.eval_loss, 0
    else:
        progress.stale += 1
    return progress.stale >= rule.patience
