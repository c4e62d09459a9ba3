"""dA = dS^T drop(X) for all projections that share X, from one read of X; ordered partial sums,
or atomic ones.

A block owns a panel of columns and a stretch of row tiles sorted by adapter, of which it keeps one
adapter's dA at a time in registers. Each warpgroup has its own columns.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels import segments
from pallas_kernels.lora.mask import load_keys, mask_tile, row_mask
from pallas_kernels.segments import TILE_ROWS, Tiles, read_facts
from pallas_kernels.tuning import GradDownTiles

_RANKS = 64  # rows of dA per product
_MAX_CHUNKS = 3  # of them per block: 96 registers


@mgpu.traced_once
def grad_down(
    x: Float[Array, "T K"], ds: Float[Array, "T _"], rank: int, rows: Tiles, sizes: GradDownTiles
) -> Float[Array, "E RC K"]:
    """Returns dA of all projections, concatenated along the rank, in float32.

    Args:
        x: input rows.
        ds: gradient of all projections' S side by side, with the LoRA scale and the factor of kept
            values; zero in padding rows.
        rank: leading columns of ds in use, RC.
        rows: routing of the rows.
        sizes: tile sizes.
    """
    k, dtype = x.shape[1], x.dtype
    slots, num_tiles = rows.start.shape[0] - 1, rows.walk.shape[0]
    length = -(-num_tiles // sizes.splits)
    splits = -(-num_tiles // length)
    share = sizes.panel // 2
    chunks = min(_MAX_CHUNKS, -(-rank // _RANKS))

    def body(
        x_g, ds_g, walk_g, start_g, key_g, site_g, part_g, x_s, ds_s, key_s, out_s, full, empty
    ):
        panel, first_rank = lax.axis_index("panel"), lax.axis_index("rank") * (chunks * _RANKS)
        split = segments.split_bounds(start_g, slots, lax.axis_index("split"), length)
        ring = mgpu.Ring((x_s, ds_s, key_s), full, empty, sizes.stages)

        def memory():
            @mgpu.pl.loop(split.first, split.last)
            def _(position):
                tile = read_facts(walk_g, position).tile
                here = mgpu.pl.ds(tile * TILE_ROWS, TILE_ROWS)
                columns = mgpu.pl.ds(panel * sizes.panel, sizes.panel)
                ranks = mgpu.pl.ds(first_rank, chunks * _RANKS)
                ring.fill(
                    position - split.first,
                    (x_g.at[here, columns], ds_g.at[here, ranks], key_g.at[here]),
                )

            ring.drain(split.last - split.first)

        def compute(warpgroup):
            mine = mgpu.pl.ds(warpgroup * share, share)
            first_column = panel * sizes.panel + warpgroup * share

            def products(accumulators, first, last):
                @mgpu.pl.loop(first, last)
                def _(position):
                    facts, step = read_facts(walk_g, position), position - split.first
                    x_tile, ds_tile, key_tile = ring.take(step)
                    x_mine = x_tile.at[:, mine]

                    @mgpu.pl.when((facts.threshold > 0) | (facts.padding > 0))
                    def _():
                        mask = row_mask(load_keys(key_tile), site_g[0], facts.threshold)
                        mask_tile(x_mine, mask, facts.threshold, first_column)

                    for chunk, accumulator in enumerate(accumulators):
                        ds_chunk = ds_tile.at[:, mgpu.pl.ds(chunk * _RANKS, _RANKS)]
                        mgpu.wgmma(accumulator, ds_chunk.transpose((1, 0)), x_mine)
                    mgpu.wgmma_wait(0)
                    ring.release(step)

                return [accumulator[...] for accumulator in accumulators]

            def run(slot, first, last, segment):
                totals = mgpu.accumulate_all(
                    [(_RANKS, share)] * chunks, lambda *accs: products(accs, first, last)
                )
                for chunk, total in enumerate(totals):
                    mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    out_s[warpgroup] = total
                    mgpu.commit_smem()
                    ranks = mgpu.pl.ds(first_rank + chunk * _RANKS, _RANKS)
                    part = slot if sizes.atomic else segment
                    mgpu.copy_smem_to_gmem(
                        out_s.at[warpgroup],
                        part_g.at[part, ranks, mgpu.pl.ds(first_column, share)],
                        reduction_op="add" if sizes.atomic else None,
                    )

            segments.for_each_run(split, walk_g, start_g, slots, run)
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    part_shape = (splits + slots - 1, rank, k)
    sums = mgpu.accumulators([(slots, rank, k)]) if sizes.atomic else []
    parts = mgpu.launch(
        body,
        out_type=() if sizes.atomic else jax.ShapeDtypeStruct(part_shape, jnp.float32),
        grid=(splits, -(-rank // (chunks * _RANKS)), -(-k // sizes.panel)),
        grid_names=("split", "rank", "panel"),
        scratch=(
            mgpu.tiles_buffer(sizes.stages, TILE_ROWS, sizes.panel, dtype),
            mgpu.tiles_buffer(sizes.stages, TILE_ROWS, chunks * _RANKS, dtype),
            mgpu.SMEM((sizes.stages, TILE_ROWS), jnp.uint32),
            mgpu.tiles_buffer(2, _RANKS, share, jnp.float32),
            *mgpu.Ring.barriers(sizes.stages, copies=3, consumers=2),
        ),
        name="lora_grad_down",
    )(x, ds, rows.walk, rows.start, rows.row_key, rows.site, *sums)
    if sizes.atomic:
        return mgpu.frozen(sums)[0]
    return segments.sum_segments(parts, rows.start, length)
