"""Fused element-wise parts: values and gradients against jax, and what they keep."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.models.fused import rms_norm
from pallas_kernels.activation import ACTIVATIONS, gated
from tests.tolerance import assert_error_ratio

SHAPE = (6, 40)


def plain_gated(gate, up, activation):
    return ACTIVATIONS[activation](gate) * up


def plain_norm(x, weight, eps):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * weight.astype(wide.dtype)).astype(x.dtype)


def value_and_gradients(function, args, dout):
    out, pull = jax.vjp(function, *args)
    return out, pull(dout)


def compare(ours, plain, args, dout):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in (*args, dout)]
        truth = jax.tree.map(np.asarray, value_and_gradients(plain, wide[:-1], wide[-1]))
    reference = value_and_gradients(plain, args, dout)
    assert_error_ratio(value_and_gradients(ours, args, dout), reference, truth, floor_ulp=4.0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated(rng, activation, dtype):
    gate, up, dout = (jnp.asarray(rng.normal(size=SHAPE) * 3, dtype) for _ in range(3))
    plain = partial(plain_gated, activation=activation)
    compare(lambda gate, up: gated(gate, up, activation), plain, (gate, up), dout)
    other = "gelu_tanh" if activation == "silu" else "silu"
    with pytest.raises(AssertionError):
        compare(lambda gate, up: gated(gate, up, other), plain, (gate, up), dout)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm(rng, dtype):
    x, dout = (jnp.asarray(rng.normal(size=SHAPE) * 3, dtype) for _ in range(2))
    weight = jnp.asarray(rng.normal(size=SHAPE[1]), dtype)
    compare(
        lambda x: rms_norm(x, weight, 1e-5),
        lambda x: plain_norm(x, weight.astype(x.dtype), 1e-5),
        (x,),
        dout,
    )


def test_float64_stays_float64(rng):
    with jax.enable_x64(True):
        x, dout = (jnp.asarray(rng.normal(size=SHAPE)) for _ in range(2))
        weight = jnp.ones(SHAPE[1])
        out, (dx,) = value_and_gradients(lambda x: rms_norm(x, weight, 1e-6), (x,), dout)
        expected = value_and_gradients(lambda x: plain_norm(x, weight, 1e-6), (x,), dout)
        assert out.dtype == dx.dtype == np.float64
        np.testing.assert_allclose(dx, expected[1][0], atol=1e-15)


def kept_bytes(function, *args) -> int:
    pull = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


def test_keeps_its_inputs_and_nothing_else():
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16)
    size, rows = 64 * 256 * 2, 64 * 4
    weight = jnp.ones(256, jnp.bfloat16)
    assert kept_bytes(gated, x, x) == 2 * size
    assert kept_bytes(lambda x: rms_norm(x, weight, 1e-5), x) == size + rows + 256 * 2
    assert kept_bytes(partial(plain_gated, activation="silu"), x, x) >= 4 * size
    assert kept_bytes(lambda x: plain_norm(x, weight, 1e-5), x) >= 2 * size
