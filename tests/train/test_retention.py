"""What retention removes: a property of every policy and history."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorafusion_jax.train.retention import to_remove

HISTORIES = st.lists(
    st.tuples(st.booleans(), st.none() | st.floats(0, 10)), min_size=1, max_size=12
)


@pytest.mark.scenario("A10")
@given(HISTORIES, st.integers(1, 4), st.integers(0, 3))
def test_a_verified_step_always_stays_and_the_newest_and_best_do(history, keep_last, keep_best):
    steps = list(range(0, 10 * len(history), 10))
    verified = {s for s, (whole, _) in zip(steps, history, strict=True) if whole}
    scores = {s: x for s, (_, x) in zip(steps, history, strict=True) if x is not None}
    policy = {"keep_last": keep_last, "keep_best": keep_best}
    gone = to_remove(steps, verified=verified, scores=scores, **policy)
    kept = [step for step in steps if step not in gone]
    assert kept[-keep_last:] == steps[-keep_last:]
    assert bool(verified & {*kept}) == bool(verified)
    assert all(any(step < newer for newer in verified & {*kept}) for step in gone)
    better = sorted(scores, key=lambda s: (scores[s], s))[:keep_best]
    assert not {*better} & {*gone}
    if verified == {*steps}:  # nothing is kept without a reason
        assert len(kept) <= keep_last + keep_best


@pytest.mark.scenario("A10")
def test_keeping_the_newest_only_would_lose_the_verified_one():
    """The twin: what a policy that counts alone would do."""
    steps, verified = [1, 2, 3], {1}
    counted = steps[:-2]
    assert verified & {*counted}
    assert to_remove(steps, verified=verified, scores={}, keep_last=2, keep_best=0) == []
