"""H = activation(gate) * up and S = scale * drop(H) A^T from one read of gate and up.

Memory bound. The blocks, steps and sums are those of `down`, so that S has the bits that `down`
would give for this H. H takes the place of gate in SMEM, from where it goes to memory, and drop(H)
that of up, from where the tensor cores read it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.activation import Activation
from pallas_kernels.lora.activate import activated
from pallas_kernels.lora.mask import clear_padding, drop, load_keys, row_mask
from pallas_kernels.segments import TILE_ROWS, Tiles, read_facts
from pallas_kernels.tuning import DownTiles

_ROWS = 64  # per block
_PIECE = 64  # columns that are in registers at a time


@mgpu.traced_once
def gated_down(
    gate: Float[Array, "T K"],
    up: Float[Array, "T K"],
    a: Float[Array, "E R K"],
    rows: Tiles,
    activation: Activation,
    sizes: DownTiles,
) -> tuple[Float[Array, "T K"], Float[Array, "T R"]]:
    """Returns H of all rows, and S, zero in padding rows and tiles without adapter.

    Args:
        gate: pre-activation.
        up: what is gated, in gate's dtype.
        a: down-projection [slots, rank, in] of the linear that takes H, in gate's dtype; the rank
            is a multiple of 8.
        rows: routing of the rows.
        activation: see `pallas_kernels.activation`.
        sizes: tile sizes.
    """
    (num_rows, k), rank, dtype = gate.shape, a.shape[1], gate.dtype
    tile_k, whole, layout = sizes.tile_k, sizes.splits == 1, mgpu.Layout.WGMMA
    steps = 2 * -(-k // (2 * tile_k * sizes.splits))  # per split; both warpgroups alike
    stages = min(sizes.stages, steps)
    s_dtype = dtype if whole else jnp.float32

    def body(gate_g, up_g, a_g, table_g, key_g, site_g, h_g, s_g, *scratch):
        gate_s, up_s, a_s, sum_s, out_s, full, empty, summed = scratch
        block, split = jax.lax.axis_index("rows"), jax.lax.axis_index("split")
        here, first_step = mgpu.pl.ds(block * _ROWS, _ROWS), split * steps
        facts = read_facts(table_g, block * _ROWS // TILE_ROWS)
        ring = mgpu.Ring((gate_s, up_s, a_s), full, empty, stages)

        def columns_of(step):
            return mgpu.pl.ds((first_step + step) * tile_k, tile_k)

        def memory():
            slot = jnp.maximum(facts.adapter, 0)

            @mgpu.pl.loop(0, steps)
            def _(step):
                columns = columns_of(step)
                sources = (gate_g.at[here, columns], up_g.at[here, columns])
                ring.fill(step, (*sources, a_g.at[slot, :, columns]))

            ring.drain(jnp.int32(steps))

        def make(gate_tile, up_tile, mask, first_column):
            """Puts H in the place of gate, and drop(H) in that of up."""
            for low in range(0, tile_k, _PIECE):
                piece = mgpu.pl.ds(low, _PIECE)
                gate, up = (
                    mgpu.load(tile.at[:, piece], layout=layout).astype(jnp.float32)
                    for tile in (gate_tile, up_tile)
                )
                h = (activated(gate, activation, layout) * up).astype(dtype)
                gate_tile[:, piece] = h

                @mgpu.pl.when(facts.threshold > 0)
                def _(h=h, piece=piece, low=low):
                    up_tile[:, piece] = drop(h, mask, first_column + low)

                @mgpu.pl.when((facts.threshold <= 0) & (facts.padding > 0))
                def _(h=h, piece=piece):
                    up_tile[:, piece] = clear_padding(h, mask)

                @mgpu.pl.when((facts.threshold <= 0) & (facts.padding <= 0))
                def _(h=h, piece=piece):
                    up_tile[:, piece] = h

        def products(warpgroup, accumulator):
            mask = row_mask(load_keys(key_g.at[here]), site_g[0], facts.threshold)

            @mgpu.pl.loop(0, steps // 2)
            def _(pair):
                # The number of stages is even: a barrier is only ever waited on by one warpgroup.
                step = 2 * pair + warpgroup
                gate_tile, up_tile, a_tile = ring.take(step)
                make(gate_tile, up_tile, mask, (first_step + step) * tile_k)
                mgpu.commit_smem()

                def store():
                    mgpu.copy_smem_to_gmem(gate_tile, h_g.at[here, columns_of(step)])

                def multiply():
                    mgpu.wgmma(accumulator, up_tile, a_tile.transpose((1, 0)))
                    mgpu.wgmma_wait(0)

                if k > tile_k:
                    store()
                    mgpu.pl.when(facts.adapter >= 0)(multiply)
                else:  # see `gemm.store_tile`: the second step would be the first one again
                    mgpu.pl.when(step == 0)(store)
                    mgpu.pl.when((facts.adapter >= 0) & (step == 0))(multiply)
                mgpu.wait_smem_to_gmem(0, wait_read_only=True)
                ring.release(step)

        def store_s(total):
            out_s[...] = total.astype(s_dtype)
            mgpu.commit_smem()
            mgpu.copy_smem_to_gmem(out_s, s_g.at[here] if whole else s_g.at[split, here])

        def compute(warpgroup):
            part = mgpu.accumulate((_ROWS, rank), lambda acc: products(warpgroup, acc))
            mgpu.join(warpgroup, part, sum_s, summed, lambda total: store_s(total * facts.factor))
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    lead = () if whole else (sizes.splits,)
    h, s = mgpu.launch(
        body,
        out_type=(
            jax.ShapeDtypeStruct((num_rows, k), dtype),
            jax.ShapeDtypeStruct((*lead, num_rows, rank), s_dtype),
        ),
        grid=(-(-num_rows // _ROWS), sizes.splits),
        grid_names=("rows", "split"),
        scratch=(
            *(mgpu.tiles_buffer(stages, _ROWS, tile_k, dtype) for _ in range(2)),
            mgpu.tiles_buffer(stages, rank, tile_k, dtype),
            mgpu.SMEM((_ROWS, rank), jnp.float32),
            mgpu.SMEM((_ROWS, rank), s_dtype),
            *mgpu.Ring.barriers(stages, copies=3, consumers=1),
            mgpu.Barrier(num_arrivals=1),
        ),
        name="lora_gated_down",
    )(gate, up, a, rows.table, rows.row_key, rows.site)
    return h, s if whole else s.sum(0).astype(dtype)
