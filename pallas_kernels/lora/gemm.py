"""What the two large products share: tiles, their walk over a persistent grid, loop and epilogue.

A block owns 128 x 256 outputs at a time, in two warpgroups. One memory warpgroup feeds one ring of
slots across all tiles of the block, so that the loads of the next tile overlap the epilogue of the
current one. The LoRA term travels through the same ring as extra steps.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.segments import TILE_ROWS
from pallas_kernels.tuning import GemmTiles

TILE_M, TILE_N, TILE_K = TILE_ROWS, 256, 64
_EPILOGUE = 64  # rows and columns of a staged piece of output
_EPILOGUE_SLOTS = 2


def walk(
    fetch: Callable,
    shape: tuple[int, int],
    sizes: GemmTiles,
    sms: int,
    before: int,
    step,
    visit: Callable,
) -> tuple[int, jax.Array]:
    """Visits this block's tiles of one output, continuing the grid's round over all outputs.

    Args:
        fetch: reads what `visit` needs to know of a row tile, given its index. That of the next
            tile is read while this one is worked on, so that the latency is hidden.
        shape: rows and columns of the output.
        sizes: order of the walk.
        sms: number of blocks.
        before: tiles of the outputs already walked, over all blocks.
        step: ring step that the first tile starts with.
        visit: called with first row, first column, step and what was fetched; returns the next
            tile's step.

    Returns:
        The count of tiles walked so far over all blocks, and the next step.
    """
    counts = (-(-shape[0] // TILE_M), -(-shape[1] // TILE_N))
    total = counts[0] * counts[1]
    start = lax.rem(lax.axis_index("sm") + jnp.int32(sms - before % sms), jnp.int32(sms))
    mine = lax.div(jnp.int32(total + sms - 1) - start, jnp.int32(sms))

    def locate(turn):
        index = jnp.minimum(start + turn * sms, total - 1)
        return mgpu.planar_snake(index, counts, "mn".index(sizes.minor), sizes.width)

    def one(turn, carry):
        step, loaded = carry
        row, column = locate(turn)
        following = fetch(locate(turn + 1)[0])
        return visit(row * TILE_M, column * TILE_N, step, loaded), following

    first = fetch(locate(jnp.int32(0))[0])
    return before + total, lax.fori_loop(0, mine, one, (step, first))[0]


def share(warpgroup, sizes: GemmTiles) -> tuple:
    """Shape and offsets of a warpgroup's part of the block's tile."""
    if sizes.split == "m":
        return (TILE_M // 2, TILE_N), warpgroup * (TILE_M // 2), 0
    return (TILE_M, TILE_N // 2), 0, warpgroup * (TILE_N // 2)


def steps_of(size: int) -> int:
    """Ring steps that a contraction of this size takes."""
    return -(-size // TILE_K)


def contract(
    ring: mgpu.Ring, accumulator, first, steps: int, operands: Callable, more=None
) -> None:
    """Multiplies ring steps into the accumulator and waits for the result.

    Args:
        ring: where the steps come from.
        accumulator: what they are added to.
        first: the first step.
        steps: how many at least, >= 1; the loop over them has a fixed length.
        operands: gives the left and right operands of a step's buffers.
        more: number of further steps, known late; None for none.
    """

    def multiply(step):
        mgpu.wgmma(accumulator, *operands(*ring.take(step)))

    def loop(begin, end):
        @mgpu.pl.loop(begin, end)
        def _(index):
            multiply(first + index)
            mgpu.wgmma_wait(1)
            ring.release(first + index - 1)

    multiply(first)
    loop(1, steps)
    total = steps
    if more is not None:
        total = steps + more
        loop(jnp.int32(steps), total)
    mgpu.wgmma_wait(0)
    ring.release(first + total - 1)


def ring_scratch(sizes: GemmTiles, dtype, *, transposed: bool) -> tuple:
    """SMEM and barriers of the ring; `transposed` for weights taken as [out, in] blocks."""
    block = (TILE_N, TILE_K) if transposed else (TILE_K, TILE_N)
    return (
        mgpu.tiles_buffer(sizes.stages, TILE_M, TILE_K, dtype),
        mgpu.SMEM((sizes.stages, *block), dtype, transforms=mgpu.swizzled(TILE_K, dtype)),
        *mgpu.Ring.barriers(sizes.stages, copies=2, consumers=2),
    )


def epilogue_scratch(dtype):
    """SMEM that outputs are staged in."""
    return mgpu.SMEM(
        (2, _EPILOGUE_SLOTS, _EPILOGUE, _EPILOGUE),
        dtype,
        transforms=mgpu.swizzled(_EPILOGUE, dtype),
    )


def store_tile(value, staged, warpgroup, out_g, first_row, first_column) -> None:
    """Writes a warpgroup's outputs through SMEM; what lies outside the array is clipped."""
    pieces = [
        (row, column)
        for row in range(0, value.shape[0], _EPILOGUE)
        for column in range(0, value.shape[1], _EPILOGUE)
    ]
    for index, (row, column) in enumerate(pieces):
        slot = staged.at[warpgroup, index % _EPILOGUE_SLOTS]
        mgpu.wait_smem_to_gmem(_EPILOGUE_SLOTS - 1, wait_read_only=True)
        slot[...] = value[row : row + _EPILOGUE, column : column + _EPILOGUE]
        mgpu.commit_smem()
        mgpu.copy_smem_to_gmem(
            slot,
            out_g.at[
                mgpu.pl.ds(first_row + row, _EPILOGUE), mgpu.pl.ds(first_column + column, _EPILOGUE)
            ],
        )
