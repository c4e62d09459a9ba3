"""dX = mask * (dS A) + sum_i dY_i W_i^T over projections that share X, one accumulation.

The accumulator starts from the masked LoRA term, so nothing but dX is written. dS carries the LoRA
scale and the factor of kept values.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora import gemm
from pallas_kernels.lora.gemm import TILE_K, TILE_M, TILE_N
from pallas_kernels.lora.mask import clear_padding, drop, load_keys, row_mask
from pallas_kernels.segments import TILE_ROWS, Tiles, facts_of, load_facts
from pallas_kernels.tuning import GemmTiles


def dx(
    dys: tuple[Float[Array, "T _"], ...],
    ws: tuple[Float[Array, "K _"], ...],
    ds: Float[Array, "T RC"],
    a_t: Float[Array, "E K RC"],
    rows: Tiles,
    sizes: GemmTiles,
) -> Float[Array, "T K"]:
    """Returns the gradient of X in its dtype.

    Args:
        dys: gradients of the outputs.
        ws: frozen weights.
        ds: gradient of all projections' S side by side, from `grad_up`.
        a_t: transposed down-projections of all projections side by side.
        rows: routing of the rows.
        sizes: tile sizes.
    """
    num_rows, k, dtype, group = dys[0].shape[0], ws[0].shape[0], dys[0].dtype, len(ws)
    depths = [gemm.steps_of(w.shape[1]) for w in ws]
    base_steps, lora_steps = sum(depths), gemm.steps_of(ds.shape[1])
    sms = mgpu.num_sms()

    def body(ds_g, a_g, table_g, key_g, site_g, *rest):
        dy_gs, w_gs = rest[:group], rest[group : 2 * group]
        dx_g, x_s, w_s, full, empty, staged = rest[2 * group :]
        ring = mgpu.Ring((x_s, w_s), full, empty, sizes.stages)

        def steps(facts):
            """Ring steps of a tile's LoRA term."""
            return jnp.where(facts.adapter >= 0, jnp.int32(lora_steps), jnp.int32(0))

        def memory():
            def visit(row, column, step, loaded):
                facts = facts_of(loaded)
                rows_, columns = mgpu.pl.ds(row, TILE_M), mgpu.pl.ds(column, TILE_N)
                slot, count = jnp.maximum(facts.adapter, 0), steps(facts)

                @mgpu.pl.loop(0, count)
                def _(index):
                    depth = mgpu.pl.ds(index * TILE_K, TILE_K)
                    ring.fill(step + index, (ds_g.at[rows_, depth], a_g.at[slot, columns, depth]))

                step = step + count
                for dy_g, w_g, steps_i in zip(dy_gs, w_gs, depths, strict=True):

                    def one(index, step, dy_g=dy_g, w_g=w_g):
                        depth = mgpu.pl.ds(index * TILE_K, TILE_K)
                        ring.fill(step, (dy_g.at[rows_, depth], w_g.at[columns, depth]))
                        return step + 1

                    step = lax.fori_loop(0, steps_i, one, step)
                return step

            walked = gemm.walk(
                lambda tile: load_facts(table_g, tile),
                (num_rows, k),
                sizes,
                sms,
                0,
                jnp.int32(0),
                visit,
            )
            ring.drain(walked[1])

        def compute(warpgroup):
            shape, row0, column0 = gemm.share(warpgroup, sizes)
            my_rows, my_columns = mgpu.pl.ds(row0, shape[0]), mgpu.pl.ds(column0, shape[1])

            def operands(dy_tile, w_tile):
                return dy_tile.at[my_rows, :], w_tile.at[my_columns, :].transpose((1, 0))

            def lora(accumulator, step, count):
                @mgpu.pl.when(count > 0)
                def _():
                    gemm.contract(ring, accumulator, step, lora_steps, operands)

            def fetch(tile):
                here = mgpu.pl.ds(tile * TILE_ROWS + row0, shape[0])
                return load_facts(table_g, tile), load_keys(key_g.at[here])

            def masked(value, facts, keys, column):
                """The LoRA term with its mask; most tiles without dropout need none."""
                mask = row_mask(keys, site_g[0], facts.threshold)
                return lax.cond(
                    facts.threshold > 0,
                    lambda v: drop(v, mask, column),
                    lambda v: lax.cond(
                        facts.padding > 0, lambda u: clear_padding(u, mask), lambda u: u, v
                    ),
                    value,
                )

            def visit(row, column, step, fetched):
                facts, keys = facts_of(fetched[0]), fetched[1]
                count = steps(facts)
                value = mgpu.accumulate(shape, lambda acc: lora(acc, step, count))
                value = masked(value, facts, keys, column + column0)
                step = step + count
                value = mgpu.accumulate(
                    shape,
                    lambda acc: gemm.contract(ring, acc, step, base_steps, operands),
                    start=value,
                )
                gemm.store_tile(
                    value.astype(dtype), staged, warpgroup, dx_g, row + row0, column + column0
                )
                return step + base_steps

            gemm.walk(fetch, (num_rows, k), sizes, sms, 0, jnp.int32(0), visit)
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    return mgpu.launch(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, k), dtype),
        grid=(sms,),
        grid_names=("sm",),
        scratch=(
            *gemm.ring_scratch(sizes, dtype, transposed=True),
            gemm.epilogue_scratch(dtype),
        ),
        name="lora_dx",
    )(ds, a_t, rows.table, rows.row_key, rows.site, *dys, *ws)
