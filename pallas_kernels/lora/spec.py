"""The mathematics of a multi-adapter LoRA linear, in plain XLA: oracle, fallback and CPU path.

    forward    S = s * drop(X) A^T          Y_i = X W_i (+ bias_i) + S_i B_i
    backward   dS_i = s * dY_i B_i^T        dB_i = S_i^T dY_i
               dA_i = dS_i^T drop(X)        dX = sum_i dY_i W_i^T + mask * sum_i dS_i A_i

`drop` multiplies kept elements by 256 / (256 - t) and zeroes the others (see
`pallas_kernels.dropout`); `mask` above includes the same factor. The i run over the projections
that share X: one mask for all.

Legend: T tokens, P tile rows, K in, N out, R rank (padded to r_max), E adapter slots. A is
[E, R, K] and B is [E, R, N], both K-major for the kernels (A is PEFT's lora_A.weight, B its
lora_B.weight transposed). Rows are routed by tile: all P rows of a tile use adapter
`tile_adapter[tile]`, -1 meaning none. Rows with `row_key == 0` are padding: their LoRA branch is
exactly zero and they add exactly nothing to any gradient, even if X or dY hold NaN there.

Products accumulate in float32 (float64 for float64 inputs); S and dS are rounded to X's dtype
before they meet B and A, as in the kernels, where they are operands of the tensor cores.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.dropout import keep_mask, keep_scale


class Routing(NamedTuple):
    """Which adapter a row belongs to, and how that adapter is applied.

    Attributes:
        scale: LoRA scale of each slot (alpha / r).
        rate: dropout rate of each slot.
        tile_adapter: slot of each tile, -1 for none.
        row_key: dropout identity of each row, 0 for padding rows.
        site: which input of the model this is (8 * layer + input group).
    """

    scale: Float[Array, " E"]
    rate: Float[Array, " E"]
    tile_adapter: Int[Array, " tiles"]
    row_key: UInt32[Array, " T"]
    site: UInt32[Array, " 1"]


type Stacks = tuple[Float[Array, "E R _"], ...]
type Weights = tuple[Float[Array, "K _"], ...]
type Outputs = tuple[Float[Array, "T _"], ...]
type Smalls = tuple[Float[Array, "T R"], ...]


def _accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.promote_types(dtype, jnp.float32)


def _row_values(routing: Routing, per_slot: Float[Array, " E"]) -> Float[Array, " T"]:
    """Spreads a per-slot value over the rows; rows without an adapter get 0."""
    rows_per_tile = routing.row_key.shape[0] // max(routing.tile_adapter.shape[0], 1)
    per_tile = jnp.where(routing.tile_adapter >= 0, per_slot[routing.tile_adapter], 0.0)
    return jnp.repeat(per_tile, rows_per_tile, total_repeat_length=routing.row_key.shape[0])


def _live_rows(routing: Routing) -> Array:
    """Rows that have an adapter and are not padding, as a [T, 1] mask."""
    rows_per_tile = routing.row_key.shape[0] // max(routing.tile_adapter.shape[0], 1)
    has_adapter = jnp.repeat(
        routing.tile_adapter >= 0, rows_per_tile, total_repeat_length=routing.row_key.shape[0]
    )
    return (has_adapter & (routing.row_key != 0))[:, None]


def _dropped(x: Float[Array, "T K"], routing: Routing) -> Float[Array, "T K"]:
    """drop(X), with exact zeros in padding rows and in rows without an adapter."""
    rate = _row_values(routing, routing.rate)
    kept = keep_mask(routing.row_key, routing.site, rate, x.shape[1]) & _live_rows(routing)
    acc = _accumulator_dtype(x.dtype)
    # In bfloat16 the factor itself would be off by up to 0.4%, all one way.
    scaled = (x.astype(acc) * keep_scale(rate)[:, None].astype(acc)).astype(x.dtype)
    return jnp.where(kept, scaled, jnp.zeros((), x.dtype))


def _tiles(x: Float[Array, "T C"], num_tiles: int) -> Float[Array, "tiles P C"]:
    return x.reshape(num_tiles, -1, x.shape[1])


def _of_tile(stack: Float[Array, "E R C"], routing: Routing, dtype) -> Float[Array, "tiles R C"]:
    """The adapter of each tile; tiles without one read zeros, never another tenant's NaN."""
    has_adapter = (routing.tile_adapter >= 0)[:, None, None]
    return jnp.where(has_adapter, stack[routing.tile_adapter], 0).astype(dtype)


def _sum_by_slot(
    per_tile: Float[Array, "tiles R C"], routing: Routing, num_slots: int
) -> Float[Array, "E R C"]:
    """Adds tile contributions slot by slot: bit-repeatable, and one slot's NaN stays its own."""
    mine = jnp.arange(num_slots)[:, None] == routing.tile_adapter[None, :]
    return jnp.sum(jnp.where(mine[:, :, None, None], per_tile[None], 0.0), axis=1)


