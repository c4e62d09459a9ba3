"""The soft cap of logits on a vocabulary that is split over stages."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from lorafusion_jax.parallel import vocabulary
from lorafusion_jax.parallel.mesh import STAGE, make_mesh
from tests.tolerance import assert_error_ratio

ROWS, WIDTH, VOCAB, STAGES, CAP = 16, 12, 29, 2, 1.5


def plain(hidden, head, labels, weight, cap):
    """Losses as the textbook has them."""
    logits = cap * jnp.tanh(hidden @ head.T / cap)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    return -jnp.sum(weight * chosen)


def over_stages(hidden, head, labels, weight, *, slope: bool):
    """Loss and gradient of the hidden states by two stages; without the cap's slope if so asked."""

    def local(hidden, head, labels, weight):
        stage = lax.axis_index(STAGE)
        mine = vocabulary.head_slice(
            hidden, head, labels, jnp.int32(ROWS), stage,
            vocab_size=VOCAB, chunk=8, gradient=True, softcap=CAP,
        )  # fmt: skip
        softmax = vocabulary.softmax_over_stages(mine)
        cap = CAP if slope else None
        part = vocabulary.hidden_gradient(mine, softmax, head, labels, weight, stage, cap)
        return jnp.sum(weight * softmax.loss), lax.psum(part, STAGE)

    rows = vocabulary.padded_vocabulary(VOCAB, STAGES)
    head = jnp.pad(head, [(0, rows - VOCAB), (0, 0)])
    mesh = make_mesh(1, STAGES, num_layers=2)
    specs = (P(), P(STAGE), P(), P())
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(P(), P()), check_vma=False)
    return jax.jit(run)(hidden, head, labels, weight)


def test_losses_and_gradients(rng):
    hidden, head = rng.normal(size=(ROWS, WIDTH)), rng.normal(size=(VOCAB, WIDTH))
    labels, weight = rng.integers(0, VOCAB, ROWS), rng.random(ROWS)
    narrow = [jnp.asarray(x, jnp.float32) for x in (hidden, head)]
    rest = jnp.asarray(labels), jnp.asarray(weight, jnp.float32)
    differentiated = jax.value_and_grad(partial(plain, cap=CAP))
    reference = differentiated(*narrow, *rest)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in narrow]
        truth = differentiated(*wide, rest[0], jnp.asarray(np.asarray(rest[1], np.float64)))
        truth = jax.tree.map(np.asarray, truth)
    ours = over_stages(*narrow, *rest, slope=True)
    assert_error_ratio(ours, reference, truth, floor_ulp=8)
    with pytest.raises(AssertionError, match="error beyond"):
        wrong = over_stages(*narrow, *rest, slope=False)
        assert_error_ratio(wrong, reference, truth, floor_ulp=8)
