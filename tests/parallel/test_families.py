"""What families differ in, through the pipeline: windows and rotary bases, caps, scales, norms."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from lorafusion_sched import plan
from tests.parallel.conftest import sum_of_ranks
from tests.parallel.mix import (
    CONFIG,
    Mix,
    OnMesh,
    first_batches,
    first_state,
    tiny_base,
    train_one_device,
    wide,
)
from tests.tolerance import assert_error_ratio

MIX = Mix(1)
# Gemma 3 with Gemma 2's caps; on two stages each place holds a sliding and another layer.
FAMILY = replace(
    CONFIG,
    qk_norm=True,
    norm_offset=1.0,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=32**0.5,
    attention_scale=0.4,
    attention_softcap=1.5,
    logit_softcap=2.0,
    sliding_window=5,
    sliding_layers=(True, False, False, True),
    local_rope_theta=50.0,
)


def vectors(grads):
    return {
        side: np.concatenate([np.asarray(x).reshape(len(MIX.jobs), -1) for x in leaves.values()], 1)
        for side, leaves in grads.items()
    }


@pytest.mark.slow
def test_gradients_equal_one_device():
    base = tiny_base(FAMILY)
    whole = first_batches(plan(MIX.problem(distance=8, clock="fbh")))
    start = jax.device_get(first_state(base, MIX)[2])
    reference = train_one_device(base, MIX, whole)[0].grads
    with jax.enable_x64(True):
        truth = train_one_device(base, MIX, whole, wide)[0].grads
    on = OnMesh(base, MIX, data=1, stage=2)
    state = on.run(on.start(start), on.slots(first_batches(on.plan())))[0]
    grads = vectors(sum_of_ranks(on.finish(state).grads))
    assert_error_ratio(grads, vectors(reference), vectors(truth))
    other = tiny_base(replace(FAMILY, sliding_layers=(False, True, True, False)))
    with pytest.raises(AssertionError, match="error beyond"):
        wrong = vectors(train_one_device(other, MIX, whole)[0].grads)
        assert_error_ratio(wrong, vectors(reference), vectors(truth))
