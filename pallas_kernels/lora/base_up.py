"""Y_i = X W_i (+ bias_i) + S_i B_i for projections that share X, in one persistent launch.

The term S B is extra steps of the same accumulator. A tile of outputs never straddles projections;
each loads only its own columns of S and its own adapter's rows of B.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.lora import gemm
from pallas_kernels.lora.gemm import TILE_K, TILE_M, TILE_N
from pallas_kernels.segments import Tiles, facts_of, load_facts
from pallas_kernels.tuning import GemmTiles


def base_up(
    x: Float[Array, "T K"],
    ws: tuple[Float[Array, "K _"], ...],
    ss: tuple[Float[Array, "T _"], ...],
    b: tuple[Float[Array, "E _ _"], ...],
    biases: tuple[Float[Array, " _"] | None, ...],
    rows: Tiles,
    sizes: GemmTiles,
) -> tuple[Float[Array, "T _"], ...]:
    """Returns the output of each projection in X's dtype.

    Args:
        x: input rows.
        ws: frozen weights.
        ss: S of each projection, from `down`.
        b: up-projections [slots, rank, out] in x's dtype; ranks multiples of 8.
        biases: frozen biases or None.
        rows: routing of the rows.
        sizes: tile sizes.
    """
    (num_rows, k), dtype, group = x.shape, x.dtype, len(ws)
    widths = [w.shape[1] for w in ws]
    base_steps = gemm.steps_of(k)
    depth = gemm.lora_depth(sizes, [s.shape[1] for s in ss])
    narrow, together = depth < TILE_K, sizes.cluster > 1
    lora_steps = [-(-s.shape[1] // depth) for s in ss]
    if together:  # blocks of a cluster take equal steps: a slot of zeros for tiles without adapter
        b = tuple(jnp.pad(stack, ((0, 1), (0, 0), (0, 0))) for stack in b)
    sms = mgpu.num_sms()
    padded_biases = [
        jnp.pad(bias.astype(jnp.float32), (0, -bias.shape[0] % TILE_N))
        for bias in biases
        if bias is not None
    ]

    def body(x_g, table_g, *rest):
        w_gs, s_gs, b_gs = (rest[i * group : (i + 1) * group] for i in range(3))
        rest = rest[3 * group :]
        found = iter(rest[: len(padded_biases)])
        bias_gs = [None if bias is None else next(found) for bias in biases]
        rest = rest[len(padded_biases) :]
        y_gs, (x_s, w_s, full, empty, staged, *own) = rest[:group], rest[group:]
        ring = mgpu.Ring((x_s, w_s), full, empty, sizes.stages)
        lora_ring = mgpu.Ring(own[:2], own[2], own[3], 1) if narrow else ring

        def fetch(tile):
            return load_facts(table_g, tile)

        def steps(facts, i):
            """Ring steps of a tile's LoRA term."""
            count = jnp.int32(lora_steps[i])
            return count if together else jnp.where(facts.adapter >= 0, count, jnp.int32(0))

        def slot_of(facts):
            if together:
                return jnp.where(facts.adapter >= 0, facts.adapter, jnp.int32(b[0].shape[0] - 1))
            return jnp.maximum(facts.adapter, 0)

        def advance(progress, count):
            """Progress after a tile with `count` LoRA steps."""
            if narrow:
                return gemm.Progress(progress.ring + base_steps, progress.lora + count)
            return gemm.Progress(progress.ring + base_steps + count, progress.lora)

        def memory():
            def visit(place, _, progress, i=0):
                rows_, columns = mgpu.pl.ds(place.row, TILE_M), mgpu.pl.ds(place.column, TILE_N)

                def base():
                    @mgpu.pl.loop(0, base_steps)
                    def _(index):
                        here = mgpu.pl.ds(index * TILE_K, TILE_K)
                        ring.fill(
                            progress.ring + index,
                            (x_g.at[rows_, here], w_gs[i].at[here, columns]),
                            (False, together),
                        )

                def lora(first):
                    facts = facts_of(place.loaded)
                    slot, count = slot_of(facts), steps(facts, i)

                    @mgpu.pl.loop(0, count)
                    def _(index):
                        here = mgpu.pl.ds(index * depth, depth)
                        lora_ring.fill(
                            first + index,
                            (s_gs[i].at[rows_, here], b_gs[i].at[slot, here, columns]),
                        )

                    return count

                if narrow:
                    count = lora(progress.lora)
                    base()
                else:
                    base()
                    count = lora(progress.ring + base_steps)
                return advance(progress, count)

            walked, progress = 0, gemm.at_start()
            for i in range(group):
                walked, progress = gemm.walk(
                    fetch, (num_rows, widths[i]), sizes, sms, walked, progress,
                    partial(visit, i=i),
                )  # fmt: skip
            ring.drain(progress.ring)
            if narrow:
                lora_ring.drain(progress.lora)

        def compute(warpgroup):
            shape, row0, column0 = gemm.share(warpgroup, sizes)
            my_rows, my_columns = mgpu.pl.ds(row0, shape[0]), mgpu.pl.ds(column0, shape[1])

            def operands(x_tile, w_tile):
                return x_tile.at[my_rows, :], w_tile.at[:, my_columns]

            def visit(place, _, progress, i=0):
                more = steps(facts_of(place.loaded), i)

                def products(accumulator):
                    def lora():
                        @mgpu.pl.when(more > 0)
                        def _():
                            mgpu.wgmma(accumulator, *operands(*lora_ring.take(progress.lora)))

                    gemm.contract(
                        ring, accumulator, progress.ring, base_steps, operands,
                        more=None if narrow else more, last=lora if narrow else None,
                    )  # fmt: skip

                value = mgpu.accumulate(shape, products)
                if narrow:

                    @mgpu.pl.when(more > 0)
                    def _():
                        lora_ring.release(progress.lora)

                row, column = place.row + row0, place.column + column0
                if bias_gs[i] is not None:
                    value = value + mgpu.load_columns(bias_gs[i], column, shape)
                gemm.store_tile(value.astype(dtype), staged, warpgroup, y_gs[i], row, column)
                return advance(progress, more)

            walked, progress = 0, gemm.at_start()
            for i in range(group):
                walked, progress = gemm.walk(
                    fetch, (num_rows, widths[i]), sizes, sms, walked, progress,
                    partial(visit, i=i),
                )  # fmt: skip
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    return tuple(
        mgpu.launch(
            body,
            out_type=tuple(jax.ShapeDtypeStruct((num_rows, n), dtype) for n in widths),
            grid=(sms // sizes.cluster,),
            grid_names=("sm",),
            cluster=sizes.cluster,
            scratch=(
                *gemm.ring_scratch(sizes, TILE_K, dtype, transposed=False),
                gemm.epilogue_scratch(sizes, dtype),
                *(gemm.ring_scratch(sizes, depth, dtype, transposed=False) if narrow else ()),
            ),
            name="lora_base_up",
        )(x, rows.table, *ws, *ss, *b, *padded_biases)
    )
