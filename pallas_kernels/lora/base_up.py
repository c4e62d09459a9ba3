"""Y_i = X W_i (+ bias_i) + S_i B_i for projections that share X, in one persistent launch.

The term S B is extra steps of the same accumulator. A tile of outputs never straddles projections;
each loads only its own columns of S and its own adapter's rows of B.
"""

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
    lora_steps = [gemm.steps_of(s.shape[1]) for s in ss]
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
        y_gs, (x_s, w_s, full, empty, staged) = rest[:group], rest[group:]
        ring = mgpu.Ring((x_s, w_s), full, empty, sizes.stages)

        def fetch(tile):
            return load_facts(table_g, tile)

        def steps(facts, i):
            """Ring steps of a tile's LoRA term."""
            return jnp.where(facts.adapter >= 0, jnp.int32(lora_steps[i]), jnp.int32(0))

        def memory():
            walked, step = 0, jnp.int32(0)
            for i in range(group):

                def visit(row, column, step, loaded, i=i):
                    rows_, columns = mgpu.pl.ds(row, TILE_M), mgpu.pl.ds(column, TILE_N)

                    @mgpu.pl.loop(0, base_steps)
                    def _(index):
                        depth = mgpu.pl.ds(index * TILE_K, TILE_K)
                        ring.fill(step + index, (x_g.at[rows_, depth], w_gs[i].at[depth, columns]))

                    facts = facts_of(loaded)
                    slot, count = jnp.maximum(facts.adapter, 0), steps(facts, i)

                    @mgpu.pl.loop(0, count)
                    def _(index):
                        depth = mgpu.pl.ds(index * TILE_K, TILE_K)
                        ring.fill(
                            step + base_steps + index,
                            (s_gs[i].at[rows_, depth], b_gs[i].at[slot, depth, columns]),
                        )

                    return step + base_steps + count

                walked, step = gemm.walk(
                    fetch, (num_rows, widths[i]), sizes, sms, walked, step, visit
                )
            ring.drain(step)

        def compute(warpgroup):
            shape, row0, column0 = gemm.share(warpgroup, sizes)
            my_rows, my_columns = mgpu.pl.ds(row0, shape[0]), mgpu.pl.ds(column0, shape[1])

            def operands(x_tile, w_tile):
                return x_tile.at[my_rows, :], w_tile.at[:, my_columns]

            walked, step = 0, jnp.int32(0)
            for i in range(group):

                def visit(row, column, step, loaded, i=i):
                    more = steps(facts_of(loaded), i)
                    value = mgpu.accumulate(
                        shape,
                        lambda acc: gemm.contract(ring, acc, step, base_steps, operands, more),
                    )
                    if bias_gs[i] is not None:
                        value = value + mgpu.load_columns(bias_gs[i], column + column0, shape)
                    gemm.store_tile(
                        value.astype(dtype),
                        staged,
                        warpgroup,
                        y_gs[i],
                        row + row0,
                        column + column0,
                    )
                    return step + base_steps + more

                walked, step = gemm.walk(
                    fetch, (num_rows, widths[i]), sizes, sms, walked, step, visit
                )
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    return tuple(
        mgpu.launch(
            body,
            out_type=tuple(jax.ShapeDtypeStruct((num_rows, n), dtype) for n in widths),
            grid=(sms,),
            grid_names=("sm",),
            scratch=(
                *gemm.ring_scratch(sizes, dtype, transposed=False),
                gemm.epilogue_scratch(dtype),
            ),
            name="lora_base_up",
        )(x, rows.table, *ws, *ss, *b, *padded_biases)
    )
