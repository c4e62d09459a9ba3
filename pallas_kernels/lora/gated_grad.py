"""Gradients of a gated activation, and dS and dB of the linears before it, in one pass.

    dgate = dH * up * activation'(gate)         dup = dH * activation(gate)
    dS_i = scale * dY_i B_i^T                   dB_i = S_i^T dY_i           (i: gate, up)

Memory bound: `grad_up` would read both gradients again. A block owns a panel of columns of gate and
up and a stretch of row tiles sorted by adapter, as in `grad_up`, whose sums these are. A step is
128 rows and 64 columns. Each warpgroup makes the gradients of half of the rows, in the place of
gate and up in SMEM, from where they go to memory. dS of its rows is its own; dB of gate is that of
the first warpgroup, and dB of up that of the second.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels import segments
from pallas_kernels.activation import Activation
from pallas_kernels.lora.gated_down import activation_and_slope
from pallas_kernels.lora.mask import clear_padding, load_keys, row_mask
from pallas_kernels.segments import TILE_ROWS, Tiles, read_facts
from pallas_kernels.tuning import GatedGradTiles

_COLUMNS = 64  # per step
_HALF = TILE_ROWS // 2  # rows of a warpgroup
MAX_RANK = 32  # of each projection: dS of two and dB fit into registers


def gradients(gate, up, dh, activation: Activation, layout):
    """Returns dgate and dup of float32 values in registers; silu in XLA's order of operations."""
    value, slope = activation_and_slope(gate, activation, layout)
    wide = dh * up
    return slope(wide), value * dh


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
) -> tuple[
    tuple[Float[Array, "T F"], ...], tuple[Float[Array, "_ T R"], ...], tuple[Array, ...]
]:
    """Returns dgate and dup; dS of both as one part per panel of columns, and dB of both, float32.

    dgate and dup are those of all rows. dS and dB are as those of `grad_up`.

    Args:
        gate: pre-activation.
        up: what is gated, in gate's dtype.
        dh: gradient of activation(gate) * up, in gate's dtype.
        b: up-projections of both [slots, rank, out] in gate's dtype; ranks multiples of 8.
        ss: S of both.
        rows: routing of the rows.
        activation: see `pallas_kernels.activation`.
        sizes: tile sizes.
    """
    (num_rows, width), dtype, rank = gate.shape, gate.dtype, ss[0].shape[1]
    slots, num_tiles = rows.start.shape[0] - 1, rows.walk.shape[0]
    length = -(-num_tiles // sizes.splits)
    splits = -(-num_tiles // length)
    panels, steps = -(-width // sizes.panel), sizes.panel // _COLUMNS
    stages, layout = sizes.stages, mgpu.Layout.WGMMA

    def body(walk_g, start_g, key_g, gate_g, up_g, dh_g, *rest):
        (b_gs, st_gs, dy_gs, ds_gs, db_gs), scratch = (
            [rest[2 * i : 2 * i + 2] for i in range(5)],
            rest[10:],
        )
        y_s, dh_s, b_s, st_s, ds_s, full, empty, made = scratch
        panel, index = lax.axis_index("panel"), lax.axis_index("split")
        split = segments.split_bounds(start_g, slots, index, length)

        def halves(buffer):
            return (mgpu.Window(lambda slot, i=i: buffer.at[slot, i]) for i in range(2))

        ring = mgpu.Ring(
            (*halves(y_s), dh_s, *halves(b_s), *halves(st_s)), full, empty, stages
        )

        def columns_of(step):
            return mgpu.pl.ds(panel * sizes.panel + step * _COLUMNS, _COLUMNS)

        def memory():
            def run(slot, first, last, segment):
                @mgpu.pl.loop(first, last)
                def _(position):
                    here = mgpu.pl.ds(read_facts(walk_g, position).tile * TILE_ROWS, TILE_ROWS)

                    @mgpu.pl.loop(0, steps)
                    def _(step):
                        columns = columns_of(step)
                        ring.fill(
                            (position - split.first) * steps + step,
                            (
                                *(ref.at[here, columns] for ref in (gate_g, up_g, dh_g)),
                                *(b_g.at[slot, :, columns] for b_g in b_gs),
                                *(st_g.at[:, here] for st_g in st_gs),
                            ),
                        )

            segments.for_each_run(split, walk_g, start_g, slots, run)
            ring.drain((split.last - split.first) * steps)
