"""What the two large products share: tiles, their walk over a persistent grid, loop and epilogue.

A block owns 128 x 256 outputs at a time, in two warpgroups. One memory warpgroup feeds one ring of
slots across all tiles of the block, so that the loads of the next tile overlap the epilogue of the
current one. The LoRA term travels through the same ring as extra steps.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.segments import TILE_ROWS
from pallas_kernels.tuning import GemmTiles, jobs_per_tile

TILE_M, TILE_N, TILE_K = TILE_ROWS, 256, 64
_PIECE = 64  # rows and columns of a staged piece of output


class Place(NamedTuple):
    """A tile of outputs: which one, and what `fetch` read of its rows."""

    row_tile: jax.Array
    column_tile: jax.Array
    loaded: tuple

    @property
    def row(self) -> jax.Array:
        """First row; computed where it is used, for the compiler to see what divides it."""
        return self.row_tile * TILE_M

    @property
    def column(self) -> jax.Array:
        """First column."""
        return self.column_tile * TILE_N


def walk(
    fetch: Callable[[jax.Array], tuple],
    shape: tuple[int, int],
    sizes: GemmTiles,
    sms: int,
    before: int,
    step: jax.Array,
    visit: Callable[[Place, jax.Array], jax.Array],
) -> tuple[int, jax.Array]:
    """Visits this block's tiles of one output, continuing the grid's round over all outputs.

    Args:
        fetch: reads what `visit` needs to know of a row tile, given its index. That of the next
            tile is read while this one is worked on, so that the latency is hidden.
        shape: rows and columns of the output.
        sizes: order of the walk.
        sms: number of blocks.
        before: tiles of the outputs already walked, over all blocks.
        step: of the ring, that the first tile starts with.
        visit: called with a tile and the step it starts with; returns the step after it.

    Returns:
        The count of tiles walked so far over all blocks, and the next step of the ring.
    """
    counts = (-(-shape[0] // TILE_M), -(-shape[1] // TILE_N))
    total = counts[0] * counts[1]
    start = lax.rem(lax.axis_index("sm") + jnp.int32(sms - before % sms), jnp.int32(sms))
    mine = lax.div(jnp.int32(total + sms - 1) - start, jnp.int32(sms))

    def locate(turn):
        index = jnp.minimum(start + turn * sms, total - 1)
        row, column = mgpu.planar_snake(index, counts, "mn".index(sizes.minor), sizes.width)
        return Place(row, column, fetch(row))

    def one(turn, carry):
        step, place = carry
        following = locate(turn + 1)
        return visit(place, step), following

    return before + total, lax.fori_loop(0, mine, one, (step, locate(jnp.int32(0))))[0]


class Jobs(NamedTuple):
    """Passes over rows or columns of X that a block makes beside its tiles.

    Attributes:
        number: how many.
        job: gives the job of a turn, from 0 to number - 1.
    """

    number: jax.Array
    job: Callable[[jax.Array], jax.Array]


def share_jobs(jobs: int, length: int, contracted: int, tiles: int, blocks: int) -> Jobs:
    """Returns this block's jobs. Those that have a tile less than others take them first.

    Args:
        jobs: how many there are; the first ones are done first.
        length: of a job, which goes over 128 x length elements.
        contracted: contraction size of a tile.
        tiles: of all outputs.
        blocks: that walk over them.
    """
    light = blocks - tiles % blocks  # they are the last ones, or all
    early = min(jobs, light * jobs_per_tile(length, contracted))
    block = lax.axis_index("sm")
    spare = block - (blocks - light)
    own = lax.div(early - spare + (light - 1), jnp.int32(light))
    own = jnp.where(spare >= 0, own, jnp.int32(0))
    more = lax.div(jnp.maximum(jobs - early - block + (blocks - 1), 0), jnp.int32(blocks))

    def job(turn):
        return jnp.where(turn < own, spare + turn * light, early + block + (turn - own) * blocks)

    return Jobs(own + more, job)


def tile_count(rows: int, widths: Sequence[int]) -> int:
    """Tiles of all outputs."""
    return -(-rows // TILE_M) * sum(-(-width // TILE_N) for width in widths)


def share(warpgroup, sizes: GemmTiles) -> tuple:
    """Shape and offsets of a warpgroup's part of the block's tile."""
    if sizes.split == "m":
        return (TILE_M // 2, TILE_N), warpgroup * (TILE_M // 2), 0
    return (TILE_M, TILE_N // 2), 0, warpgroup * (TILE_N // 2)


def steps_of(size: int) -> int:
    """Ring steps that a contraction of this size takes."""
    return -(-size // TILE_K)


def contract(
    ring: mgpu.Ring,
    accumulator,
    first,
    steps: int,
    operands: Callable,
    *,
    more=None,
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
    if steps > 1:
        loop(1, steps)
    total = steps
    if more is not None:
        total = steps + more
        loop(jnp.int32(steps), total)
    mgpu.wgmma_wait(0)
    ring.release(first + total - 1)


def ring_scratch(sizes: GemmTiles, dtype, *, transposed: bool) -> tuple:
    """SMEM and barriers of a ring of products; `transposed` for weights as [out, in] blocks."""
    block = (TILE_N, TILE_K) if transposed else (TILE_K, TILE_N)
    return (
        mgpu.tiles_buffer(sizes.stages, TILE_M, TILE_K, dtype),
        mgpu.tiles_buffer(sizes.stages, *block, dtype),
        *mgpu.Ring.barriers(sizes.stages, copies=2, consumers=2),
    )


def epilogue_scratch(sizes: GemmTiles, dtype):
    """SMEM that outputs are staged in."""
    return mgpu.SMEM(
        (2, sizes.staged, _PIECE, _PIECE), dtype, transforms=mgpu.swizzled(_PIECE, dtype)
    )


def store_tile(value, staged, warpgroup, out_g, first_row, first_column) -> None:
    """Writes a warpgroup's outputs through SMEM; what lies outside the array is clipped."""
    slots, width = staged.shape[1], out_g.shape[1]
    pieces = [
        (row, column)
        for row in range(0, value.shape[0], _PIECE)
        for column in range(0, value.shape[1], _PIECE)
    ]
    # Mosaic drops the index of a dimension in which array and copy are one piece: all pieces of
    # such an output would go to column 0. Those outside are left out, hence nothing is counted.
    narrow = width <= _PIECE
    for index, (row, column) in enumerate(pieces):
        slot = staged.at[warpgroup, index % slots]
        # At most one piece less than there are slots is still on its way out of SMEM.
        mgpu.wait_smem_to_gmem(0 if narrow else slots - 1, wait_read_only=True)
        slot[...] = value[row : row + _PIECE, column : column + _PIECE]
        mgpu.commit_smem()
        rows_, columns = (first_row + row, _PIECE), (first_column + column, _PIECE)

        def copy(slot=slot, rows_=rows_, columns=columns):
            mgpu.copy_smem_to_gmem(slot, out_g.at[mgpu.pl.ds(*rows_), mgpu.pl.ds(*columns)])

        if narrow:
            mgpu.pl.when(first_column + column < width)(copy)
        else:
            copy()
