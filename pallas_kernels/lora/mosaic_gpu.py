"""The fused op on Hopper: `forward` and `backward` as in `spec`, from five kernels.

forward     down (S), base_up (Y); behind a gated activation gated_down (H, S), base_up (Y)
backward    grad_up (dS, dB), grad_down (dA), dx (dX); before a gated activation gated_grad (the
            gradients of gate and up, dS, dB) in the place of grad_up

Raises NotImplementedError, with the reason, for what these kernels cannot run.
"""

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.activation import Activation, gated_gradients
from pallas_kernels.lora import da_pass, gated_grad, s_pass
from pallas_kernels.lora.base_up import base_up, base_up_with_s
from pallas_kernels.lora.down import down
from pallas_kernels.lora.dx import dx as input_gradient
from pallas_kernels.lora.dx import dx_with_da
from pallas_kernels.lora.gated_down import gated_down
from pallas_kernels.lora.gemm import TILE_K
from pallas_kernels.lora.grad_down import grad_down
from pallas_kernels.lora.grad_up import grad_up
from pallas_kernels.lora.spec import (
    Outputs,
    Routing,
    Smalls,
    Stacks,
    Weights,
    rows_per_tile,
)
from pallas_kernels.segments import TILE_ROWS, Tiles, prepare
from pallas_kernels.tables import choose
from pallas_kernels.tuning import Shape, gated_down_tiles, gated_grad_tiles

MAX_RANK = 256  # of one projection: one accumulator of `down`
MAX_RANKS = 1024  # side by side in one launch; groups with more are taken apart
_GRANULE = 8  # rows of the tiles in SMEM, which TMA copies whole
_STEP = 64  # ranks and columns that the kernels take at a time
_PADDED_FROM = 4096  # rows: 3 of 365 us at 8192, for copies of 4 us
_TILES = (64, 32, 16)  # columns of theirs; Mosaic has no products of tiles of 8


