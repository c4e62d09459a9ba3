"""The fused op's large products for GPUs before and after Hopper, by tensor core instructions that
all of them have.

    Y_i = X W_i (+ bias_i) + S_i B_i            dX = sum_i dY_i W_i^T + mask * (dS A)

One warpgroup owns 64 rows and 64 or 128 columns; the LoRA term is more of the same accumulation. S,
dS and the gradients of A and B are XLA's, as in `spec`. Compiled for compute capabilities 8.0, 8.6,
8.9, 9.0 and 10.0 and tested in the interpreter; its speed has not been measured, so it is used only
when asked for.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora import spec
from pallas_kernels.lora.mask import clear_padding, drop, load_keys, row_mask
from pallas_kernels.lora.spec import Outputs, Routing, Smalls, Stacks, Weights
from pallas_kernels.segments import TILE_ROWS, Tiles, prepare, read_facts

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))
_ROWS, _DEPTH, _STAGES = 64, 64, 3
_LORA_DEPTH = 32  # least depth that the four warps of a block can copy together


def _columns(widths: list[int]) -> int:
    """Columns of a block: whole blocks only, as nothing is loaded out of bounds."""
    return 128 if all(width % 128 == 0 for width in widths) else 64


def _refuse_unsupported(x: Array, ws: Weights, routing: Routing) -> None:
    if mgpu.capability() not in CAPABILITIES:
        known = ", ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
        raise NotImplementedError(f"the portable kernels need a GPU of compute capability {known}")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype}: the kernels take bfloat16 and float16")
    rows, tiles = x.shape[0], routing.tile_adapter.shape[0]
    if rows % _ROWS:
        raise NotImplementedError(f"{rows} rows: the portable kernels take multiples of {_ROWS}")
    if tiles > 1 and spec.rows_per_tile(rows, tiles) % TILE_ROWS:
        raise NotImplementedError("tiles of other than multiples of 128 rows")
    for name, size in [("in", x.shape[1]), *((f"out[{i}]", w.shape[1]) for i, w in enumerate(ws))]:
        if size % _DEPTH:
            raise NotImplementedError(f"{name}={size}: the kernels take multiples of {_DEPTH}")


def _product(start, left_g, right_g, row, column, columns: int, *, transposed=False, slot=None):
    """Adds the product of 64 rows and `columns` columns to an accumulator in registers.

    Args:
        start: the accumulator.
        left_g: left operand; whole blocks of `row`.
        right_g: right operand [depth, out], or [out, depth] if transposed; with a leading axis for
            `slot` if that is given.
        row: which block of 64 rows.
        column: which block of `columns` columns.
        columns: of the product.
        transposed: see `right_g`.
        slot: see `right_g`.
    """
    depth = min(_DEPTH, left_g.shape[1])
    block = (columns, depth) if transposed else (depth, columns)
    lead = () if slot is None else (slot,)

    def step(_, left_s, right_s, accumulator):
        return mgpu.mma(accumulator, left_s, right_s.transpose((1, 0)) if transposed else right_s)

    return mgpu.pipeline(
        step,
        steps=left_g.shape[1] // depth,
        stages=_STAGES,
        inputs=(
            (left_g, (_ROWS, depth), lambda index: (row, index)),
            (
                right_g,
                (*(None for _ in lead), *block),
                lambda index: (*lead, *((column, index) if transposed else (index, column))),
            ),
        ),
        carry=start,
    )


def _base_up(x, w, s, b, bias, rows: Tiles):
    """Y of one projection."""
    (num_rows, _), n, dtype = x.shape, w.shape[1], x.dtype
    columns = _columns([n])

    def body(x_g, w_g, s_g, b_g, bias_g, table_g, y_g):
        row, column = jax.lax.axis_index("row"), jax.lax.axis_index("column")
        facts = read_facts(table_g, row * _ROWS // TILE_ROWS)
        total = mgpu.zeros((_ROWS, columns))
        total = _product(total, x_g, w_g, row, column, columns, transposed=False)
        total = jax.lax.cond(
            facts.adapter >= 0,
            lambda total: _product(total, s_g, b_g, row, column, columns, slot=facts.adapter),
            lambda total: total,
            total,
        )
        total = total + mgpu.load_mma_columns(bias_g, column * columns, (_ROWS, columns))
        here = (mgpu.pl.ds(row * _ROWS, _ROWS), mgpu.pl.ds(column * columns, columns))
        y_g[here] = total.astype(dtype)

    bias = jnp.zeros((n,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    return mgpu.launch_simple(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, n), dtype),
        grid=(num_rows // _ROWS, n // columns),
        grid_names=("row", "column"),
        name="lora_portable_base_up",
    )(x, w, s, b, bias, rows.table)


def _dx(dys, ws, ds, a, rows: Tiles):
    """dX of all projections; `ds` and `a` hold their ranks side by side."""
    num_rows, k, dtype, group = dys[0].shape[0], ws[0].shape[0], dys[0].dtype, len(dys)
    columns = _columns([k])

    def body(ds_g, a_g, table_g, key_g, site_g, *rest):
        dy_gs, w_gs, dx_g = rest[:group], rest[group : 2 * group], rest[2 * group]
        row, column = jax.lax.axis_index("row"), jax.lax.axis_index("column")
        facts = read_facts(table_g, row * _ROWS // TILE_ROWS)
        keys = load_keys(key_g.at[mgpu.pl.ds(row * _ROWS, _ROWS)], mgpu.MMA_ACCUMULATOR)

        def lora(total):
            total = _product(total, ds_g, a_g, row, column, columns, slot=facts.adapter)
            total = total * (256.0 / (256.0 - facts.threshold.astype(jnp.float32)))
            mask = row_mask(keys, site_g[0], facts.threshold)
            return jax.lax.cond(
                facts.threshold > 0,
                lambda v: drop(v, mask, column * columns, mgpu.MMA_ACCUMULATOR),
                lambda v: clear_padding(v, mask),
                total,
            )

        total = mgpu.zeros((_ROWS, columns))
        total = jax.lax.cond(facts.adapter >= 0, lora, lambda total: total, total)
        for dy_g, w_g in zip(dy_gs, w_gs, strict=True):
            total = _product(total, dy_g, w_g, row, column, columns, transposed=True)
        here = (mgpu.pl.ds(row * _ROWS, _ROWS), mgpu.pl.ds(column * columns, columns))
        dx_g[here] = total.astype(dtype)

    return mgpu.launch_simple(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, k), dtype),
        grid=(num_rows // _ROWS, k // columns),
        grid_names=("row", "column"),
        name="lora_portable_dx",
    )(ds, a, rows.table, rows.row_key, rows.site, *dys, *ws)


def _whole_ranks(value: Array, axis: int, dtype) -> Array:
    """Rounds to the compute dtype and pads the ranks with zeros to whole products."""
    rank, padded = value.shape[axis], [(0, 0)] * value.ndim
    whole = _LORA_DEPTH if rank <= _LORA_DEPTH else -(-rank // _DEPTH) * _DEPTH
    padded[axis] = (0, whole - rank)
    return jnp.pad(value.astype(dtype), padded)


def forward(
    x: Float[Array, "T K"],
    ws: Weights,
    a: Stacks,
    b: Stacks,
    biases: tuple[Float[Array, " _"] | None, ...],
    routing: Routing,
) -> tuple[Outputs, Smalls]:
    """Returns the outputs and S of each projection; see `spec.forward`."""
    _refuse_unsupported(x, ws, routing)
    rows, ss = prepare(*routing), spec.down(x, a, routing)
    ys = tuple(
        _base_up(x, w, _whole_ranks(s, 1, x.dtype), _whole_ranks(b_i, 1, x.dtype), bias, rows)
        for w, s, b_i, bias in zip(ws, ss, b, biases, strict=True)
    )
    return ys, ss


def backward(
    x: Float[Array, "T K"],
    ws: Weights,
    a: Stacks,
    b: Stacks,
    ss: Smalls,
    routing: Routing,
    dys: Outputs,
) -> tuple[Float[Array, "T K"], Stacks, Stacks]:
    """Returns dX, dA and dB; see `spec.backward`."""
    _refuse_unsupported(x, ws, routing)
    dss, das, dbs = spec.adapter_gradients(x, a, b, ss, routing, dys)
    rows = prepare(*routing)
    ds, stacked = (_whole_ranks(jnp.concatenate(v, axis=1), 1, x.dtype) for v in (dss, a))
    dx = _dx(dys, ws, ds, stacked, rows)
    return dx, das, dbs
