"""`fused_multi_lora` and `fused_lora`: frozen linears with LoRA, by the best implementation here.

An implementation is a pair of functions with the signatures of `spec.forward` and `spec.backward`.
It says "I can't" by raising `NotImplementedError` with a reason, upon which dispatch goes on to the
next one; `ValueError` says "you may not" and ends the call.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.dropout import MIN_RATE
from pallas_kernels.lora import mosaic_gpu, portable, spec
from pallas_kernels.lora.spec import Outputs, Routing, Smalls, Stacks, Weights

type Implementation = Literal["mosaic_gpu", "mosaic_gpu_portable", "xla"]
type Biases = tuple[Float[Array, " _"] | None, ...]


class _Backend(NamedTuple):
    forward: Callable[..., tuple[Outputs, Smalls]]
    backward: Callable[..., tuple[Array, Stacks, Stacks]]


_BACKENDS: dict[str, _Backend] = {
    "mosaic_gpu": _Backend(mosaic_gpu.forward, mosaic_gpu.backward),
    "mosaic_gpu_portable": _Backend(portable.forward, portable.backward),
    "xla": _Backend(spec.forward, spec.backward),
}
# The portable kernels only when asked for: nobody has measured them yet.
_DEFAULT_ORDER: tuple[str, ...] = ("mosaic_gpu", "xla")


def _call_first(order: tuple[str, ...], which: str, *args):
    """Runs the first backend of `order` that can; gathers the refusals of the others."""
    refusals = []
    for name in order:
        try:
            return getattr(_BACKENDS[name], which)(*args)
        except NotImplementedError as reason:
            reason.add_note(f"implementation {name!r}")
            refusals.append(reason)
    raise ExceptionGroup(f"no implementation of fused_multi_lora {which} can run this", refusals)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multi_lora(
    order: tuple[str, ...],
    x: Float[Array, "T K"],
    ws: Weights,
    a: Stacks,
    b: Stacks,
    biases: Biases,
    routing: Routing,
) -> Outputs:
    return _call_first(order, "forward", x, ws, a, b, biases, routing)[0]


def _multi_lora_fwd(order, x, ws, a, b, biases, routing):
    ys, ss = _call_first(order, "forward", x, ws, a, b, biases, routing)
    return ys, (
        x,
        ws,
        a,
        b,
        ss,
        routing,
    )  # X is shared with the graph; S is [T, R]; no mask, no drop(X)


def _multi_lora_bwd(order, residuals, dys):
    x, ws, a, b, ss, routing = residuals
    dx, da, db = _call_first(order, "backward", x, ws, a, b, ss, routing, dys)
    return dx, None, da, db, None, None  # frozen weights, biases and routing have no gradient


_multi_lora.defvjp(_multi_lora_fwd, _multi_lora_bwd)


def fused_multi_lora(
    x: Float[Array, "T K"],
    ws: tuple[Float[Array, "K _"], ...],
    a: tuple[Float[Array, "E R K"], ...],
    b: tuple[Float[Array, "E R _"], ...],
    scale: Float[Array, " E"],
    rate: Float[Array, " E"],
    tile_adapter: Int[Array, " tiles"],
    row_key: UInt32[Array, " T"],
    site: UInt32[Array, " 1"],
    *,
    biases: tuple[Float[Array, " _"] | None, ...] | None = None,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "T _"], ...]:
    """Computes `Y_i = X W_i (+ bias_i) + s * (drop(X) A_i^T) B_i` for projections that share X.

    Rows are routed to adapter slots by tile. The weights and biases are frozen: they get no
    gradient and no buffer for one. `scale`, `rate` and `site` are traced, so jobs with other values
    do not recompile. Differentiable in x, a and b; saved for the backward pass are X (shared), S
    and the row keys. See `pallas_kernels.lora.spec` for the formulas.

    Args:
        x: input rows.
        ws: frozen weight of each projection, [in, out].
        a: down-projections of each projection and slot, slot axis first, R = r_max rows of which
            an adapter of smaller rank has zeros in the rest. Any float dtype (float32 masters are
            rounded to x's dtype inside; their gradients are float32).
        b: up-projections, [slots, r_max, out].
        scale: LoRA scale per slot.
        rate: dropout rate per slot; 0 or in [1/512, 1).
        tile_adapter: slot of each tile of T / tiles rows, -1 for none.
        row_key: dropout identity per row (`pallas_kernels.dropout.row_keys`); 0 marks a padding
            row, which contributes exactly nothing even if it holds NaN.
        site: 8 * layer + input group; tells the masks of different inputs apart.
        biases: frozen bias of each projection, or None.
        implementation: "mosaic_gpu" (H100, H200), "mosaic_gpu_portable" (their tensor cores and
            others', unmeasured), "xla", or None for the first of "mosaic_gpu" and "xla" that can.

    Returns:
        One [T, out_i] array per projection, in x's dtype.

    Raises:
        ValueError: shapes, dtypes or tiles do not fit together.
        ExceptionGroup: the implementation asked for refused, with its reasons.
    """
    check_operands(x, ws, a, b, tile_adapter)
    if biases is None:
        biases = (None,) * len(ws)
    order = _DEFAULT_ORDER if implementation is None else (implementation,)
    for name in order:
        if name not in _BACKENDS:
            raise ValueError(f"{implementation=} is unknown: expected one of {sorted(_BACKENDS)}")
    routing = Routing(scale, rate, tile_adapter, row_key, site)
    check_routing(routing, x.shape[0], a[0].shape[0])
    return _multi_lora(order, x, ws, a, b, biases, routing)


def fused_lora(
    x: Float[Array, "*batch K"],
    w: Float[Array, "K N"],
    a: Float[Array, "R K"],
    b: Float[Array, "R N"],
    scale: Float[Array, ""] | float,
    *,
    rate: float = 0.0,
    row_key: UInt32[Array, "*batch"] | None = None,
    site: int = 0,
    bias: Float[Array, " N"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "*batch N"]:
    """Computes `Y = X W (+ bias) + scale * (drop(X) A^T) B` for one adapter and one projection.

    Args:
        x: input, any leading shape.
        w: frozen weight.
        a: down-projection.
        b: up-projection.
        scale: LoRA scale (alpha / r).
        rate: dropout rate on the LoRA branch's input.
        row_key: dropout identity of each row, needed if `rate` > 0.
        site: tells the masks of different inputs apart.
        bias: frozen bias.
        implementation: as in `fused_multi_lora`.

    Returns:
        The output in x's dtype, same leading shape.

    Raises:
        ValueError: `rate` out of range, or `row_key` missing although `rate` > 0.
    """
    if rate and not MIN_RATE <= rate < 1:
        raise ValueError(f"{rate=} must be 0 or in [{MIN_RATE}, 1)")
    if rate and row_key is None:
        raise ValueError(f"{rate=} needs row_key: a dropout identity for every row of x")
    rows = x.reshape(-1, x.shape[-1])
    keys = jnp.ones(rows.shape[0], jnp.uint32) if row_key is None else row_key.reshape(-1)
    (y,) = fused_multi_lora(
        rows,
        (w,),
        (a[None],),
        (b[None],),
        jnp.asarray(scale, jnp.float32).reshape(1),
        jnp.full((1,), rate, jnp.float32),
        jnp.zeros((1,), jnp.int32),
        keys,
        jnp.full((1,), site, jnp.uint32),
        biases=(bias,),
        implementation=implementation,
    )
    return y.reshape(*x.shape[:-1], w.shape[1])


def check_routing(routing: Routing, rows: int, slots: int) -> None:
    """Raises ValueError for a routing that does not fit so many rows and slots."""
    for name, shape in (
        ("scale", (slots,)),
        ("rate", (slots,)),
        ("row_key", (rows,)),
        ("site", (1,)),
    ):
        got = getattr(routing, name).shape
        if got != shape:
            raise ValueError(f"{name}.shape={got}, expected {shape}")
    for name in ("row_key", "site"):
        if getattr(routing, name).dtype != jnp.uint32:
            raise ValueError(f"{name}.dtype={getattr(routing, name).dtype}, expected uint32")
    if not jnp.issubdtype(routing.tile_adapter.dtype, jnp.integer):
        raise ValueError(f"tile_adapter.dtype={routing.tile_adapter.dtype}, expected an integer")


def check_operands(x, ws, a, b, tile_adapter) -> None:
    """Raises ValueError where shapes, dtypes or tiles do not fit together."""
    if not len(ws) == len(a) == len(b) > 0:
        raise ValueError(
            f"ws, a and b need one entry per projection: got {len(ws)}, {len(a)} and {len(b)}"
        )
    spec.rows_per_tile(x.shape[0], tile_adapter.shape[0])
    for i, (w, a_i, b_i) in enumerate(zip(ws, a, b, strict=True)):
        if w.shape[0] != x.shape[1]:
            raise ValueError(f"ws[{i}].shape={w.shape} does not fit x.shape={x.shape}")
        if w.dtype != x.dtype:
            raise ValueError(f"ws[{i}].dtype={w.dtype} differs from x.dtype={x.dtype}")
        if a_i.shape[2] != w.shape[0] or b_i.shape[2] != w.shape[1]:
            raise ValueError(f"a[{i}] {a_i.shape} and b[{i}] {b_i.shape} do not fit w {w.shape}")
        if a_i.shape[:2] != b_i.shape[:2]:
            raise ValueError(f"a[{i}] {a_i.shape} and b[{i}] {b_i.shape} differ in slots or rank")
