"""dX = dX' + the gradient of a root-mean-square norm, from one read of all that it takes.

Memory bound. XLA reads X and dY twice, as the sum over a row must be known before the row is
written; here one warpgroup holds a whole row in registers.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu

_ROWS = 4  # per block, which reads the weight once
_LANES = 128
_MOST_COLUMNS = 8192  # three rows of which still fit into registers


def refusal(x: Float[Array, "T K"]) -> str | None:
    """Returns why the kernel does not take rows like these, or None.

    Args:
        x: input of the norm.
    """
    if not mgpu.targets_hopper():
        return "it needs a GPU of compute capability 9.0"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {x.dtype}"
    if not x.shape[0] or x.shape[1] > _MOST_COLUMNS or not _vector(x.shape[1]):
        return f"it takes rows of up to {_MOST_COLUMNS} columns in 256s, not {x.shape}"
    return None


def _vector(columns: int) -> int | None:
    """How many neighbours a thread loads at once."""
    return next((n for n in (8, 4, 2) if columns % (n * _LANES) == 0), None)


@mgpu.traced_once
def norm_grad(
    x: Float[Array, "T K"],
    dy: Float[Array, "T K"],
    beside: Float[Array, "T K"],
    weight: Float[Array, " K"],
    eps: float,
    offset: float = 0.0,
) -> Float[Array, "T K"]:
    """Returns the gradient of x in `x * weight / sqrt(mean(x ** 2) + eps)` and beside it.

    Args:
        x: input of the norm; `refusal` says which.
        dy: gradient of its output.
        beside: gradient of x by other ways, in x's dtype.
        weight: of the norm, in any float dtype; float32 once it is loaded.
        eps: added to the mean square.
        offset: added to the weight.
    """
    num_rows, k = x.shape
    layout = mgpu.Layout.WG_STRIDED((k,), vec_size=_vector(k))

    def body(x_g, dy_g, beside_g, weight_g, out_g):
        first = jax.lax.axis_index("rows") * _ROWS

        def load(ref):
            return mgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

        weight = load(weight_g) + offset

        @mgpu.pl.loop(first, jnp.minimum(first + _ROWS, num_rows))
        def _(row):
            x, dy, beside = (load(ref.at[row]) for ref in (x_g, dy_g, beside_g))
            inverse = jax.lax.rsqrt(jnp.sum(x * x) * (1 / k) + eps)
            normed, dnormed = x * inverse, dy * weight
            shared = jnp.sum(dnormed * normed) * (1 / k)
            out_g[row] = (beside + (dnormed - normed * shared) * inverse).astype(out_g.dtype)

    return mgpu.launch_simple(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(-(-num_rows // _ROWS),),
        grid_names=("rows",),
        name="norm_grad",
    )(x, dy, beside, weight)
