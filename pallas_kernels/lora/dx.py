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
from pallas_kernels.lora.da_pass import RANKS, DaPass, Operands, scratch
from pallas_kernels.lora.gemm import TILE_K, TILE_M, TILE_N
from pallas_kernels.lora.mask import (
    clear_padding,
    drop,
    load_keys,
    row_mask,
)
from pallas_kernels.segments import TILE_ROWS, Tiles, facts_of, load_facts
from pallas_kernels.tuning import GemmTiles


@mgpu.traced_once
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
    return _launch(dys, ws, ds, a_t, None, rows, sizes)[0]


@mgpu.traced_once
def dx_with_da(
    dys: tuple[Float[Array, "T _"], ...],
    ws: tuple[Float[Array, "K _"], ...],
    ds: Float[Array, "T RC"],
    a_t: Float[Array, "E K RC"],
    x: Float[Array, "T K"],
    rank: int,
    rows: Tiles,
    sizes: GemmTiles,
) -> tuple[Float[Array, "T K"], Float[Array, "E _ K"]]:
    """Returns the gradient of X, and dA of all projections as `grad_down` does; see `da_pass`.

    Args:
        dys: gradients of the outputs.
        ws: frozen weights; K is a multiple of 64.
        ds: as for `dx`, zero in padding rows.
        a_t: as for `dx`.
        x: input rows.
        rank: leading columns of ds in use, at most 64.
        rows: routing of the rows.
        sizes: tile sizes.
    """
    dx, da = _launch(dys, ws, ds, a_t, x, rows, sizes)
    return dx, da[:, :rank]


def _launch(dys, ws, ds, a_t, x, rows: Tiles, sizes: GemmTiles) -> tuple[Array, ...]:
    num_rows, k, dtype, group = dys[0].shape[0], ws[0].shape[0], dys[0].dtype, len(ws)
    depths = [gemm.steps_of(w.shape[1]) for w in ws]
    base_steps = sum(depths)
    lora_steps = gemm.steps_of(ds.shape[1])
    sms = mgpu.num_sms()
    absorbed = () if x is None else (x, rows.walk, rows.start)
    slots = a_t.shape[0]

    def body(ds_g, a_g, table_g, key_g, site_g, *rest):
        dy_gs, w_gs, rest = rest[:group], rest[group : 2 * group], rest[2 * group :]
        (*absorbed_gs,), (dx_g, *rest) = rest[: len(absorbed)], rest[len(absorbed) :]
        da_gs, rest = rest[: 1 if absorbed else 0], rest[1 if absorbed else 0 :]
        x_s, w_s, full, empty, staged, *own = rest
        ring = mgpu.Ring((x_s, w_s), full, empty, sizes.stages)
        da_pass = None
        if absorbed:
            x_g, walk_g, start_g = absorbed_gs
            operands = Operands(x_g, ds_g, walk_g, start_g, key_g, site_g)
            contracted, tiles = base_steps * TILE_K, gemm.tile_count(num_rows, [k])
            da_pass = DaPass(operands, da_gs[0], ring, own, contracted, tiles, sms)

        def steps(facts):
            """Ring steps of a tile's LoRA term."""
            return jnp.where(facts.adapter >= 0, jnp.int32(lora_steps), jnp.int32(0))

        def memory():
            def visit(place, step):
                facts = facts_of(place.loaded)
                rows_, columns = mgpu.pl.ds(place.row, TILE_M), mgpu.pl.ds(place.column, TILE_N)
                slot, count = jnp.maximum(facts.adapter, 0), steps(facts)

                @mgpu.pl.loop(0, count)
                def _(index):
                    here = mgpu.pl.ds(index * TILE_K, TILE_K)
                    ring.fill(step + index, (ds_g.at[rows_, here], a_g.at[slot, columns, here]))

                base = step + count
                for dy_g, w_g, steps_i in zip(dy_gs, w_gs, depths, strict=True):

                    @mgpu.pl.loop(0, steps_i)
                    def _(index, base=base, dy_g=dy_g, w_g=w_g):
                        here = mgpu.pl.ds(index * TILE_K, TILE_K)
                        ring.fill(base + index, (dy_g.at[rows_, here], w_g.at[columns, here]))

                    base = base + steps_i
                return base

            _, step = gemm.walk(
                lambda tile: load_facts(table_g, tile),
                (num_rows, k), sizes, sms, 0, jnp.int32(0), visit,
            )  # fmt: skip
            ring.drain(step)
            if da_pass is not None:
                da_pass.load()

        def compute(warpgroup):
            shape, row0, column0 = gemm.share(warpgroup, sizes)
            my_rows, my_columns = mgpu.pl.ds(row0, shape[0]), mgpu.pl.ds(column0, shape[1])

            def operands(dy_tile, w_tile):
                return dy_tile.at[my_rows, :], w_tile.at[my_columns, :].transpose((1, 0))

            def lora(accumulator, first, count):
                @mgpu.pl.when(count > 0)
                def _():
                    gemm.contract(ring, accumulator, first, lora_steps, operands)

            def fetch(tile):
                here = mgpu.pl.ds(tile * TILE_ROWS + row0, shape[0])
                return load_facts(table_g, tile), load_keys(key_g.at[here])

            def mask_of(place):
                facts = facts_of(place.loaded[0])
                return facts, row_mask(place.loaded[1], site_g[0], facts.threshold)

            def masked(value, place):
                """The LoRA term with its mask; most tiles without dropout need none."""
                facts, mask = mask_of(place)

                return lax.cond(
                    facts.threshold > 0,
                    lambda v: drop(v, mask, place.column + column0),
                    lambda v: lax.cond(
                        facts.padding > 0, lambda u: clear_padding(u, mask), lambda u: u, v
                    ),
                    value,
                )

            def visit(place, step):
                count = steps(facts_of(place.loaded[0]))
                value = mgpu.accumulate(shape, lambda acc: lora(acc, step, count))
                base = step + count
                value = mgpu.accumulate(
                    shape,
                    lambda acc: gemm.contract(ring, acc, base, base_steps, operands),
                    start=masked(value, place),
                )
                row, column = place.row + row0, place.column + column0
                gemm.store_tile(value.astype(dtype), staged, warpgroup, dx_g, row, column)
                return base + base_steps

            gemm.walk(fetch, (num_rows, k), sizes, sms, 0, jnp.int32(0), visit)
            if da_pass is not None:
                da_pass.compute(warpgroup)
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    out_type = [jax.ShapeDtypeStruct((num_rows, k), dtype)]
    if absorbed:
        out_type.append(jax.ShapeDtypeStruct((slots, RANKS, k), jnp.float32))
    outs = mgpu.launch(
        body,
        out_type=tuple(out_type),
        grid=(sms,),
        grid_names=("sm",),
        scratch=(
            *gemm.ring_scratch(sizes, dtype, transposed=True),
            gemm.epilogue_scratch(sizes, dtype),
            *(scratch(sizes) if absorbed else ()),
        ),
        name="lora_dx_with_da" if absorbed else "lora_dx",
    )(ds, a_t, rows.table, rows.row_key, rows.site, *dys, *ws, *absorbed)
    return tuple(outs)
