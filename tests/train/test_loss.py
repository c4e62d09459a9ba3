from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.train.loss import sum_by_slot, token_losses
from tests.tolerance import assert_bit_equal, assert_error_ratio

ROWS, WIDTH, VOCAB = 50, 24, 130


def problem(rng, dtype=np.float64):
    hidden = rng.normal(size=(ROWS, WIDTH)).astype(dtype)
    head = (rng.normal(size=(VOCAB, WIDTH)) * 0.5).astype(dtype)
    labels = rng.integers(0, VOCAB, ROWS).astype(np.int32)
    weight = np.where(rng.random(ROWS) < 0.5, rng.random(ROWS), 0).astype(np.float32)
    return hidden, head, labels, weight


def naive(hidden, head, labels, weight, softcap=None):
    """All logits at once, differentiated by jax."""
    acc = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.matmul(hidden, head.T, preferred_element_type=acc)
    log_p = jax.nn.log_softmax(logits if softcap is None else softcap * jnp.tanh(logits / softcap))
    picked = jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0]
    return jnp.where(weight > 0, -picked * weight.astype(acc), 0).sum()


def chunked(hidden, head, labels, weight, chunk=16, softcap=None):
    return token_losses(hidden, head, labels, weight, chunk, softcap).weighted.sum()


def loss_and_gradient(f, hidden, head, labels, weight):
    arrays = [jnp.asarray(x) for x in (hidden, head, labels, weight)]
    loss, gradient = jax.value_and_grad(f)(*arrays)
    return {"loss": np.asarray(loss), "gradient": np.asarray(gradient)}


@pytest.mark.parametrize("chunk", [1, 7, 16, 50, 64])
def test_equals_the_naive_loss(rng, chunk):
    exact = problem(rng)
    single = [x.astype(np.float32) if x.dtype == np.float64 else x for x in exact]
    with jax.enable_x64(True):
        truth = loss_and_gradient(
            naive,
            *[x.astype(np.float64) if x.dtype == np.float32 and x.ndim == 2 else x for x in single],
        )
    ours = loss_and_gradient(lambda *args: chunked(*args, chunk=chunk), *single)
    assert_error_ratio(ours, loss_and_gradient(naive, *single), truth, factor=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16])
def test_soft_cap_of_the_logits(rng, dtype):
    hidden, head, labels, weight = problem(rng)
    capped, plain = partial(naive, softcap=1.5), partial(naive, softcap=None)
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x, dtype) for x in (hidden, head)]
        wide = [jnp.asarray(x, jnp.float64) for x in inputs]
        truth = loss_and_gradient(capped, *wide, labels, weight)
        ours = loss_and_gradient(partial(chunked, softcap=1.5), *inputs, labels, weight)
        reference = loss_and_gradient(capped, *inputs, labels, weight)
        assert_error_ratio(ours, reference, truth, factor=2, floor_ulp=4)
        with pytest.raises(AssertionError):  # a cap that is not applied would be seen
            assert_error_ratio(loss_and_gradient(plain, *inputs, labels, weight), reference, truth)


def test_float64_is_exact(rng):
    with jax.enable_x64(True):
        inputs = problem(rng)
        ours, exact = loss_and_gradient(chunked, *inputs), loss_and_gradient(naive, *inputs)
    assert ours["gradient"].dtype == np.float64
    np.testing.assert_allclose(ours["loss"], exact["loss"], rtol=1e-14)
    np.testing.assert_allclose(ours["gradient"], exact["gradient"], atol=1e-15)


def test_temporary_memory_is_that_of_a_chunk():
    """Of the compiled program: a chunk of logits or a few, while the naive loss holds them all."""
    rows, width, vocab, chunk = 2048, 64, 4096, 128
    shapes = [
        jax.ShapeDtypeStruct(*s)
        for s in (
            ((rows, width), jnp.float32),
            ((vocab, width), jnp.float32),
            ((rows,), jnp.int32),
            ((rows,), jnp.float32),
        )
    ]

    def temporary(loss):
        compiled = jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(partial(chunked, chunk=chunk)) < 4 * chunk * vocab * 4
    assert temporary(naive) > rows * vocab * 4