def _whole(columns: int, tile: int) -> int:
    """The least width from this one on that TMA can copy as tiles of so many columns."""
    unit = _GRANULE if columns <= tile else tile
    return max(1, -(-columns // unit)) * unit


def _whole_rank(rank: int) -> int:
    """The least rank that TMA can copy, and the kernels go through in steps of 64."""
    return _whole(rank, mgpu.tile_columns() if rank <= _STEP else _STEP)


def _tile_columns(x: Array | jax.ShapeDtypeStruct, ws: Weights) -> int:
    """The widest tiles that all widths are whole multiples of; the wider, the faster."""
    sizes = [("in", x.shape[1]), *((f"out[{i}]", w.shape[1]) for i, w in enumerate(ws))]
    for tile in _TILES:
        if all(_whole(size, tile) == size for _, size in sizes):
            return tile
    name, size = next((name, size) for name, size in sizes if _whole(size, _TILES[-1]) != size)
    raise NotImplementedError(f"{name}={size}: the kernels take multiples of {_TILES[-1]}, and 8")


def _tiles_for(
    x: Array | jax.ShapeDtypeStruct, ws: Weights, a: Stacks, routing: Routing
) -> AbstractContextManager[None]:
    """Chooses tiles for what is traced inside; raises NotImplementedError if none can do this."""
    if not mgpu.targets_hopper():
        raise NotImplementedError("the kernels need a GPU of compute capability 9.0 (H100, H200)")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype}: the kernels take bfloat16 and float16")
    rows, tiles = x.shape[0], routing.tile_adapter.shape[0]
    tile_rows = rows_per_tile(rows, tiles)
    if tiles > 1 and tile_rows % TILE_ROWS:
        raise NotImplementedError(f"tiles of {tile_rows} rows: the kernels take multiples of 128")
    if not rows:
        raise NotImplementedError("no rows")
    if len({a_i.shape[1] for a_i in a}) > 1:
        raise NotImplementedError("projections of different r_max: the kernels take one for all")
    if a[0].shape[1] > MAX_RANK:
        raise NotImplementedError(f"rank {a[0].shape[1]}: the kernels go up to {MAX_RANK}")
    return mgpu.tiles_of(_tile_columns(x, ws))


def _parts(group: int, rank: int, limit: int) -> list[slice]:
    """Projections that go through the kernels together: at most `limit` ranks."""
    size = max(1, limit // _whole_rank(rank))
    return [slice(first, first + size) for first in range(0, group, size)]


def _padded_rows(value: Array) -> Array:
    """Rows up to a whole granule, zeros; a copy, where they are not whole already."""
    missing = -value.shape[0] % _GRANULE
    return jnp.pad(value, ((0, missing), *((0, 0),) * (value.ndim - 1))) if missing else value


def _operands(stacks: Stacks, dtype) -> tuple[Float[Array, "_ _ _"], ...]:
    """Stacks in the compute dtype, their rank padded with zeros to one that TMA can copy."""
    rank = stacks[0].shape[1]
    padded = ((0, 0), (0, _whole_rank(rank) - rank), (0, 0))
    return tuple(jnp.pad(stack.astype(dtype), padded) for stack in stacks)


def _side_by_side(stacks: tuple[Float[Array, "E _ _"], ...]) -> Float[Array, "E RC _"]:
    return jnp.concatenate(stacks, axis=1)


def forward(
    x: Float[Array, "T K"],
    ws: Weights,
    a: Stacks,
    b: Stacks,
    biases: tuple[Float[Array, " _"] | None, ...],
    routing: Routing,
) -> tuple[Outputs, Smalls]:
    """Returns the outputs and S of each projection; see `spec.forward`."""
    with _tiles_for(x, ws, a, routing):
        return _forward(x, ws, a, b, biases, routing)


def _forward(x: Array, ws: Weights, a: Stacks, b: Stacks, biases, routing: Routing):
    num_rows = x.shape[0]
    x, routing = _padded_rows(x), routing._replace(row_key=_padded_rows(routing.row_key))
    rows = prepare(*routing)
    ys, ss = [], []
    for part in _parts(len(ws), a[0].shape[1], MAX_RANKS):
        some_ys, some_ss = _forward_part(x, ws[part], a[part], b[part], biases[part], rows)
        ys += some_ys
        ss += some_ss
    return tuple(y[:num_rows] for y in ys), tuple(s[:num_rows] for s in ss)


def _forward_part(x: Array, ws: Weights, a: Stacks, b: Stacks, biases, rows: Tiles):
    rank = a[0].shape[1]
    a, b = _operands(a, x.dtype), _operands(b, x.dtype)
    shape = _shape(x, ws, a)
    sizes = choose("base_up", shape)

    def separate(x, ws, a, b, biases, rows):
        ss = ()
        for part in _parts(len(ws), rank, MAX_RANK):
            some, ranks = a[part], (shape.rank,) * len(a[part])
            sizes_of_down = choose("down", _shape(x, ws[part], some))
            ss += down(x, _side_by_side(some), rows, ranks, sizes_of_down)
        return base_up(x, ws, ss, b, biases, rows, sizes), ss

    if sizes.absorb and _can_absorb(shape, s_pass.MAX_RANKS) and mgpu.have_flags():

        def together(x, ws, a, b, biases, rows):
            return base_up_with_s(x, ws, _side_by_side(a), b, biases, rows, sizes)

        run = _without_vmap(together, separate)
    else:
        run = separate
    ys, ss = run(x, ws, a, b, biases, rows)
    return ys, tuple(s[:, :rank] for s in ss)


def check(x: Array | jax.ShapeDtypeStruct, ws: Weights, a: Stacks, routing: Routing) -> None:
    """Raises NotImplementedError, with the reason, if the kernels cannot run on these."""
    with _tiles_for(x, ws, a, routing):
        pass


def forward_gated(
    gate: Float[Array, "T K"],
    up: Float[Array, "T K"],
    w: Float[Array, "K N"],
    a: Float[Array, "E R K"],
    b: Float[Array, "E R N"],
    bias: Float[Array, " N"] | None,
    routing: Routing,
    activation: Activation,
) -> tuple[Float[Array, "T N"], Float[Array, "T K"], Float[Array, "T R"]]:
    """Returns Y, its input H = activation(gate) * up, and S; see `spec.forward`."""
    with _tiles_for(gate, (w,), (a,), routing):
        num_rows, rank = gate.shape[0], a.shape[1]
        routing = routing._replace(row_key=_padded_rows(routing.row_key))
        gate, up = _padded_rows(gate), _padded_rows(up)
        (wide_a,), wide_b = (_operands((stack,), gate.dtype) for stack in (a, b))
        rows = prepare(*routing)
        shape = _shape(gate, (w,), (wide_a,))
        sizes = gated_down_tiles(choose("down", shape), shape.ranks)
        h, s = gated_down(gate, up, wide_a, rows, activation, sizes)
        (y,) = base_up(h, (w,), (s,), wide_b, (bias,), rows, choose("base_up", shape))
        return y[:num_rows], h[:num_rows], s[:num_rows, :rank]


def _without_vmap(once: Callable, batched: Callable) -> Callable:
    """Returns `once`, which becomes `batched` under vmap; both take arrays and give the same."""
    run = jax.custom_batching.custom_vmap(once)

    @run.def_vmap
    def _(axis_size, in_batched, *args):
        axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, in_batched)
        out = jax.vmap(batched, in_axes=axes, axis_size=axis_size)(*args)
        return out, jax.tree.map(lambda _: True, out)

    return run


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
    with _tiles_for(x, ws, a, routing):
        return _backward(x, ws, a, b, ss, routing, dys)


def _backward(x: Array, ws: Weights, a: Stacks, b: Stacks, ss: Smalls, routing: Routing, dys):
    num_rows = x.shape[0]
    routing = routing._replace(row_key=_padded_rows(routing.row_key))
    x, ss, dys = jax.tree.map(_padded_rows, (x, ss, dys))
    rows = prepare(*routing)
    dxs, das, dbs = [], [], []
    for part in _parts(len(ws), a[0].shape[1], MAX_RANKS):
        dx, some_das, some_dbs = _backward_part(
            x, ws[part], a[part], b[part], ss[part], rows, dys[part]
        )
        dxs.append(dx)
        das += some_das
        dbs += some_dbs
    dx = dxs[0]
    if len(dxs) > 1:
        dx = functools.reduce(jnp.add, (dx.astype(jnp.float32) for dx in dxs)).astype(x.dtype)
    return dx[:num_rows], _in_dtypes_of(a, das), _in_dtypes_of(b, dbs)


def _in_dtypes_of(stacks: Stacks, gradients: Sequence[Array]) -> Stacks:
    return tuple(grad.astype(s.dtype) for grad, s in zip(gradients, stacks, strict=True))


def _backward_part(x, ws: Weights, a: Stacks, b: Stacks, ss: Smalls, rows: Tiles, dys: Outputs):
    rank = a[0].shape[1]
    a, b = _operands(a, x.dtype), _operands(b, x.dtype)
    shape = _shape(x, ws, a)
    ss = tuple(jnp.pad(s, ((0, 0), (0, shape.rank - rank))) for s in ss)
    parts, dbs = grad_up(dys, b, ss, rows, choose("grad_up", shape))
    return _input_gradients(x, ws, a, (parts, dbs), rows, dys, rank)


def _input_gradients(x, ws: Weights, a: Stacks, small, rows: Tiles, dys: Outputs, rank: int):
    """Returns dX, dA and dB, given the parts of dS, and dB: `small`, as `grad_up` returns them."""
    parts, dbs = small
    shape = _shape(x, ws, a)
    sizes = choose("dx", shape)
    absorb = sizes.absorb and _can_absorb(shape, da_pass.RANKS)
    # Whole steps of dx, and of the pieces that TMA copies: it then fills nothing. That saves dx
    # less than the copies cost where there are few rows.
    bare = shape.rows < _PADDED_FROM and shape.ranks <= TILE_K and not absorb
    unused = 0 if bare else -shape.ranks % TILE_K
    zeros = jnp.zeros((x.shape[0], unused), x.dtype)
    ds = jnp.concatenate([*(part.sum(0).astype(x.dtype) for part in parts), zeros], axis=1)
    transposed = jnp.pad(_side_by_side(a).transpose(0, 2, 1), ((0, 0), (0, 0), (0, unused)))
    if absorb:
        dx, da = dx_with_da(dys, ws, ds, transposed, x, shape.ranks, rows, sizes)
    else:
        da = grad_down(x, ds, shape.ranks, rows, choose("grad_down", shape))
        dx = input_gradient(dys, ws, ds, transposed, rows, sizes)
    firsts = range(0, shape.ranks, shape.rank)
    return dx, [da[:, i : i + rank] for i in firsts], [db[:, :rank] for db in dbs]


def backward_gated(
    x: Float[Array, "T K"],
    ws: Weights,
    a: Stacks,
    b: Stacks,
    ss: Smalls,
    routing: Routing,
    gated: tuple[Float[Array, "T F"], Float[Array, "T F"], Float[Array, "T F"]],
    activation: Activation,
) -> tuple[Float[Array, "T K"], Stacks, Stacks]:
    """Returns dX, dA and dB of gate and up, behind which stands a gated activation.

    Args:
        x: as in `backward`, like the next five.
        ws: of gate and up.
        a: of gate and up.
        b: of gate and up.
        ss: of gate and up.
        routing: of the rows.
        gated: gate, up, and the gradient of activation(gate) * up.
        activation: see `pallas_kernels.activation`.
    """
    num_rows, rank = x.shape[0], a[0].shape[1]
    with _tiles_for(x, ws, a, routing):
        if _whole_rank(rank) > gated_grad.MAX_RANK:
            return _backward(x, ws, a, b, ss, routing, gated_gradients(*gated, activation))
        routing = routing._replace(row_key=_padded_rows(routing.row_key))
        x, ss, gated = jax.tree.map(_padded_rows, (x, ss, gated))
        rows, wide_a, wide_b = prepare(*routing), _operands(a, x.dtype), _operands(b, x.dtype)
        whole = wide_a[0].shape[1]
        ss = tuple(jnp.pad(s, ((0, 0), (0, whole - rank))) for s in ss)
        sizes = gated_grad_tiles(x.shape[0], gated[0].shape[1], whole)
        dys, ds, wide_dbs = gated_grad.gated_grad(*gated, wide_b, ss, rows, activation, sizes)
        small = tuple(ds), wide_dbs
        dx, das, dbs = _input_gradients(x, ws, wide_a, small, rows, dys, rank)
        return dx[:num_rows], _in_dtypes_of(a, das), _in_dtypes_of(b, dbs)


def _can_absorb(shape: Shape, ranks: int) -> bool:
    """Whether products can do a skinny pass; K of one TMA tile would lose its column index."""
    return shape.ranks <= ranks and shape.k > _STEP and shape.k % _STEP == 0


def _shape(x: Array, ws: Weights, a: Stacks) -> Shape:
    return Shape(x.shape[0], x.shape[1], tuple(w.shape[1] for w in ws), a[0].shape[1])


__all__ = [
    "MAX_RANK",
    "TILE_ROWS",
    "backward",
    "backward_gated",
    "check",
    "forward",
    "forward_gated",
]
