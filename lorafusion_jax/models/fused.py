"""Element-wise parts of a layer whose backward pass keeps only what it cannot compute again.

Differentiated by jax, a gated activation keeps five arrays as large as its inputs and a norm keeps
its input in float32. Here they keep their inputs, which are there anyway, and one number per row.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.activation import ACTIVATIONS as ACTIVATIONS
from pallas_kernels.activation import gated as gated


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(
    x: Float[Array, "*batch d"], weight: Float[Array, " d"], eps: float
) -> Float[Array, "*batch d"]:
    """Divides by the root mean square and multiplies by `weight`, all in float32.

    Args:
        x: input; kept for the backward pass, together with one float32 per row.
        weight: frozen, without gradient; any offset (such as Gemma's 1) already added.
        eps: added to the mean square.
    """
    return _rms_norm_forward(x, weight, eps)[0]


def _rms_norm_forward(x, weight, eps: float):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    out = wide * inverse * weight.astype(wide.dtype)
    return out.astype(x.dtype), (x, weight, inverse)


def _rms_norm_backward(eps: float, residuals, dout):
    x, weight, inverse = residuals
    normed = x.astype(inverse.dtype) * inverse
    dnormed = dout.astype(inverse.dtype) * weight.astype(inverse.dtype)
    shared = jnp.mean(dnormed * normed, axis=-1, keepdims=True)
    return ((dnormed - normed * shared) * inverse).astype(x.dtype), None


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)
