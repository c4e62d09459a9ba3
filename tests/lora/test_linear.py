"""MultiLoRALinear and grouped_linear against the formula, row by row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorafusion_jax.lora.linear import LoraContext, MultiLoRALinear, grouped_linear
from tests.tolerance import assert_bit_equal, assert_error_ratio


def _linear(k, n, seed, *, slots=2, use_bias=False, dtype=None):
    rngs = nnx.Rngs(seed)
    linear = MultiLoRALinear(
        k, n, use_bias=use_bias, num_slots=slots, r_max=4, dtype=dtype, rngs=rngs
    )
    if slots:
        linear.lora_a[...] = jax.random.normal(rngs.params(), (slots, 4, k))
        linear.lora_b[...] = jax.random.normal(rngs.params(), (slots, 4, n))
    if use_bias:
        linear.bias[...] = jax.random.normal(rngs.params(), (n,))
    return linear


def _context(adapters, tile=2):
    return LoraContext(
        scale=jnp.array([0.5, 2.0]),
        rate=jnp.zeros(2),
        tile_adapter=jnp.array(adapters, jnp.int32),
        row_key=jnp.ones(len(adapters) * tile, jnp.uint32),
    )


def _by_hand(linear, x, adapters, tile, dtype=np.float64):
    kernel, a, b = (
        np.asarray(v[...]).astype(dtype) for v in (linear.kernel, linear.lora_a, linear.lora_b)
    )
    y = np.asarray(x).astype(dtype) @ kernel
    if linear.bias is not None:
        y = y + np.asarray(linear.bias[...]).astype(dtype)
    for row in range(x.shape[0]):
        slot = adapters[row // tile]
        if slot >= 0:
            scale = dtype([0.5, 2.0][slot])
            y[row] += scale * (np.asarray(x[row]).astype(dtype) @ a[slot].T @ b[slot])
    return y


def test_rows_get_the_adapter_of_their_tile():
    adapters = [1, -1, 0]
    linear = _linear(8, 6, 0, use_bias=True)
    x = jax.random.normal(jax.random.key(1), (6, 8))
    y = linear(x, _context(adapters))
    truth = _by_hand(linear, x, adapters, 2)
    assert_error_ratio(y, _by_hand(linear, x, adapters, 2, np.float32), truth, 3, floor_ulp=4)


def test_wrong_routing_is_noticed():
    linear = _linear(8, 6, 0)
    x = jax.random.normal(jax.random.key(1), (6, 8))
    wrong = _by_hand(linear, x, [0, -1, 1], 2)
    assert np.abs(np.asarray(linear(x, _context([1, -1, 0]))) - wrong).max() > 0.1


def test_without_context_or_adapters_it_is_nnx_linear():
    linear = _linear(8, 6, 0, use_bias=True)
    plain = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
    plain.kernel[...], plain.bias[...] = linear.kernel[...], linear.bias[...]
    x = jax.random.normal(jax.random.key(1), (3, 2, 8))
    assert_bit_equal(linear(x), plain(x))
    linear.set_stacks(None, None)
    assert_bit_equal(linear(x, _context([1, -1, 0])), plain(x))


def test_rows_without_adapter_equal_the_frozen_output_bit_for_bit():
    linear = _linear(8, 6, 0, use_bias=True)
    x = jax.random.normal(jax.random.key(1), (6, 8))
    assert_bit_equal(linear(x, _context([1, -1, 0]))[2:4], linear(x)[2:4])


def test_grouped_equals_one_by_one_and_skips_untargeted():
    q, k, v = _linear(8, 6, 0), _linear(8, 4, 1, slots=0), _linear(8, 4, 2)
    x = jax.random.normal(jax.random.key(1), (6, 8))
    context = _context([1, -1, 0])
    together = grouped_linear((q, k, v), x, context, 3)
    assert_bit_equal(together, tuple(linear(x, context, 3) for linear in (q, k, v)))
    calls = str(jax.make_jaxpr(lambda x: grouped_linear((q, k, v), x, context))(x))
    plain = calls.count("fwd=_plain_forward")  # k, which has no adapters
    assert (calls.count("custom_vjp_call["), plain) == (2, 1)


def test_bfloat16_computation_keeps_float32_adapters():
    linear = _linear(8, 6, 0, dtype=jnp.bfloat16)
    y = linear(jnp.ones((6, 8)), _context([1, -1, 0]))
    assert y.dtype == jnp.bfloat16 and linear.lora_a.dtype == jnp.float32


@pytest.mark.scenario("C9")
def test_gradients_reach_adapters_only():
    linear = _linear(8, 6, 0)
    context = _context([1, -1, 1])
    x = jax.random.normal(jax.random.key(1), (6, 8))
    gradient = nnx.grad(
        lambda linear: jnp.sum(linear(x, context) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam)
    )(linear)
    assert set(gradient) == {"lora_a", "lora_b"}
    assert not np.any(gradient["lora_a"][...][0]) and np.any(gradient["lora_a"][...][1])


def test_the_plain_linear_keeps_its_dtype_backward():
    """No float32 copy of a bfloat16 kernel, and gradients as of jax's own rule."""
    linear = MultiLoRALinear(
        24, 40, use_bias=True, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    x, dy = (
        jax.random.normal(jax.random.key(i), (16, n), jnp.bfloat16) for i, n in ((1, 24), (2, 40))
    )
    graphdef, state = nnx.split(linear)

    def ours(state, x):
        return nnx.merge(graphdef, state)(x)

    def plain(state, x):
        kernel, bias = (state[name][...].astype(jnp.float32) for name in ("kernel", "bias"))
        return x.astype(jnp.float32) @ kernel + bias

    def gradients(function, dy):
        return jax.vjp(function, state, x)[1](dy)

    text = jax.jit(lambda x, dy: jax.vjp(ours, state, x)[1](dy)[1]).lower(x, dy).as_text()
    assert "xf32>, tensor" not in text  # every product takes bfloat16
    for got, want in zip(
        jax.tree.leaves(gradients(ours, dy)),
        jax.tree.leaves(gradients(plain, dy.astype(jnp.float32))),
        strict=True,
    ):
        np.testing.assert_allclose(np.float32(got), np.float32(want), rtol=2e-2, atol=2e-2)


def test_a_frozen_linear_keeps_nothing_for_its_backward(rng):
    """What is kept fills the rings of a mesh; a trained kernel needs the input (control)."""
    linear = _linear(8, 6, 0, slots=0, use_bias=True)
    graphdef, state = nnx.split(linear)
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)

    def run(x, state):
        return grouped_linear((nnx.merge(graphdef, state),), x)[0]

    def kept(pull):
        return {leaf.shape for leaf in jax.tree.leaves(pull)}

    assert x.shape not in kept(jax.vjp(lambda x: run(x, state), x)[1])
    assert x.shape in kept(jax.vjp(lambda state: run(x, state), state)[1])
