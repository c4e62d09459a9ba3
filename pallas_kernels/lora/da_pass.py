"""dA = dS^T drop(X) at the tail of `dx`, by blocks of its persistent grid that have a tile less.

A block takes whole panels of columns of X over all rows, so that there are no partial sums and no
order of blocks that could matter. Its tiles go to the slots of the products' ring, once those are
done.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora import gemm
from pallas_kernels.lora.mask import load_keys, mask_tile, row_mask
from pallas_kernels.segments import TILE_ROWS, facts_of, load_facts
from pallas_kernels.tuning import GemmTiles

RANKS = 64  # rows of dA: those of all projections, and zeros
PANEL = 128  # columns of a panel
_HALF = PANEL // 2  # columns of a warpgroup


class Operands(NamedTuple):
    """References to what dA is made of."""

    x: jax.Array
    ds: jax.Array
    walk: jax.Array
    start: jax.Array
    row_key: jax.Array
    site: jax.Array


def scratch(sizes: GemmTiles) -> tuple:
    """SMEM for row keys, and barriers of the ring."""
    keys = mgpu.SMEM((sizes.stages, TILE_ROWS), jnp.uint32)
    return keys, *mgpu.Ring.barriers(sizes.stages, copies=4, consumers=2)


class DaPass:
    """The pass inside a kernel: the same calls in the memory and in the compute warpgroups.

    Args:
        operands: what dA is made of.
        da_g: output, [slots, RANKS, k].
        ring: that of the products, with slots of 128 x 64 and 256 x 64.
        own: of the types that `scratch` gives.
        contracted: contraction size of the products.
        tiles: of their outputs.
        blocks: in the grid.
    """

    def __init__(
        self, operands: Operands, da_g, ring: mgpu.Ring, own, contracted: int, tiles: int,
        blocks: int,
    ):  # fmt: skip
        self._from, self._out = operands, da_g
        self._slots, (rows, self._k) = operands.start.shape[0] - 1, operands.x.shape
        self._jobs = gemm.share_jobs(-(-self._k // PANEL), rows, contracted, tiles, blocks)
        narrow, self._wide = ring.buffers
        halves = [mgpu.Window(lambda slot, half=half: self._half(slot, half)) for half in range(2)]
        keys, full, empty = own
        self._ring = mgpu.Ring((*halves, narrow, keys), full, empty, ring.stages)

    def _half(self, slot, half):
        """A slot's tile of X, half of the columns."""
        return self._wide.at[slot, mgpu.pl.ds(half * TILE_ROWS, TILE_ROWS), :]

    def _first_column(self, turn):
        """Of the panel of a turn."""
        return self._jobs.job(turn) * PANEL

    def _used(self):
        """Row tiles that have an adapter, the first ones of the walk."""
        return self._from.start[self._slots]

    def load(self) -> None:
        """The memory warpgroup's part, once it has drained the ring of the products."""
        used = self._used()

        @mgpu.pl.loop(0, self._jobs.number)
        def _(turn):
            column = self._first_column(turn)

            @mgpu.pl.loop(0, used)
            def _(position):
                tile = lax.convert_element_type(self._from.walk[position, 0], jnp.int32)
                here = mgpu.pl.ds(tile * TILE_ROWS, TILE_ROWS)
                halves = (mgpu.pl.ds(column + half * _HALF, _HALF) for half in range(2))
                self._ring.fill(
                    turn * used + position,
                    (
                        *(self._from.x.at[here, half] for half in halves),
                        self._from.ds.at[here, mgpu.pl.ds(0, RANKS)],
                        self._from.row_key.at[here],
                    ),
                )

        self._ring.drain(self._jobs.number * used)

    def compute(self, warpgroup) -> None:
        """A compute warpgroup's part: half of the columns of each panel."""
        used = self._used()

        @mgpu.pl.loop(0, self._jobs.number)
        def _(turn):
            column = self._first_column(turn) + warpgroup * _HALF

            @mgpu.pl.loop(0, self._slots)
            def _(slot):
                first, last = self._from.start[slot], self._from.start[slot + 1]
                [total] = mgpu.accumulate_all(
                    [(RANKS, _HALF)],
                    lambda acc: self._sum(warpgroup, acc, column, first, last, turn * used),
                )

                @mgpu.pl.when(column < self._k)
                def _():
                    self._out[slot, :, mgpu.pl.ds(column, _HALF)] = total

    def _sum(self, warpgroup, accumulator, column, first, last, steps_before):
        """Adds up the tiles of an adapter, from `first` to `last` of the walk."""
        end = self._from.walk.shape[0] - 1

        def one(position, loaded):
            following = load_facts(self._from.walk, jnp.minimum(position + 1, end))
            step = steps_before + position
            _, _, ds_tile, key_tile = self._ring.take(step)
            x_mine = self._half(self._ring.slot(step), warpgroup)
            facts = facts_of(loaded)

            @mgpu.pl.when((facts.threshold > 0) | (facts.padding > 0))
            def _():
                mask = row_mask(load_keys(key_tile), self._from.site[0], facts.threshold)
                mask_tile(x_mine, mask, facts.threshold, column)

            mgpu.wgmma(accumulator, ds_tile.transpose((1, 0)), x_mine)
            mgpu.wgmma_wait(1)  # the product of the tile before ran beside this one's mask

            @mgpu.pl.when(position > first)
            def _():
                self._ring.release(step - 1)

            return following

        lax.fori_loop(first, last, one, load_facts(self._from.walk, jnp.minimum(first, end)))
        mgpu.wgmma_wait(0)

        @mgpu.pl.when(first < last)
        def _():
            self._ring.release(steps_before + last - 1)

        return [accumulator[...]]
