"""dS_i = scale * dY_i B_i^T and dB_i = S_i^T dY_i from one read of dY_i; ordered partial sums.

A block owns a panel of columns of one projection and a stretch of row tiles sorted by adapter. It
keeps one adapter's dB of its panel in registers, and writes its panel's part of dS per tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels import segments
from pallas_kernels.lora.mask import clear_padding, load_keys, row_mask
from pallas_kernels.segments import TILE_ROWS, Tiles, read_facts
from pallas_kernels.tuning import GradUpTiles

_COLUMNS = 128  # per step; the warpgroups halve its rows for dS and its columns for dB
_RANKS = 64  # ranks at a time


class _Part(NamedTuple):
    """A projection's blocks in the launch: `blocks` from `first` on, split-major."""

    panels: int
    chunks: int
    first: int
    blocks: int


def _parts(widths: list[int], ranks: list[int], panel: int, splits: int) -> list[_Part]:
    parts, first = [], 0
    for width, rank in zip(widths, ranks, strict=True):
        panels, chunks = -(-width // panel), -(-rank // _RANKS)
        parts.append(_Part(panels, chunks, first, splits * chunks * panels))
        first += parts[-1].blocks
    return parts


@mgpu.traced_once
def grad_up(
    dys: tuple[Float[Array, "T _"], ...],
    b: tuple[Float[Array, "E _ _"], ...],
    ss: tuple[Float[Array, "T _"], ...],
    rows: Tiles,
    sizes: GradUpTiles,
) -> tuple[tuple[Float[Array, "_ T _"], ...], tuple[Float[Array, "E _ _"], ...]]:
    """Returns each dS as one part per panel of columns, to be added up, and each dB; in float32.

    dS carries the LoRA scale and the factor of kept values; it is exactly zero in padding rows and
    undefined in tiles without adapter.

    Args:
        dys: gradients of the outputs.
        b: up-projections [slots, rank, out] in dY's dtype; ranks multiples of 8.
        ss: S of each projection, from `down`.
        rows: routing of the rows.
        sizes: tile sizes.
    """
    num_rows, dtype, group = dys[0].shape[0], dys[0].dtype, len(dys)
    slots, num_tiles = rows.start.shape[0] - 1, rows.walk.shape[0]
    widths, ranks = [dy.shape[1] for dy in dys], [s.shape[1] for s in ss]
    length = -(-num_tiles // sizes.splits)
    splits = -(-num_tiles // length)
    parts = _parts(widths, ranks, sizes.panel, splits)
    width = min(_RANKS, max(ranks))  # ranks of B loaded per step
    columns_steps = sizes.panel // _COLUMNS

    def body(walk_g, start_g, key_g, *rest):
        dy_gs, b_gs, s_gs, *results = (rest[i * group : (i + 1) * group] for i in range(5))
        db_gs, ds_gs = results if sizes.atomic else reversed(results)
        dy_s, b_s, s_s, db_s, *ds_s, full, empty, cleared = rest[5 * group :]
        ds_s = ds_s[0] if ds_s else db_s
        block = lax.axis_index("block")
        ring = mgpu.Ring((dy_s, b_s, s_s), full, empty, sizes.stages)

        def where(part):
            """Split, panel and first rank of this block within a projection."""
            local = block - part.first
            panel = lax.rem(local, jnp.int32(part.panels))
            local = lax.div(local, jnp.int32(part.panels))
            chunk = lax.rem(local, jnp.int32(part.chunks))
            index = lax.div(local, jnp.int32(part.chunks))
            return segments.split_bounds(start_g, slots, index, length), panel, chunk * _RANKS

        def for_my_projection(do):
            for i, part in enumerate(parts):

                @mgpu.pl.when((block >= part.first) & (block < part.first + part.blocks))
                def _(i=i, part=part):
                    do(i, *where(part))

        def load(i, split, panel, first_rank):
            def run(slot, first, last, segment):
                @mgpu.pl.loop(first, last)
                def _(position):
                    tile = read_facts(walk_g, position).tile
                    here = mgpu.pl.ds(tile * TILE_ROWS, TILE_ROWS)

                    @mgpu.pl.loop(0, columns_steps)
                    def _(index):
                        columns = mgpu.pl.ds(panel * sizes.panel + index * _COLUMNS, _COLUMNS)
                        ring.fill(
                            (position - split.first) * columns_steps + index,
                            (
                                dy_gs[i].at[here, columns],
                                b_gs[i].at[slot, mgpu.pl.ds(first_rank, width), columns],
                                s_gs[i].at[here, mgpu.pl.ds(first_rank, _RANKS)],
                            ),
                        )

            segments.for_each_run(split, walk_g, start_g, slots, run)
            ring.drain((split.last - split.first) * columns_steps)

        def clear(dy_tile, tile, warpgroup):
            """Zeroes the padding rows of dY, a half of the rows by each warpgroup."""
            half = mgpu.pl.ds(warpgroup * 64, 64)
            keys = load_keys(key_g.at[mgpu.pl.ds(tile * TILE_ROWS + warpgroup * 64, 64)])
            mask = row_mask(keys, jnp.uint32(0), jnp.int32(0))
            value = mgpu.load(dy_tile.at[half, :], layout=mgpu.Layout.WGMMA)
            dy_tile[half, :] = clear_padding(value, mask)
            mgpu.commit_smem()
            mgpu.barrier_arrive(cleared)
            mgpu.barrier_wait(cleared)

        def store(value, staged, destination, add=False):
            mgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = value
            mgpu.commit_smem()
            mgpu.copy_smem_to_gmem(staged, destination, reduction_op="add" if add else None)

        def process(warpgroup, i, split, panel, first_rank):
            half = mgpu.pl.ds(warpgroup * 64, 64)

            def tile_products(ds_acc, db_accs, position, facts):
                for index, db_acc in enumerate(db_accs):
                    step = (position - split.first) * columns_steps + index
                    dy_tile, b_tile, s_tile = ring.take(step)

                    @mgpu.pl.when(facts.padding > 0)
                    def _(dy_tile=dy_tile):
                        clear(dy_tile, facts.tile, warpgroup)

                    mgpu.wgmma(ds_acc, dy_tile.at[half, :], b_tile.transpose((1, 0)))
                    mgpu.wgmma(db_acc, s_tile.transpose((1, 0)), dy_tile.at[:, half])
                    mgpu.wgmma_wait(0)
                    ring.release(step)

            def run(slot, first, last, segment):
                def products(*db_accs):
                    @mgpu.pl.loop(first, last)
                    def _(position):
                        facts = read_facts(walk_g, position)
                        ds = mgpu.accumulate(
                            (64, width), lambda acc: tile_products(acc, db_accs, position, facts)
                        )
                        here = mgpu.pl.ds(facts.tile * TILE_ROWS + warpgroup * 64, 64)
                        destination = ds_gs[i].at[panel, here, mgpu.pl.ds(first_rank, width)]
                        store(ds * facts.factor, ds_s.at[warpgroup], destination)

                    return [acc[...] for acc in db_accs]

                dbs = mgpu.accumulate_all([(_RANKS, 64)] * columns_steps, products)
                for index, db in enumerate(dbs):
                    column = panel * sizes.panel + index * _COLUMNS + warpgroup * 64
                    ranks_, part = mgpu.pl.ds(first_rank, _RANKS), slot if sizes.atomic else segment
                    destination = db_gs[i].at[part, ranks_, mgpu.pl.ds(column, 64)]
                    store(db, db_s.at[warpgroup], destination, add=sizes.atomic)

            segments.for_each_run(split, walk_g, start_g, slots, run)
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(
            lambda: for_my_projection(load),
            lambda warpgroup: for_my_projection(lambda *at: process(warpgroup, *at)),
        )

    f32 = jnp.float32

    def shapes_of_db(lead):
        return [(lead, rank, n) for rank, n in zip(ranks, widths, strict=True)]

    sums = mgpu.accumulators(shapes_of_db(slots)) if sizes.atomic else []
    outs = mgpu.launch(
        body,
        out_type=(
            *(
                jax.ShapeDtypeStruct((part.panels, num_rows, rank), f32)
                for part, rank in zip(parts, ranks, strict=True)
            ),
            *(
                jax.ShapeDtypeStruct(shape, f32)
                for shape in ([] if sizes.atomic else shapes_of_db(splits + slots - 1))
            ),
        ),
        grid=(sum(part.blocks for part in parts),),
        grid_names=("block",),
        scratch=(
            mgpu.tiles_buffer(sizes.stages, TILE_ROWS, _COLUMNS, dtype),
            mgpu.tiles_buffer(sizes.stages, width, _COLUMNS, dtype),
            mgpu.tiles_buffer(sizes.stages, TILE_ROWS, _RANKS, dtype),
            *(
                mgpu.tiles_buffer(2, 64, ranks_, f32)
                for ranks_ in sorted({_RANKS, width}, reverse=True)
            ),
            *mgpu.Ring.barriers(sizes.stages, copies=3, consumers=2),
            mgpu.Barrier(num_arrivals=2),
        ),
        name="lora_grad_up",
    )(rows.walk, rows.start, rows.row_key, *dys, *b, *ss, *sums)
    if sizes.atomic:
        return tuple(outs), tuple(mgpu.frozen(sums))
    dbs = (segments.sum_segments(part, rows.start, length) for part in outs[group:])
    return tuple(outs[:group]), tuple(dbs)
