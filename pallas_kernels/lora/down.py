"""S_i = scale * drop(X) A_i^T for all projections that share X, from one read of X.

Memory bound. A block owns 64 rows (and, where rows are few, a part of the columns); its two compute
warpgroups take alternate column steps and are summed through SMEM.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora.mask import load_keys, mask_tile, row_mask
from pallas_kernels.segments import TILE_ROWS, Tiles, read_facts
from pallas_kernels.tuning import DownTiles

_ROWS = 64  # per block


@mgpu.traced_once
def down(
    x: Float[Array, "T K"],
    a: Float[Array, "E RC K"],
    rows: Tiles,
    ranks: tuple[int, ...],
    sizes: DownTiles,
) -> tuple[Float[Array, "T _"], ...]:
    """Returns S of each projection in X's dtype; zero in padding rows and tiles without adapter.

    Args:
        x: input rows.
        a: down-projections of all projections, concatenated along the rank, in x's dtype.
        rows: routing of the rows.
        ranks: rank of each projection, multiples of 8 that add up to RC.
        sizes: tile sizes.
    """
    (num_rows, k), rank, dtype = x.shape, a.shape[1], x.dtype
    tile_k, whole = sizes.tile_k, sizes.splits == 1
    steps = 2 * -(-k // (2 * tile_k * sizes.splits))  # per split; both warpgroups alike
    stages = min(sizes.stages, steps)
    out_dtype = dtype if whole else jnp.float32

    def body(x_g, a_g, table_g, key_g, site_g, *rest):
        out_gs, (x_s, a_s, sum_s, *out_ss, full, empty, summed) = (
            rest[: len(ranks)],
            rest[len(ranks) :],
        )
        block, split = jax.lax.axis_index("rows"), jax.lax.axis_index("split")
        here, first_step = mgpu.pl.ds(block * _ROWS, _ROWS), split * steps
        facts = read_facts(table_g, block * _ROWS // TILE_ROWS)
        count = jnp.where(facts.adapter >= 0, jnp.int32(steps), jnp.int32(0))
        ring = mgpu.Ring((x_s, a_s), full, empty, stages)

        def memory():
            slot = jnp.maximum(facts.adapter, 0)

            @mgpu.pl.loop(0, count)
            def _(step):
                columns = mgpu.pl.ds((first_step + step) * tile_k, tile_k)
                ring.fill(step, (x_g.at[here, columns], a_g.at[slot, :, columns]))

            ring.drain(count)

        def products(warpgroup, accumulator):
            mask = row_mask(load_keys(key_g.at[here]), site_g[0], facts.threshold)

            @mgpu.pl.loop(0, count // 2)
            def _(pair):
                # The number of stages is even: a barrier is only ever waited on by one warpgroup.
                step = 2 * pair + warpgroup
                x_tile, a_tile = ring.take(step)

                @mgpu.pl.when((facts.threshold > 0) | (facts.padding > 0))
                def _():
                    mask_tile(x_tile, mask, facts.threshold, (first_step + step) * tile_k)

                def multiply():
                    mgpu.wgmma(accumulator, x_tile, a_tile.transpose((1, 0)))
                    mgpu.wgmma_wait(0)

                if k > tile_k:
                    multiply()
                else:  # see `gemm.store_tile`: the second step would be the first one again
                    mgpu.pl.when(step == 0)(multiply)
                ring.release(step)

        def store(total):
            low = 0
            for r, out_s, out_g in zip(ranks, out_ss, out_gs, strict=True):
                out_s[...] = total[:, low : low + r].astype(out_dtype)
                low += r
                mgpu.commit_smem()
                mgpu.copy_smem_to_gmem(out_s, out_g.at[here] if whole else out_g.at[split, here])
            mgpu.wait_smem_to_gmem(0)

        def compute(warpgroup):
            part = mgpu.accumulate((_ROWS, rank), lambda acc: products(warpgroup, acc))
            mgpu.join(warpgroup, part, sum_s, summed, lambda total: store(total * facts.factor))

        mgpu.warp_specialize(memory, compute)

    lead = () if whole else (sizes.splits,)
    outs = mgpu.launch(
        body,
        out_type=tuple(jax.ShapeDtypeStruct((*lead, num_rows, r), out_dtype) for r in ranks),
        grid=(-(-num_rows // _ROWS), sizes.splits),
        grid_names=("rows", "split"),
        scratch=(
            mgpu.tiles_buffer(stages, _ROWS, tile_k, dtype),
            mgpu.tiles_buffer(stages, rank, tile_k, dtype),
            mgpu.SMEM((_ROWS, rank), jnp.float32),
            *(mgpu.SMEM((_ROWS, r), out_dtype) for r in ranks),
            *mgpu.Ring.barriers(stages, copies=2, consumers=1),
            mgpu.Barrier(num_arrivals=1),
        ),
        name="lora_down",
    )(x, a, rows.table, rows.row_key, rows.site)
    return tuple(outs) if whole else tuple(out.sum(0).astype(dtype) for out in outs)
