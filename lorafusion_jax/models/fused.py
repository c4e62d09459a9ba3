"""Norms whose backward pass keeps only what it cannot compute again.

Differentiated by jax, a norm keeps its input in float32. Here it keeps the input, which is there
anyway, and one number per row. The gated activation of its kind is in `pallas_kernels.activation`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.norm_grad import norm_grad, refusal


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


def norm_gradient(
    x: Float[Array, "*batch d"],
    weight: Float[Array, " d"],
    inverse: Float[Array, "*batch 1"],
    dout: Float[Array, "*batch d"],
) -> Float[Array, "*batch d"]:
    """Returns the gradient of x, computed in the dtype of `inverse`.

    Args:
        x: see `rms_norm`.
        weight: see `rms_norm`.
        inverse: one over the root mean square of each row.
        dout: gradient of the output.
    """
    normed = x.astype(inverse.dtype) * inverse
    dnormed = dout.astype(inverse.dtype) * weight.astype(inverse.dtype)
    shared = jnp.mean(dnormed * normed, axis=-1, keepdims=True)
    return ((dnormed - normed * shared) * inverse).astype(x.dtype)


def _rms_norm_backward(eps: float, residuals, dout):
    x, weight, inverse = residuals
    return norm_gradient(x, weight, inverse, dout), None


rms_norm.defvjp(_rms_norm_forward, _rms_norm_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def norm_beside(
    x: Float[Array, "T d"], weight: Float[Array, " d"], eps: float, offset: float = 0.0
) -> tuple[Float[Array, "T d"], Float[Array, "T d"]]:
    """Returns x and its norm, for a residual stream that goes on beside the norm.

    The backward pass adds up both gradients of x; on a Hopper GPU in one kernel that reads each
    row once, and then x is all that is kept.

    Args:
        x: see `rms_norm`.
        weight: frozen, without gradient.
        eps: added to the mean square.
        offset: added to the weight in float32, such as Gemma's 1.
    """
    return _norm_beside_forward(x, weight, eps, offset)[0]


def _norm_beside_forward(x, weight, eps: float, offset: float):
    factor = offset + weight.astype(jnp.promote_types(x.dtype, jnp.float32))
    out, (_, _, inverse) = _rms_norm_forward(x, factor, eps)
    return (x, out), (x, weight, inverse if refusal(x) else None)


def _norm_beside_backward(eps: float, offset: float, residuals, cotangents):
    (beside, dout), (x, weight, inverse) = cotangents, residuals
    if inverse is None:
        return norm_grad(x, dout, beside, weight, eps, offset), None
    return beside + norm_gradient(x, offset + weight.astype(inverse.dtype), inverse, dout), None


norm_beside.defvjp(_norm_beside_forward, _norm_beside_backward)