def down(x: Float[Array, "T K"], a: Stacks, routing: Routing) -> Smalls:
    """Returns S of each projection in X's dtype."""
    acc = _accumulator_dtype(x.dtype)
    dropped = _tiles(_dropped(x, routing), routing.tile_adapter.shape[0])
    scale = _row_values(routing, routing.scale)[:, None].astype(acc)
    ss = (
        jnp.einsum(
            "tpk,trk->tpr", dropped, _of_tile(a_i, routing, x.dtype), preferred_element_type=acc
        )
        for a_i in a
    )
    return tuple((s.reshape(-1, s.shape[2]) * scale).astype(x.dtype) for s in ss)


def forward(
    x: Float[Array, "T K"],
    ws: Weights,
    a: Stacks,
    b: Stacks,
    biases: tuple[Float[Array, " _"] | None, ...],
    routing: Routing,
) -> tuple[Outputs, Smalls]:
    """Returns the outputs and the small S of each projection, [T, R] in X's dtype."""
    acc, ys, ss = _accumulator_dtype(x.dtype), [], down(x, a, routing)
    for w, s, b_i, bias in zip(ws, ss, b, biases, strict=True):
        up = jnp.einsum(
            "tpr,trn->tpn",
            _tiles(s, routing.tile_adapter.shape[0]),
            _of_tile(b_i, routing, x.dtype),
            preferred_element_type=acc,
        )
        y = jnp.matmul(x, w, preferred_element_type=acc) + up.reshape(-1, w.shape[1])
        if bias is not None:
            y = y + bias.astype(acc)
        ys.append(y.astype(x.dtype))
    return tuple(ys), ss


def adapter_gradients(
    x: Float[Array, "T K"], a: Stacks, b: Stacks, ss: Smalls, routing: Routing, dys: Outputs
) -> tuple[Smalls, Stacks, Stacks]:
    """Returns dS of each projection in X's dtype, and dA and dB in the dtypes of A and B."""
    acc = _accumulator_dtype(x.dtype)
    num_tiles, num_slots = routing.tile_adapter.shape[0], routing.scale.shape[0]
    scale = _row_values(routing, routing.scale)[:, None].astype(acc)
    live = _live_rows(routing)
    dropped = _tiles(_dropped(x, routing), num_tiles)
    dss, das, dbs = [], [], []
    for a_i, b_i, s, dy in zip(a, b, ss, dys, strict=True):
        dy_tiles = _tiles(jnp.where(live, dy, jnp.zeros((), dy.dtype)), num_tiles)
        ds = jnp.einsum(
            "tpn,trn->tpr", dy_tiles, _of_tile(b_i, routing, x.dtype), preferred_element_type=acc
        )
        ds = (ds.reshape(s.shape) * scale).astype(x.dtype)
        db = jnp.einsum("tpr,tpn->trn", _tiles(s, num_tiles), dy_tiles, preferred_element_type=acc)
        da = jnp.einsum("tpr,tpk->trk", _tiles(ds, num_tiles), dropped, preferred_element_type=acc)
        dss.append(ds)
        das.append(_sum_by_slot(da, routing, num_slots).astype(a_i.dtype))
        dbs.append(_sum_by_slot(db, routing, num_slots).astype(b_i.dtype))
    return tuple(dss), tuple(das), tuple(dbs)


def backward(
    x: Float[Array, "T K"],
    ws: Weights,
    a: Stacks,
    b: Stacks,
    ss: Smalls,
    routing: Routing,
    dys: Outputs,
) -> tuple[Float[Array, "T K"], Stacks, Stacks]:
    """Returns dX in X's dtype, and dA and dB in the dtypes of A and B."""
    acc, num_tiles = _accumulator_dtype(x.dtype), routing.tile_adapter.shape[0]
    dss, das, dbs = adapter_gradients(x, a, b, ss, routing, dys)
    dx = jnp.zeros(x.shape, acc)
    dx_lora = jnp.zeros(x.shape, acc)
    for w, a_i, ds, dy in zip(ws, a, dss, dys, strict=True):
        dx_i = jnp.einsum(
            "tpr,trk->tpk",
            _tiles(ds, num_tiles),
            _of_tile(a_i, routing, x.dtype),
            preferred_element_type=acc,
        )
        dx_lora = dx_lora + dx_i.reshape(x.shape)
        dx = dx + jnp.matmul(dy, w.T, preferred_element_type=acc)
    rate = _row_values(routing, routing.rate)
    kept = keep_mask(routing.row_key, routing.site, rate, x.shape[1]) & _live_rows(routing)
    dx = dx + jnp.where(kept, dx_lora * keep_scale(rate)[:, None].astype(acc), 0.0)
    return dx.astype(x.dtype), das, dbs


def rows_per_tile(num_rows: int, num_tiles: int) -> int:
    """Returns P; raises ValueError where the tiles do not divide the rows."""
    if num_tiles == 0 or num_rows % num_tiles:
        raise ValueError(
            f"tile_adapter has {num_tiles} tiles, which do not divide the {num_rows} rows of x: "
            "pad x to a whole number of tiles"
        )
    return num_rows // num_tiles


__all__ = [
    "Outputs",
    "Routing",
    "Smalls",
    "Stacks",
    "Weights",
    "adapter_gradients",
    "backward",
    "down",
    "forward",
    "rows_per_tile",
]
