"""Which checkpoints stay: the newest, those of lowest held-out loss, and always a whole one."""

from collections.abc import Collection, Mapping, Sequence


def to_remove(
    steps: Sequence[int],
    *,
    verified: Collection[int],
    scores: Mapping[int, float],
    keep_last: int,
    keep_best: int,
) -> list[int]:
    """Returns the steps that may go, ascending.

    Nothing goes unless a newer step was verified, and what is kept holds a verified step.

    Args:
        steps: that there are, ascending.
        verified: those whose content was checked.
        scores: held-out loss of those that have one.
        keep_last: newest steps to keep, at least 1.
        keep_best: steps of lowest held-out loss to keep.
    """
    if not verified:
        return []
    best = sorted((s for s in steps if s in scores), key=lambda s: (scores[s], s))[:keep_best]
    newest_verified = max(verified)
    kept = {*steps[-keep_last:], *best, newest_verified}
    return [step for step in steps if step not in kept and step < newest_verified]
