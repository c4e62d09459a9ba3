"""Activations and their slopes on float32 values in registers.

Silu follows XLA's instructions for a GPU one by one, so that both give the same bits.
"""

import jax

from pallas_kernels._mgpu_elements import product_sum, sigmoid
from pallas_kernels.activation import Activation

_CUBIC, _SCALE = 0.044715, 1.5957691216057308  # of gelu_tanh; twice the root of 2 / pi


def _factor(value: jax.Array, activation: Activation, layout) -> jax.Array:
    """What the activation multiplies its argument by.

    For gelu_tanh (1 + tanh(u)) / 2 = sigmoid(2u): no less accurate where tanh is close to -1.
    """
    if activation == "silu":
        return sigmoid(value, layout)
    return sigmoid(_SCALE * (value * (1 + _CUBIC * (value * value))), layout)


def activated(value: jax.Array, activation: Activation, layout) -> jax.Array:
    """Applies an activation.

    Args:
        value: in the layout given.
        activation: see `pallas_kernels.activation`.
        layout: of value.
    """
    return _factor(value, activation, layout) * value


def gated_gradients(
    gate: jax.Array, up: jax.Array, dh: jax.Array, activation: Activation, layout
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of gate and up in activation(gate) * up.

    Args:
        gate: pre-activation, in the layout given.
        up: what is gated.
        dh: gradient of the product.
        activation: see `pallas_kernels.activation`.
        layout: of all three.
    """
    factor = _factor(gate, activation, layout)
    wide, slope = dh * up, factor * (1 - factor)
    inner = wide * gate
    if activation == "gelu_tanh":
        inner = inner * (_SCALE * (1 + 3 * _CUBIC * (gate * gate)))
    return product_sum(wide, factor, inner, slope, layout), factor * gate * dh