def test_a_wrong_gradient_is_caught(rng):
    exact = problem(rng)
    single = [x.astype(np.float32) if x.dtype == np.float64 else x for x in exact]
    right = loss_and_gradient(naive, *single)
    wrong = {**right, "gradient": right["gradient"] * 1.0001}
    with pytest.raises(AssertionError):
        assert_error_ratio(wrong, right, right, factor=2)


def test_bfloat16_stays_within_twice_the_naive_error(rng):
    hidden, head, labels, weight = problem(rng, np.float32)
    rounded = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16), labels, weight
    wide = [jnp.asarray(x, jnp.float32) for x in rounded[:2]]
    truth = loss_and_gradient(naive, *wide, labels, weight)
    assert_error_ratio(
        loss_and_gradient(chunked, *rounded), loss_and_gradient(naive, *rounded), truth, factor=2
    )


def test_rows_without_weight_contribute_nothing_even_if_nan(rng):
    hidden, head, labels, weight = problem(rng, np.float32)
    clean = loss_and_gradient(chunked, hidden, head, labels, weight)
    poisoned = np.where(weight[:, None] == 0, np.nan, hidden).astype(np.float32)
    dirty = loss_and_gradient(chunked, poisoned, head, labels, weight)
    assert_bit_equal(dirty, clean)
    assert (dirty["gradient"][weight == 0] == 0).all()


def test_multiplying_by_the_weight_instead_would_not_do(rng):
    hidden, head, labels, weight = problem(rng, np.float32)
    poisoned = np.where(weight[:, None] == 0, np.nan, hidden).astype(np.float32)

    def by_multiplication(hidden, head, labels, weight):
        log_p = jax.nn.log_softmax(hidden @ head.T)
        return (-jnp.take_along_axis(log_p, labels[:, None], axis=1)[:, 0] * weight).sum()

    assert np.isnan(loss_and_gradient(by_multiplication, poisoned, head, labels, weight)["loss"])


def test_a_row_does_not_see_the_others(rng):
    hidden, head, labels, weight = problem(rng, np.float32)
    other = hidden.copy()
    mine = np.arange(ROWS) < 20
    other[~mine] = np.inf
    a = loss_and_gradient(chunked, hidden, head, labels, weight)["gradient"]
    b = loss_and_gradient(chunked, other, head, labels, weight)["gradient"]
    assert_bit_equal(a[mine], b[mine])
    assert not np.isfinite(b[~mine & (weight > 0)]).any()


def test_correct_is_the_arg_max(rng):
    hidden, head, labels, weight = problem(rng, np.float32)
    best = (hidden @ head.T).argmax(axis=1)
    labels = np.where(np.arange(ROWS) % 2, best, (best + 1) % VOCAB).astype(np.int32)
    arrays = [jnp.asarray(x) for x in (hidden, head, labels, weight)]
    correct = np.asarray(token_losses(*arrays, 16).correct)
    assert (correct == ((np.arange(ROWS) % 2 == 1) & (weight > 0))).all()


def every_shape(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in jax.tree.leaves(
            eqn.params, is_leaf=lambda x: isinstance(x, jax.extend.core.ClosedJaxpr)
        ):
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from every_shape(value.jaxpr)


@pytest.mark.scenario("C9")
def test_neither_all_logits_nor_a_gradient_of_the_head_exist(rng):
    arrays = [jnp.asarray(x) for x in problem(rng, np.float32)]
    shapes = set(every_shape(jax.make_jaxpr(jax.grad(chunked))(*arrays).jaxpr))
    assert (16, VOCAB) in shapes  # what we look for would be seen
    assert (ROWS, VOCAB) not in shapes
    assert (VOCAB, WIDTH) not in shapes
    naive_shapes = set(every_shape(jax.make_jaxpr(jax.grad(naive))(*arrays).jaxpr))
    assert (ROWS, VOCAB) in naive_shapes


def test_sums_by_slot_keep_nan_in_its_slot():
    rows = jnp.asarray([1.0, 2.0, np.nan, 4.0, 5.0, 6.0, 7.0, 8.0])
    sums = sum_by_slot(rows, jnp.asarray([0, 2, 0, -1]), 3)
    assert sums[0] == 1 + 2 + 5 + 6 and np.isnan(sums[2]) and sums[1] == 0
