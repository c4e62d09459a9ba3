"""Gradients of a gated activation, and dS and dB of the linears before it, in one pass.

    dgate = dH * up * activation'(gate)         dup = dH * activation(gate)
    dS_i = scale * dY_i B_i^T                   dB_i = S_i^T dY_i           (i: gate, up)

Memory bound: `grad_up` would read both gradients again. A block owns a panel of columns of gate and
up and a stretch of row tiles sorted by adapter, as in `grad_up`, and sums in the same order. A step
is 128 rows and 64 columns. Each warpgroup makes the gradients of half of the rows, in the place of
gate and up in SMEM, from where they go to memory, and dS of these rows. dB of gate is the sum of
the first warpgroup, and dB of up that of the second.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels import segments
from pallas_kernels.activation import Activation
from pallas_kernels.lora.activate import gated_gradients
from pallas_kernels.lora.mask import clear_padding, load_keys, row_mask
from pallas_kernels.segments import TILE_ROWS, Tiles, read_facts
from pallas_kernels.tuning import GatedGradTiles

MAX_RANK = 32  # of each projection: dS and dB fit into registers
_COLUMNS = 64  # per step
_PIECE = 16  # columns whose gradients are made at a time
_HALF = TILE_ROWS // 2  # rows of a warpgroup
_REGISTERS = (72, 216)  # seven copies at a time take more addresses than elsewhere
_BOTH = range(2)  # gate and up


@mgpu.traced_once
def gated_grad(
    gate: Float[Array, "T F"],
    up: Float[Array, "T F"],
    dh: Float[Array, "T F"],
    b: tuple[Float[Array, "E R F"], ...],
    ss: tuple[Float[Array, "T R"], ...],
    rows: Tiles,
    activation: Activation,
    sizes: GatedGradTiles,
) -> tuple[tuple[Array, Array], Float[Array, "2 _ T R"], tuple[Float[Array, "E R F"], ...]]:
    """Returns dgate and dup; dS of both, one part per panel of columns to be added; dB of both.

    dgate and dup are those of all rows, in gate's dtype. dS and dB are as those of `grad_up`, in
    float32.

    Args:
        gate: pre-activation.
        up: what is gated, in gate's dtype.
        dh: gradient of activation(gate) * up, in gate's dtype.
        b: up-projections of both in gate's dtype; the rank is a multiple of 8, at most 32.
        ss: S of both.
        rows: routing of the rows.
        activation: see `pallas_kernels.activation`.
        sizes: tile sizes.
    """
    (num_rows, width), dtype, rank = gate.shape, gate.dtype, ss[0].shape[1]
    slots, num_tiles = rows.start.shape[0] - 1, rows.walk.shape[0]
    length = -(-num_tiles // sizes.splits)
    splits = -(-num_tiles // length)
    # No step lies outside of the only tile of an array: see `gemm.store_tile`.
    panel_width = min(sizes.panel, -(-width // _COLUMNS) * _COLUMNS)
    panels, steps = -(-width // panel_width), panel_width // _COLUMNS
    layout = mgpu.Layout.WGMMA

    def body(walk_g, start_g, key_g, gate_g, up_g, dh_g, *rest):
        b_gs, st_gs, dy_gs = (rest[2 * i : 2 * i + 2] for i in range(3))
        (ds_g, *db_gs), step_s, tile_s = rest[6:9], rest[9:14], rest[14:16]
        out_s, full, empty, st_full, st_empty, made = rest[16:]
        panel, index = lax.axis_index("panel"), lax.axis_index("split")

        ring = mgpu.Ring(step_s, full, empty, sizes.stages)
        s_ring = mgpu.Ring(tile_s, st_full, st_empty, 2)

        begin = jnp.minimum(index * length, num_tiles)
        end = jnp.minimum(begin + length, num_tiles)
        used = jnp.clip(start_g[slots], begin, end)  # tiles without adapter come last

        def columns_of(step):
            return mgpu.pl.ds(panel * panel_width + step * _COLUMNS, _COLUMNS)

        def for_each_run(run):
            """Calls `run(slot, first, last, segment)` for each adapter; tiles without one last.

            One adapter takes the same loop as several: a branch of its own spills registers.
            """
            if slots > 1:
                low, high = (read_facts(walk_g, p).adapter for p in (begin, end - 1))
                high = jnp.where(high < 0, jnp.int32(slots - 1), high)
                low = jnp.where(low < 0, jnp.int32(slots), low)
            else:  # all tiles are those of the adapter, see `segments.prepare`
                low, high = jnp.int32(0), jnp.int32(0)

            @mgpu.pl.loop(low, high + 1)
            def _(slot):
                first = jnp.maximum(begin, start_g[slot])
                last = jnp.minimum(used, start_g[slot + 1])
                mgpu.pl.when(first < last)(lambda: run(slot, first, last, index + slot))

            mgpu.pl.when(used < end)(lambda: run(None, used, end, None))

        def memory():
            @mgpu.pl.loop(begin, end)
            def _(position):
                facts, index = read_facts(walk_g, position), position - begin
                here, slot = mgpu.pl.ds(facts.tile * TILE_ROWS, TILE_ROWS), facts.adapter
                s_ring.fill(index, tuple(st_g.at[:, here] for st_g in st_gs))

                @mgpu.pl.loop(0, steps)
                def _(step):
                    columns = columns_of(step)
                    inputs = (ref.at[here, columns] for ref in (gate_g, up_g, dh_g))
                    ups = (b_g.at[jnp.maximum(slot, 0), :, columns] for b_g in b_gs)
                    ring.fill(index * steps + step, (*inputs, *ups))

            s_ring.drain(end - begin)
            ring.drain((end - begin) * steps)

        def compute(warpgroup):
            half = mgpu.pl.ds(warpgroup * _HALF, _HALF)

            def make(tiles, dh_tile, tile, step, padding):
                """Puts the gradients in the place of gate and up, and sends them to memory."""
                values = [mgpu.load(ref.at[half, :], layout=layout) for ref in (*tiles, dh_tile)]
                here = mgpu.pl.ds(tile * TILE_ROWS + warpgroup * _HALF, _HALF)
                pieces = []
                for low in range(0, _COLUMNS, _PIECE):  # all at once would spill registers
                    cut = (lax.slice(v, (0, low), (_HALF, low + _PIECE)) for v in values)
                    gate, up, dh = (piece.astype(jnp.float32) for piece in cut)
                    dys = gated_gradients(gate, up, dh, activation, layout)
                    pieces.append([dy.astype(dtype) for dy in dys])
                for ref, parts in zip(tiles, zip(*pieces, strict=True), strict=True):
                    ref[half, :] = lax.concatenate(parts, 1)
                mgpu.commit_smem()
                for ref, dy_g in zip(tiles, dy_gs, strict=True):
                    mgpu.copy_smem_to_gmem(ref.at[half, :], dy_g.at[here, columns_of(step)])

                if padding is None:
                    return

                @mgpu.pl.when(padding > 0)
                def _():
                    # What has left as it is must not meet other rows.
                    mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    mask = row_mask(load_keys(key_g.at[here]), jnp.uint32(0), jnp.int32(0))
                    for ref in tiles:
                        value = mgpu.load(ref.at[half, :], layout=layout)
                        ref[half, :] = clear_padding(value, mask)
                    mgpu.commit_smem()

            def walk_steps(position, facts, use, start):
                """Makes the gradients of a row tile step by step.

                Calls `carry = use(step, tiles, ups, carry)` after each, if there is one.
                """
                first = (position - begin) * steps

                def visit(step, carry):
                    gate_tile, up_tile, dh_tile, *ups = ring.take(first + step)
                    tiles = gate_tile, up_tile
                    padding = None if use is None else facts.padding
                    make(tiles, dh_tile, facts.tile, step, padding)

                    @mgpu.pl.when(step > 0)
                    def _():
                        # The two stores before the last two have been read, and so has dH.
                        mgpu.wait_smem_to_gmem(2, wait_read_only=True)
                        ring.release(first + step - 1)

                    if use is None:
                        return carry
                    mgpu.barrier_arrive(made)
                    mgpu.barrier_wait(made)
                    return use(step, tiles, ups, carry)

                end_state = mgpu.pl.loop(0, steps, init_carry=start)(visit)
                mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ring.release(first + steps - 1)
                return end_state

            def store(value, destination):
                mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                staged = out_s.at[warpgroup]
                staged[...] = value
                mgpu.commit_smem()
                mgpu.copy_smem_to_gmem(staged, destination)

            def tile_sums(position, facts, db_accs):
                s_tiles = s_ring.take(position - begin)

                def use(step, tiles, ups, dss):
                    for at, db_acc in enumerate(db_accs):
                        for i in _BOTH:

                            @mgpu.pl.when((step == at) & (warpgroup == i))
                            def _(db_acc=db_acc, i=i):
                                dy, s = (ref.transpose((1, 0)) for ref in (tiles[i], s_tiles[i]))
                                mgpu.wgmma(db_acc, dy, s)
                                mgpu.wgmma_wait(0)

                    def product(accumulator, i):
                        mgpu.wgmma(accumulator, tiles[i].at[half, :], ups[i].transpose((1, 0)))
                        mgpu.wgmma_wait(0)

                    shape = (_HALF, rank)
                    return tuple(
                        mgpu.accumulate(shape, partial(product, i=i), start=dss[i]) for i in _BOTH
                    )

                none = mgpu.layout_cast(jnp.zeros((_HALF, rank), jnp.float32), layout)
                dss = walk_steps(position, facts, use, (none, none))
                s_ring.release(position - begin)
                here = mgpu.pl.ds(facts.tile * TILE_ROWS + warpgroup * _HALF, _HALF)
                for i in _BOTH:
                    store(dss[i] * facts.factor, ds_g.at[i, panel, here, :])

            def run(slot, first, last, segment):
                if slot is None:

                    @mgpu.pl.loop(first, last)
                    def _(position):
                        s_ring.take(position - begin)
                        s_ring.release(position - begin)
                        walk_steps(position, read_facts(walk_g, position), None, ())

                    return

                def products(*db_accs):
                    @mgpu.pl.loop(first, last)
                    def _(position):
                        tile_sums(position, read_facts(walk_g, position), db_accs)

                    return [acc[...] for acc in db_accs]

                dbs = mgpu.accumulate_all([(_COLUMNS, rank)] * steps, products)
                for i in _BOTH:

                    @mgpu.pl.when(warpgroup == i)
                    def _(i=i):
                        for step, db in enumerate(dbs):
                            store(db, db_gs[i].at[segment, columns_of(step), :])

            for_each_run(run)
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute, _REGISTERS)

    missing = num_tiles * TILE_ROWS - num_rows
    transposed = (jnp.pad(s, ((0, missing), (0, 0))).T for s in ss)
    dgate, dup, ds, *dbs = mgpu.launch(
        body,
        out_type=(
            *(jax.ShapeDtypeStruct((num_rows, width), dtype) for _ in _BOTH),
            jax.ShapeDtypeStruct((2, panels, num_rows, rank), jnp.float32),
            *(jax.ShapeDtypeStruct((splits + slots - 1, width, rank), jnp.float32) for _ in _BOTH),
        ),
        grid=(panels, splits),
        grid_names=("panel", "split"),
        scratch=(
            *(mgpu.tiles_buffer(sizes.stages, TILE_ROWS, _COLUMNS, dtype) for _ in range(3)),
            *(mgpu.tiles_buffer(sizes.stages, rank, _COLUMNS, dtype) for _ in _BOTH),
            *(mgpu.tiles_buffer(2, rank, TILE_ROWS, dtype) for _ in _BOTH),
            mgpu.tiles_buffer(2, _HALF, rank, jnp.float32),
            *mgpu.Ring.barriers(sizes.stages, copies=5, consumers=2),
            *mgpu.Ring.barriers(2, copies=2, consumers=2),
            mgpu.Barrier(num_arrivals=2),
        ),
        name="lora_gated_grad",
    )(rows.walk, rows.start, rows.row_key, gate, up, dh, *b, *transposed)
    dbs = (segments.sum_segments(part, rows.start, length) for part in dbs)
    return (dgate, dup), ds, tuple(db.transpose(0, 2, 1) for db in dbs)
