"""A norm whose backward pass keeps only what it cannot compute again.

Differentiated by jax, it keeps its input in float32. Here it keeps the input, which is there
anyway, and one number per row. The gated activation of its kind is in `pallas_kernels.activation`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
