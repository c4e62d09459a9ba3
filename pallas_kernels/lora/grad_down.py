"""dA = dS^T drop(X) for all projections that share X, from one read of X; ordered partial sums.

A block owns a panel of columns and a stretch of row tiles sorted by adapter, of which it keeps one
adapter's dA at a time in registers. Each warpgroup has its own columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import _mgpu as mgpu
from pallas_kernels import segments
from pallas_kernels.lora.mask import load_keys, mask_tile, row_mask
from pallas_kernels.tuning import GradDownTiles

_ROWS = 128
_RANKS = 64  # rows of dA at a time: one wgmma


def grad_down(
    x: Float[Array, "T K"],
    ds: Float[Array, "T RC"],
    order: segments.TileOrder,
    threshold: Int[Array, " E"],
    row_key: UInt32[Array, " Tp"],
    has_padding: Int[Array, " tiles"],
    site: UInt32[Array, " 1"],
    tiles: GradDownTiles,
) -> Float[Array, "E RC K"]:
    """Returns dA of all projections, concatenated along the rank, in float32.

    Args:
        x: input rows.
        ds: gradient of all projections' S side by side, with the LoRA scale and the factor of kept
            values; zero in padding rows, unread in tiles without adapter.
        order: tiles sorted by adapter.
        threshold: drop threshold per slot.
        row_key: dropout identity per row, padded with zeros to whole tiles.
        has_padding: per tile, 1 if a row of it is padding.
        site: dropout site.
        tiles: sizes.
    """
    k, rank, dtype = x.shape[1], ds.shape[1], x.dtype
    slots, num_tiles = threshold.shape[0], order.tile.shape[0]
    length = -(-num_tiles // tiles.splits)
    splits = -(-num_tiles // length)
    share = tiles.panel // 2

    def body(
        x_g, ds_g, tile_g, adapter_g, start_g, threshold_g, key_g, padding_g, site_g, part_g,
        x_s, ds_s, out_s, full, empty,
    ):  # fmt: skip
        panel, chunk = lax.axis_index("panel"), lax.axis_index("rank")
        split = segments.split_bounds(start_g, slots, lax.axis_index("split"), length)
        ring = mgpu.Ring((x_s, ds_s), full, empty, tiles.stages)

        def memory():
            @mgpu.pl.loop(split.first, split.last)
            def _(position):
                here = mgpu.pl.ds(tile_g[position] * _ROWS, _ROWS)
                columns = mgpu.pl.ds(panel * tiles.panel, tiles.panel)
                ranks = mgpu.pl.ds(chunk * _RANKS, _RANKS)
                ring.fill(position - split.first, (x_g.at[here, columns], ds_g.at[here, ranks]))

            ring.drain(split.last - split.first)

        def compute(warpgroup):
            mine = mgpu.pl.ds(warpgroup * share, share)
            first_column = panel * tiles.panel + warpgroup * share

            def products(accumulator, slot, first, last):
                @mgpu.pl.loop(first, last)
                def _(position):
                    step, tile = position - split.first, tile_g[position]
                    x_tile, ds_tile = ring.take(step)
                    x_mine = x_tile.at[:, mine]

                    @mgpu.pl.when((threshold_g[slot] > 0) | (padding_g[tile] > 0))
                    def _():
                        keys = load_keys(key_g, tile * _ROWS, _ROWS)
                        mask = row_mask(keys, site_g[0], threshold_g[slot])
                        mask_tile(x_mine, mask, threshold_g[slot], first_column)

                    mgpu.wgmma(accumulator, ds_tile.transpose((1, 0)), x_mine)
                    mgpu.wgmma_wait(0)
                    ring.release(step)

            def run(slot, first, last, segment):
                total = mgpu.accumulate(
                    (_RANKS, share), lambda acc: products(acc, slot, first, last)
                )
                mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out_s[warpgroup] = total
                mgpu.commit_smem()
                mgpu.copy_smem_to_gmem(
                    out_s.at[warpgroup],
                    part_g.at[
                        segment, mgpu.pl.ds(chunk * _RANKS, _RANKS), mgpu.pl.ds(first_column, share)
                    ],
                )

            segments.for_each_run(split, adapter_g, start_g, run)
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    parts = mgpu.launch(
        body,
        out_type=jax.ShapeDtypeStruct((splits + slots - 1, rank, k), jnp.float32),
        grid=(splits, -(-rank // _RANKS), -(-k // tiles.panel)),
        grid_names=("split", "rank", "panel"),
        scratch=(
            mgpu.tiles_buffer(tiles.stages, _ROWS, tiles.panel, dtype),
            mgpu.tiles_buffer(tiles.stages, _ROWS, _RANKS, dtype),
            mgpu.SMEM((2, _RANKS, share), jnp.float32),
            *mgpu.Ring.barriers(tiles.stages, copies=2, consumers=2),
        ),
        name="lora_grad_down",
    )(x, ds, *order, threshold, row_key, has_padding, site)
    return segments.sum_segments(parts, order.start, length)
