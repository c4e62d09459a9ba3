"""Gated activations whose backward pass keeps only what it cannot compute again.

Differentiated by jax, a gated activation keeps five arrays as large as its inputs. Here it keeps
its inputs, which are there anyway. `lora.gated_down` computes the same inside a kernel.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

type Activation = Literal["silu", "gelu_tanh"]

ACTIVATIONS: dict[Activation, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(
    gate: Float[Array, "*batch F"], up: Float[Array, "*batch F"], activation: Activation = "silu"
) -> Float[Array, "*batch F"]:
    """Computes activation(gate) * up in float32; keeps `gate` and `up` for the backward pass.

    Args:
        gate: pre-activation.
        up: what is gated.
        activation: a name in `ACTIVATIONS`.
    """
    return _gated(gate, up, activation)


def _gated(gate, up, activation: Activation):
    acc = jnp.promote_types(gate.dtype, jnp.float32)
    return (ACTIVATIONS[activation](gate.astype(acc)) * up.astype(acc)).astype(gate.dtype)


def _gated_forward(gate, up, activation: Activation):
    return _gated(gate, up, activation), (gate, up)


def gated_gradients(
    gate: Float[Array, "*batch F"],
    up: Float[Array, "*batch F"],
    dout: Float[Array, "*batch F"],
    activation: Activation,
) -> tuple[Float[Array, "*batch F"], Float[Array, "*batch F"]]:
    """Returns the gradients of `gate` and `up` in their dtypes, computed in float32.

    Args:
        gate: pre-activation.
        up: what is gated.
        dout: gradient of `gated(gate, up, activation)`.
        activation: a name in `ACTIVATIONS`.
    """
    acc = jnp.promote_types(gate.dtype, jnp.float32)
    activated, pull = jax.vjp(ACTIVATIONS[activation], gate.astype(acc))
    dout = dout.astype(acc)
    (dgate,) = pull(dout * up.astype(acc))
    return dgate.astype(gate.dtype), (dout * activated).astype(up.dtype)


def _gated_backward(activation: Activation, residuals, dout):
    gate, up = residuals
    return gated_gradients(gate, up, dout, activation)


gated.defvjp(_gated_forward, _gated_backward)
