"""S = scale * drop(X) A^T at the head of `base_up`, by blocks of its persistent grid.

A block makes S of whole row tiles before its own tiles of outputs, in the slots of their ring, and
raises a flag per row tile. Whoever needs S of a row tile, at the end of its contraction over K,
waits for the flag. That cannot stand still: making S waits for nothing but the block's own ring,
and all blocks run at the same time, one on each multiprocessor.

The numbers are those of `down`, bit for bit: 128 columns go to one sum and the next 128 to another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora import gemm
from pallas_kernels.lora.gemm import TILE_K, TILE_M
from pallas_kernels.lora.mask import load_keys, mask_tile, row_mask
from pallas_kernels.segments import read_facts
from pallas_kernels.tuning import GemmTiles

MAX_RANKS = 32  # of all projections: as many fit in a quarter of a slot for X
_HALF = TILE_M // 2  # rows of a step, and of a warpgroup
_COLUMNS = 4 * TILE_K  # of a step


def scratch(sizes: GemmTiles) -> tuple:
    """Barriers of the ring of this pass.

    The interpreter has no flags: there all three warpgroups meet once S is made, in the only block.
    """
    meeting = (mgpu.Barrier(num_arrivals=3),) if mgpu.interpreting() else ()
    return (*mgpu.Ring.barriers(sizes.stages, copies=5, consumers=1), *meeting)


class Operands(NamedTuple):
    """References to what S is made of: A is that of all projections side by side."""

    x: jax.Array
    a: jax.Array
    table: jax.Array
    row_key: jax.Array
    site: jax.Array


class SPass:
    """The pass inside a kernel: the same calls in the memory and in the compute warpgroups.

    Each warpgroup owns half of the rows and every other slot; the number of slots is even, so that
    a barrier is only ever waited on by one warpgroup. A slot for W holds 64 rows and 256 columns of
    X here, and one for X four pieces of A.

    Args:
        operands: what S is made of.
        s_gs: outputs, of whole row tiles.
        ring: that of the products.
        own: of the types that `scratch` gives.
        tiles: of all outputs.
        blocks: in the grid.
    """

    def __init__(
        self, operands: Operands, s_gs: Sequence, ring: mgpu.Ring, own, tiles: int, blocks: int
    ):
        k = operands.x.shape[1]
        self._from, self._outs, self._ranks = operands, s_gs, operands.a.shape[1]
        self._steps = -(-k // _COLUMNS)  # of a warpgroup per row tile
        row_tiles = s_gs[0].shape[0] // TILE_M
        self._jobs = gemm.share_jobs(row_tiles, k, k, tiles, blocks)
        self._flags = mgpu.Flags(row_tiles)
        narrow, wide = ring.buffers

        def piece(slot, quarter):
            return narrow.at[slot, mgpu.pl.ds(quarter * MAX_RANKS, self._ranks), :]

        pieces = (mgpu.Window(lambda slot, q=quarter: piece(slot, q)) for quarter in range(4))
        full, empty, *self._meeting = own
        self._ring = mgpu.Ring((wide, *pieces), full, empty, ring.stages)

    def wait(self, tile) -> None:
        """Waits until S of a row tile can be loaded."""
        self._flags.wait(tile, 2)  # one of each warpgroup

    def load(self) -> None:
        """The memory warpgroup's part; afterwards the slots are free for the products."""

        @mgpu.pl.loop(0, self._jobs.number)
        def _(turn):
            tile = self._jobs.job(turn)
            slot = jnp.maximum(read_facts(self._from.table, tile).adapter, 0)

            @mgpu.pl.loop(0, self._steps)
            def _(index):
                first = index * _COLUMNS
                quarters = [mgpu.pl.ds(first + q * TILE_K, TILE_K) for q in range(4)]
                pieces = [self._from.a.at[slot, :, quarter] for quarter in quarters]
                for half in range(2):
                    rows = mgpu.pl.ds(tile * TILE_M + half * _HALF, _HALF)
                    x = self._from.x.at[rows, mgpu.pl.ds(first, _COLUMNS)]
                    self._ring.fill(2 * (turn * self._steps + index) + half, (x, *pieces))

        self._ring.drain(2 * self._jobs.number * self._steps)
        self._meet()

    def _meet(self):
        for barrier in self._meeting:
            mgpu.barrier_arrive(barrier)
            mgpu.barrier_wait(barrier)

    def compute(self, warpgroup) -> None:
        """A compute warpgroup's part: half of the rows of each row tile."""

        @mgpu.pl.loop(0, self._jobs.number)
        def _(turn):
            self._make(warpgroup, self._jobs.job(turn), turn * self._steps)

        self._meet()

    def _make(self, warpgroup, tile, first) -> None:
        here = mgpu.pl.ds(tile * TILE_M + warpgroup * _HALF, _HALF)
        facts = read_facts(self._from.table, tile)
        mask = row_mask(load_keys(self._from.row_key.at[here]), self._from.site[0], facts.threshold)

        def products(*sums):
            @mgpu.pl.loop(0, self._steps)
            def _(index):
                step = 2 * (first + index) + warpgroup
                x_tile, *pieces = self._ring.take(step)
                for quarter, a_tile in enumerate(pieces):
                    x_mine = x_tile.at[:, mgpu.pl.ds(quarter * TILE_K, TILE_K)]

                    @mgpu.pl.when((facts.threshold > 0) | (facts.padding > 0))
                    def _(x_mine=x_mine, quarter=quarter):
                        column = index * _COLUMNS + quarter * TILE_K
                        mask_tile(x_mine, mask, facts.threshold, column)

                    # Runs beside the mask of the next quarter.
                    mgpu.wgmma(sums[quarter // 2], x_mine, a_tile.transpose((1, 0)))
                mgpu.wgmma_wait(0)
                self._ring.release(step)

            return [value[...] for value in sums]

        even, odd = mgpu.accumulate_all([(_HALF, self._ranks)] * 2, products)
        total = ((even + odd) * facts.factor).astype(self._outs[0].dtype)
        low = 0
        for out in self._outs:
            rank = out.shape[1]
            out[here, :] = total[:, low : low + rank]
            low += rank
        self._flags.raise_(tile)
