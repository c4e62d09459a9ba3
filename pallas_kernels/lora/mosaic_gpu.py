"""The fused op on Hopper: `forward` and `backward` as in `spec`, from five kernels.

forward     down (S), base_up (Y)
backward    grad_up (dS, dB), grad_down (dA), dx (dX)

Raises NotImplementedError, with the reason, for what these kernels cannot run.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels import tuning
from pallas_kernels.lora.base_up import base_up
from pallas_kernels.lora.down import down
from pallas_kernels.lora.dx import dx as input_gradient
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
from pallas_kernels.segments import TILE_ROWS, prepare

MAX_RANKS = 256  # of all projections together: one accumulator of `down`
_GRANULE, _TILE = 8, 64  # rows and columns of the tiles in SMEM, which TMA copies whole


def _whole(columns: int) -> int:
    """The least width from this one on that TMA can copy as tiles: see `_TILE`."""
    unit = _GRANULE if columns <= _TILE else _TILE
    return max(1, -(-columns // unit)) * unit


def _refuse_unsupported(x: Array, ws: Weights, a: Stacks, routing: Routing) -> None:
    """Raises NotImplementedError if the kernels cannot run this."""
    if not mgpu.targets_hopper():
        raise NotImplementedError("the kernels need a GPU of compute capability 9.0 (H100, H200)")
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"x is {x.dtype}: the kernels take bfloat16 and float16")
    rows, tiles = x.shape[0], routing.tile_adapter.shape[0]
    tile_rows = rows_per_tile(rows, tiles)
    if tiles > 1 and tile_rows % TILE_ROWS:
        raise NotImplementedError(f"tiles of {tile_rows} rows: the kernels take multiples of 128")
    if rows % _GRANULE or not rows:
        raise NotImplementedError(f"{rows} rows: the kernels take multiples of {_GRANULE}")
    for name, size in [("in", x.shape[1]), *((f"out[{i}]", w.shape[1]) for i, w in enumerate(ws))]:
        if _whole(size) != size:
            raise NotImplementedError(
                f"{name}={size}: the kernels take multiples of {_TILE}, and of {_GRANULE} below it"
            )
    ranks = sum(_whole(a_i.shape[1]) for a_i in a)
    if ranks > MAX_RANKS:
        raise NotImplementedError(
            f"{ranks} ranks over the projections that share X: the kernels go up to {MAX_RANKS}"
        )


def _operands(stacks: Stacks, dtype) -> tuple[Float[Array, "_ _ _"], ...]:
    """Stacks in the compute dtype, their rank padded with zeros to one that TMA can copy."""
    rank = stacks[0].shape[1]
    padded = ((0, 0), (0, _whole(rank) - rank), (0, 0))
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
    _refuse_unsupported(x, ws, a, routing)
    rows, rank = prepare(*routing), a[0].shape[1]
    a, b = _operands(a, x.dtype), _operands(b, x.dtype)
    ranks = [stack.shape[1] for stack in a]
    stacked = _side_by_side(a)
    sizes = tuning.down_tiles(x.shape[0], x.shape[1], stacked.shape[1])
    ss = down(x, stacked, rows, tuple(ranks), sizes)
    sizes = tuning.gemm_tiles("base_up", x.shape[0], x.shape[1], sum(w.shape[1] for w in ws))
    ys = base_up(x, ws, ss, b, biases, rows, sizes)
    return ys, tuple(s[:, :rank] for s in ss)


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
    _refuse_unsupported(x, ws, a, routing)
    rows = prepare(*routing)
    stacked = _side_by_side(_operands(a, x.dtype))
    b_operands = _operands(b, x.dtype)
    rank, padded_rank = a[0].shape[1], b_operands[0].shape[1]
    ss = tuple(jnp.pad(s, ((0, 0), (0, padded_rank - rank))) for s in ss)
    (num_rows, k), widths = x.shape, tuple(w.shape[1] for w in ws)
    parts, dbs = grad_up(
        dys, b_operands, ss, rows, tuning.grad_up_tiles(num_rows, widths, padded_rank)
    )
    ranks = padded_rank * len(ws)
    unused = jnp.zeros((num_rows, -ranks % _TILE), x.dtype)
    ds = jnp.concatenate([*(part.sum(0).astype(x.dtype) for part in parts), unused], axis=1)
    da = grad_down(x, ds, ranks, rows, tuning.grad_down_tiles(num_rows, k, ranks))
    sizes = tuning.gemm_tiles("dx", num_rows, sum(widths), k)
    transposed = stacked.transpose(0, 2, 1)
    transposed = jnp.pad(transposed, ((0, 0), (0, 0), (0, ds.shape[1] - stacked.shape[1])))
    dx = input_gradient(dys, ws, ds, transposed, rows, sizes)
    das = [da[:, i * padded_rank : i * padded_rank + rank] for i in range(len(ws))]
    return (
        dx,
        tuple(grad.astype(a_i.dtype) for grad, a_i in zip(das, a, strict=True)),
        tuple(grad[:, :rank].astype(b_i.dtype) for grad, b_i in zip(dbs, b, strict=True)),
    )


__all__ = ["MAX_RANKS", "TILE_ROWS", "backward", "forward"]
