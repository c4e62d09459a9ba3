"""S_i = scale * drop(X) A_i^T for all projections that share X, from one read of X.

Memory bound. A block owns 64 rows (and, where rows are few, a part of the columns); its two compute
warpgroups take alternate column steps and are summed through SMEM.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora.mask import load_keys, mask_tile, row_mask
from pallas_kernels.tuning import DownTiles

ROWS = 64  # per block
_TILE_ROWS = 128  # per adapter


def down(
    x: Float[Array, "T K"],
    a: Float[Array, "E RC K"],
    tile_adapter: Int[Array, " tiles"],
    factor: Float[Array, " E"],
    threshold: Int[Array, " E"],
    row_key: UInt32[Array, " Tp"],
    site: UInt32[Array, " 1"],
    ranks: tuple[int, ...],
    tiles: DownTiles,
) -> tuple[Float[Array, "T _"], ...]:
    """Returns S of each projection in X's dtype; zero in padding rows and tiles without adapter.

    Args:
        x: input rows.
        a: down-projections of all projections, concatenated along the rank, in x's dtype.
        tile_adapter: slot of each tile of 128 rows, -1 for none.
        factor: LoRA scale times the factor of kept values, per slot.
        threshold: drop threshold per slot.
        row_key: dropout identity per row, padded with zeros to whole tiles.
        site: dropout site.
        ranks: rank of each projection, multiples of 8 that add up to RC.
        tiles: sizes.
    """
    (rows, k), rank, dtype = x.shape, a.shape[1], x.dtype
    steps = 2 * -(-k // (2 * tiles.tile_k * tiles.splits))  # per split; both warpgroups alike
    stages = min(tiles.stages, steps)
    whole = tiles.splits == 1
    out_dtype = dtype if whole else jnp.float32

    def body(x_g, a_g, tile_g, factor_g, threshold_g, key_g, site_g, *rest):
        out_gs, (x_s, a_s, sum_s, *out_ss, full, empty, summed) = (
            rest[: len(ranks)],
            rest[len(ranks) :],
        )
        block, split = jax.lax.axis_index("rows"), jax.lax.axis_index("split")
        first_row, first_step = block * ROWS, split * steps
        adapter = tile_g[block * ROWS // _TILE_ROWS]
        slot = jnp.maximum(adapter, 0)
        count = jnp.where(adapter >= 0, jnp.int32(steps), jnp.int32(0))
        ring = mgpu.Ring((x_s, a_s), full, empty, stages)

        def memory():
            @mgpu.pl.loop(0, count)
            def _(step):
                columns = mgpu.pl.ds((first_step + step) * tiles.tile_k, tiles.tile_k)
                rows_ = mgpu.pl.ds(first_row, ROWS)
                ring.fill(step, (x_g.at[rows_, columns], a_g.at[slot, :, columns]))

            ring.drain(count)

        def products(warpgroup, accumulator):
            mask = row_mask(load_keys(key_g, first_row, ROWS), site_g[0], threshold_g[slot])

            @mgpu.pl.loop(0, count // 2)
            def _(pair):
                # The number of stages is even: a barrier is only ever waited on by one warpgroup.
                step = 2 * pair + warpgroup
                x_tile, a_tile = ring.take(step)
                first_column = (first_step + step) * tiles.tile_k
                mask_tile(x_tile, mask, threshold_g[slot], first_column)
                mgpu.wgmma(accumulator, x_tile, a_tile.transpose((1, 0)))
                mgpu.wgmma_wait(0)
                ring.release(step)

        def store(total):
            low = 0
            for r, out_s, out_g in zip(ranks, out_ss, out_gs, strict=True):
                out_s[...] = total[:, low : low + r].astype(out_dtype)
                low += r
                mgpu.commit_smem()
                rows_ = mgpu.pl.ds(first_row, ROWS)
                mgpu.copy_smem_to_gmem(
                    out_s, out_g.at[rows_, :] if whole else out_g.at[split, rows_, :]
                )
            mgpu.wait_smem_to_gmem(0)

        def compute(warpgroup):
            part = mgpu.accumulate((ROWS, rank), lambda acc: products(warpgroup, acc))

            @mgpu.pl.when(warpgroup == 1)
            def _():
                sum_s[...] = part
                mgpu.barrier_arrive(summed)

            @mgpu.pl.when(warpgroup == 0)
            def _():
                mgpu.barrier_wait(summed)
                other = mgpu.load(sum_s, layout=mgpu.Layout.WGMMA)
                store((part + other) * factor_g[slot])

        mgpu.warp_specialize(memory, compute)

    lead = () if whole else (tiles.splits,)
    outs = mgpu.launch(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((*lead, rows, r), out_dtype) for r in ranks),
        grid=(-(-rows // ROWS), tiles.splits),
        grid_names=("rows", "split"),
        scratch=(
            mgpu.tiles_buffer(stages, ROWS, tiles.tile_k, dtype),
            mgpu.tiles_buffer(stages, rank, tiles.tile_k, dtype),
            mgpu.SMEM((ROWS, rank), jnp.float32),
            *(mgpu.SMEM((ROWS, r), out_dtype) for r in ranks),
            *mgpu.Ring.barriers(stages, copies=2, consumers=1),
            mgpu.Barrier(num_arrivals=1),
        ),
        name="lora_down",
    )(x, a, tile_adapter, factor, threshold, row_key, site)
    return tuple(outs) if whole else tuple(out.sum(0).astype(dtype) for out in outs)
