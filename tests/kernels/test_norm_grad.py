"""The gradient of a norm beside its residual stream, in the interpreter and on a Hopper GPU."""

from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.models.fused import norm_beside, rms_norm
from pallas_kernels import _mgpu
from pallas_kernels.norm_grad import norm_grad, refusal
from tests.tolerance import assert_bit_equal, assert_error_ratio

EPS = 1e-5


def operands(rng, rows, columns, dtype=jnp.bfloat16):
    """x, dy, the gradient beside, and the weight, which has the model's dtype."""
    x, dy, beside = (jnp.asarray(rng.normal(size=(rows, columns)), dtype) for _ in range(3))
    weight = jnp.asarray(rng.normal(size=columns) + 1, dtype)
    return x, dy, beside, weight


def plain(x, dy, beside, weight):
    """What XLA is given elsewhere."""
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))

    def both(x):
        return x, rms_norm(x, weight, EPS)

    return jax.vjp(both, x)[1]((beside, dy))[0]


def truth(operands):
    with jax.enable_x64(True):
        return np.asarray(plain(*(jnp.asarray(np.asarray(x, np.float64)) for x in operands)))


def check(found, given):
    assert_error_ratio(found, plain(*given), truth(given), floor_ulp=1.0)


@pytest.mark.parametrize(
    ("rows", "columns", "dtype"), [(9, 1024, jnp.bfloat16), (4, 768, jnp.float16)]
)
def test_in_the_interpreter(rng, rows, columns, dtype):
    given = operands(rng, rows, columns, dtype)
    with _mgpu.interpret():
        assert refusal(given[0]) is None
        found, other = norm_grad(*given, EPS), norm_grad(*given[:-1], 1.01 * given[-1], EPS)
    check(found, given)
    with pytest.raises(AssertionError, match="error beyond"):
        check(other, given)


def test_a_row_knows_nothing_of_others(rng):
    given = operands(rng, 6, 256)
    poisoned = [x.at[3].set(jnp.nan) for x in given[:3]]
    with _mgpu.interpret():
        clean, dirty = norm_grad(*given, EPS), norm_grad(*poisoned, given[3], EPS)
    kept = np.arange(6) != 3
    assert_bit_equal(dirty[kept], clean[kept])
    assert np.isnan(dirty[3]).all()


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((8, 576), jnp.bfloat16, "in 256s"),
        ((8, 16384), jnp.bfloat16, "up to 8192"),
        ((0, 512), jnp.bfloat16, "in 256s"),
        ((8, 512), jnp.float32, "not float32"),
    ],
)
def test_refusals(shape, dtype, reason):
    assert "compute capability 9.0" in refusal(jnp.zeros(shape, dtype))
    with _mgpu.lower_for(_mgpu.HOPPER):
        assert reason in refusal(jnp.zeros(shape, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("interpreted", [False, True])
def test_beside_a_stream_it_is_a_norm(rng, dtype, interpreted):
    """Values and gradients, by XLA and, where the kernel takes the dtype, by it."""
    x, dy, beside, weight = given = operands(rng, 5, 512, dtype)
    with _mgpu.interpret() if interpreted else nullcontext():
        (same, out), pull = jax.vjp(lambda x: norm_beside(x, weight - 1, EPS, 1.0), x)
        (dx,) = pull((beside, dy))
    if interpreted and dtype == jnp.bfloat16:
        check(dx, given)
        assert sum(leaf.nbytes for leaf in jax.tree.leaves(pull)) <= x.nbytes + weight.nbytes + 64
        return
    factor = 1 + (weight - 1)
    assert_bit_equal((same, out), (x, rms_norm(x, factor, EPS)))
    assert_bit_equal(dx, plain(*given[:3], factor))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 4096), (1001, 5120), (64, 8192), (8, 256), (40, 768)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_on_a_gpu(rng, shape, dtype):
    given = operands(rng, *shape, dtype)
    if refusal(given[0]):
        pytest.skip("needs a CUDA device")
    compiled = jax.jit(partial(norm_grad, eps=EPS))
    found = compiled(*given)
    check(found, given)
    for _ in range(20):
        assert_bit_equal(compiled(*given), found)
    shifted = jax.jit(partial(norm_grad, eps=EPS, offset=1.0))(*given)
    check(shifted, (*given[:3], 1 + given[3].astype(jnp.float32)))
