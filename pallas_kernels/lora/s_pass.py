"""S = scale * drop(X) A^T at the head of `base_up`, by blocks of its persistent grid.

A block makes S of whole row tiles before its own tiles of outputs, through the same ring, and
raises a flag per row tile. Whoever needs S of a row tile, at the end of its contraction over K,
waits for the flag. That cannot stand still: making S waits for nothing but the block's own ring,
and all blocks run at the same time, one on each multiprocessor.

The numbers are those of `down`, bit for bit: 128 columns go to one sum and the next 128 to another.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora import gemm
from pallas_kernels.lora.gemm import TILE_K, TILE_M
from pallas_kernels.lora.mask import load_keys, mask_tile, row_mask
from pallas_kernels.segments import read_facts

MAX_RANKS = 64  # of all projections: a piece of A fits in a staged piece of outputs
_HALF = TILE_M // 2  # rows of a warpgroup
_QUAD = 4  # ring steps, of which two go to each sum


def together_barrier():
    """Type of the barrier at which the warpgroups of a block meet once it has made S.

    The interpreter has no flags: there the memory warpgroup waits as well, and the only block of
    the grid needs no others.
    """
    return mgpu.Barrier(num_arrivals=3 if mgpu.interpreting() else 2)


class Operands(NamedTuple):
    """References to what S is made of: A is that of all projections side by side."""

    x: jax.Array
    a: jax.Array
    table: jax.Array
    row_key: jax.Array
    site: jax.Array


class SPass:
    """The pass inside a kernel: the same calls in the memory and in the compute warpgroups.

    Args:
        operands: what S is made of.
        s_gs: outputs, of whole row tiles.
        ring: that of the products.
        staged: where they stage outputs; holds pieces of A as long as there are none.
        together: see `together_barrier`.
        tiles: of all outputs.
        blocks: in the grid.
    """

    def __init__(
        self, operands: Operands, s_gs: Sequence, ring: mgpu.Ring, staged, together, tiles: int,
        blocks: int,
    ):  # fmt: skip
        k = operands.x.shape[1]
        self._from, self._outs = operands, s_gs
        self._ranks = operands.a.shape[1]
        self._row_tiles = s_gs[0].shape[0] // TILE_M
        self._together = together
        self._steps = _QUAD * -(-k // (_QUAD * TILE_K))  # per row tile
        self._jobs = gemm.share_jobs(self._row_tiles, k, k, tiles, blocks)
        self._flags = mgpu.Flags(self._row_tiles)
        pieces = staged.shape[1]  # of each warpgroup

        def piece(slot):
            first, second = jax.lax.div(slot, pieces), jax.lax.rem(slot, pieces)
            return staged.at[first, second, mgpu.pl.ds(0, self._ranks)]

        buffers = ring.buffers[0], mgpu.Window(piece)
        self._ring = mgpu.Ring(buffers, ring.full, ring.empty, ring.stages)

    @property
    def steps(self) -> jax.Array:
        """Ring steps that this block spends on S."""
        return self._jobs.number * self._steps

    def wait(self, tile) -> None:
        """Waits until S of a row tile can be loaded."""
        self._flags.wait(tile, 2)  # one of each warpgroup

    def load(self) -> None:
        """The memory warpgroup's part."""

        @mgpu.pl.loop(0, self._jobs.number)
        def _(turn):
            tile = self._jobs.job(turn)
            slot = jax.numpy.maximum(read_facts(self._from.table, tile).adapter, 0)
            here = mgpu.pl.ds(tile * TILE_M, TILE_M)

            @mgpu.pl.loop(0, self._steps)
            def _(step):
                columns = mgpu.pl.ds(step * TILE_K, TILE_K)
                self._ring.fill(
                    turn * self._steps + step,
                    (self._from.x.at[here, columns], self._from.a.at[slot, :, columns]),
                )

        if mgpu.interpreting():
            self._meet()

    def _meet(self):
        mgpu.barrier_arrive(self._together)
        mgpu.barrier_wait(self._together)

    def compute(self, warpgroup) -> None:
        """A compute warpgroup's part: half of the rows of each row tile."""

        @mgpu.pl.loop(0, self._jobs.number)
        def _(turn):
            self._make(warpgroup, self._jobs.job(turn), turn * self._steps)

        self._meet()  # nothing is staged before neither reads pieces of A any more

    def _make(self, warpgroup, tile, first) -> None:
        here = mgpu.pl.ds(tile * TILE_M + warpgroup * _HALF, _HALF)
        facts = read_facts(self._from.table, tile)
        mask = row_mask(load_keys(self._from.row_key.at[here]), self._from.site[0], facts.threshold)

        def products(*sums):
            @mgpu.pl.loop(0, self._steps // _QUAD)
            def _(quad):
                for part in range(_QUAD):
                    index = quad * _QUAD + part
                    x_tile, a_tile = self._ring.take(first + index)
                    x_mine = x_tile.at[mgpu.pl.ds(warpgroup * _HALF, _HALF), :]

                    @mgpu.pl.when((facts.threshold > 0) | (facts.padding > 0))
                    def _(x_mine=x_mine, index=index):
                        mask_tile(x_mine, mask, facts.threshold, index * TILE_K)

                    mgpu.wgmma(sums[part // 2], x_mine, a_tile.transpose((1, 0)))
                    if part:  # the product of the step before ran beside this one's mask
                        mgpu.wgmma_wait(1)
                        self._ring.release(first + index - 1)
                mgpu.wgmma_wait(0)
                self._ring.release(first + quad * _QUAD + _QUAD - 1)

            return [value[...] for value in sums]

        even, odd = mgpu.accumulate_all([(_HALF, self._ranks)] * 2, products)
        total = ((even + odd) * facts.factor).astype(self._outs[0].dtype)

        low = 0
        for out in self._outs:
            rank = out.shape[1]
            out[here, :] = total[:, low : low + rank]
            low += rank
        self._flags.raise_(tile)
