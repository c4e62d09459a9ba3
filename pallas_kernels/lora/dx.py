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
    drop_packed,
    load_keys,
    pack_pieces,
    row_mask,
)
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
    return _launch(dys, ws, ds, a_t, None, rows, sizes)[0]


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
    depth = gemm.lora_depth(sizes, [ds.shape[1]])
    narrow, together = depth < TILE_K, sizes.cluster > 1
    lora_steps = -(-ds.shape[1] // depth)
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
            contracted, tiles = base_steps * TILE_K, gemm.tile_count(num_rows, [k], sizes)
            da_pass = DaPass(
                operands, da_gs[0], ring, own[-3:], sizes, contracted, tiles, sms // sizes.cluster
            )
            own = own[:-3]
        bits_s = own.pop() if sizes.mask_ahead else None
        lora_ring = mgpu.Ring(own[:2], own[2], own[3], 1) if narrow else ring

        def steps(facts):
            """Ring steps of a tile's LoRA term; blocks of a cluster take equal steps."""
            if together:  # whatever comes of a tile without adapter is masked
                return jnp.int32(lora_steps)
            return jnp.where(facts.adapter >= 0, jnp.int32(lora_steps), jnp.int32(0))

        def begin(progress, count):
            """Where a tile's LoRA and base steps begin, and the progress after it."""
            if narrow:
                after = gemm.Progress(progress.ring + base_steps, progress.lora + count)
                return progress.lora, progress.ring, after
            base = progress.ring + count
            return progress.ring, base, gemm.Progress(base + base_steps, progress.lora)

        def memory():
            def visit(place, _, progress):
                facts = facts_of(place.loaded)
                rows_, columns = mgpu.pl.ds(place.row, TILE_M), mgpu.pl.ds(place.column, TILE_N)
                slot, count = jnp.maximum(facts.adapter, 0), steps(facts)
                lora, base, after = begin(progress, count)

                @mgpu.pl.loop(0, count)
                def _(index):
                    here = mgpu.pl.ds(index * depth, depth)
                    lora_ring.fill(
                        lora + index, (ds_g.at[rows_, here], a_g.at[slot, columns, here])
                    )

                for dy_g, w_g, steps_i in zip(dy_gs, w_gs, depths, strict=True):

                    @mgpu.pl.loop(0, steps_i)
                    def _(index, base=base, dy_g=dy_g, w_g=w_g):
                        here = mgpu.pl.ds(index * TILE_K, TILE_K)
                        ring.fill(
                            base + index,
                            (dy_g.at[rows_, here], w_g.at[columns, here]),
                            (False, together),
                        )

                    base = base + steps_i
                return after

            _, progress = gemm.walk(
                lambda tile: load_facts(table_g, tile),
                (num_rows, k), sizes, sms, 0, gemm.at_start(), visit,
            )  # fmt: skip
            ring.drain(progress.ring)
            if narrow:
                lora_ring.drain(progress.lora)
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
                    gemm.contract(lora_ring, accumulator, first, lora_steps, operands)

            def fetch(tile):
                here = mgpu.pl.ds(tile * TILE_ROWS + row0, shape[0])
                return load_facts(table_g, tile), load_keys(key_g.at[here])

            def mask_of(place):
                facts = facts_of(place.loaded[0])
                return facts, row_mask(place.loaded[1], site_g[0], facts.threshold)

            def make_bits(place):
                """Pieces of work that leave the mask of a tile in SMEM, to be used by the next."""
                facts, mask = mask_of(place)
                assert bits_s is not None
                return pack_pieces(
                    bits_s.at[warpgroup], mask, facts.threshold, place.column + column0, shape[1]
                )

            def masked(value, place):
                """The LoRA term with its mask; most tiles without dropout need none."""
                facts, mask = mask_of(place)

                def dropped(value):
                    if bits_s is not None:
                        return drop_packed(value, bits_s.at[warpgroup])
                    return drop(value, mask, place.column + column0)

                return lax.cond(
                    facts.threshold > 0,
                    dropped,
                    lambda v: lax.cond(
                        facts.padding > 0, lambda u: clear_padding(u, mask), lambda u: u, v
                    ),
                    value,
                )

            def visit(place, following, progress):
                count = steps(facts_of(place.loaded[0]))
                first, base, after = begin(progress, count)
                value = mgpu.accumulate(shape, lambda acc: lora(acc, first, count))
                value = masked(value, place)
                meanwhile = make_bits(following) if sizes.mask_ahead else ()
                value = mgpu.accumulate(
                    shape,
                    lambda acc: gemm.contract(
                        ring, acc, base, base_steps, operands, meanwhile=meanwhile
                    ),
                    start=value,
                )
                row, column = place.row + row0, place.column + column0
                gemm.store_tile(value.astype(dtype), staged, warpgroup, dx_g, row, column)
                return after

            def prepare(place):
                if sizes.mask_ahead:
                    for work in make_bits(place):
                        work()

            gemm.walk(fetch, (num_rows, k), sizes, sms, 0, gemm.at_start(), visit, prepare=prepare)
            if da_pass is not None:
                da_pass.compute(warpgroup)
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    mask_rows = gemm.share(0, sizes)[0][0]
    out_type = [jax.ShapeDtypeStruct((num_rows, k), dtype)]
    if absorbed:
        out_type.append(jax.ShapeDtypeStruct((slots, RANKS, k), jnp.float32))
    outs = mgpu.launch(
        body,
        out_type=tuple(out_type),
        grid=(sms // sizes.cluster,),
        grid_names=("sm",),
        cluster=sizes.cluster,
        scratch=(
            *gemm.ring_scratch(sizes, TILE_K, dtype, transposed=True),
            gemm.epilogue_scratch(sizes, dtype),
            *(gemm.ring_scratch(sizes, depth, dtype, transposed=True) if narrow else ()),
            *((mgpu.SMEM((2, mask_rows, 16), jnp.uint32),) if sizes.mask_ahead else ()),
            *(scratch(sizes) if absorbed else ()),
        ),
        name="lora_dx_with_da" if absorbed else "lora_dx",
    )(ds, a_t, rows.table, rows.row_key, rows.site, *dys, *ws, *absorbed)
    return tuple(outs)
