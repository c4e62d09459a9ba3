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
from pallas_kernels.lora.s_pass import Operands, SPass, scratch
from pallas_kernels.segments import Tiles, facts_of, load_facts
from pallas_kernels.tuning import GemmTiles


@mgpu.traced_once
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
    return _launch(x, ws, ss, None, b, biases, rows, sizes)


@mgpu.traced_once
def base_up_with_s(
    x: Float[Array, "T K"],
    ws: tuple[Float[Array, "K _"], ...],
    a: Float[Array, "E RC K"],
    b: tuple[Float[Array, "E _ _"], ...],
    biases: tuple[Float[Array, " _"] | None, ...],
    rows: Tiles,
    sizes: GemmTiles,
) -> tuple[tuple[Float[Array, "T _"], ...], tuple[Float[Array, "T _"], ...]]:
    """Returns the outputs and S, which the same launch makes from A; see `s_pass`.

    Not for vmap, under which blocks of different calls would share flags.

    Args:
        x: input rows.
        ws: frozen weights.
        a: down-projections of all projections side by side in x's dtype, at most 32 ranks.
        b: up-projections, as for `base_up`.
        biases: frozen biases or None.
        rows: routing of the rows.
        sizes: tile sizes.
    """
    outs = _launch(x, ws, None, a, b, biases, rows, sizes)
    return outs[: len(ws)], tuple(s[: x.shape[0]] for s in outs[len(ws) :])


def _launch(x, ws, ss, a, b, biases, rows: Tiles, sizes: GemmTiles) -> tuple[Array, ...]:
    (num_rows, k), dtype, group = x.shape, x.dtype, len(ws)
    widths, ranks = [w.shape[1] for w in ws], [stack.shape[1] for stack in b]
    base_steps = gemm.steps_of(k)
    lora_steps = [gemm.steps_of(rank) for rank in ranks]
    sms = mgpu.num_sms()
    padded_biases = [
        jnp.pad(bias.astype(jnp.float32), (0, -bias.shape[0] % TILE_N))
        for bias in biases
        if bias is not None
    ]

    inputs = (x, rows.table, *ws, *b, *padded_biases)
    if a is not None:
        whole_tiles = -(-num_rows // TILE_M) * TILE_M
        made = tuple(jax.ShapeDtypeStruct((whole_tiles, rank), dtype) for rank in ranks)
        inputs += (a, rows.row_key, rows.site)
    else:
        made = ()
        inputs += ss

    def body(*refs):
        (x_g, table_g, *rest), outs = refs[: len(inputs)], refs[len(inputs) :]
        w_gs, b_gs, rest = rest[:group], rest[group : 2 * group], rest[2 * group :]
        found = iter(rest[: len(padded_biases)])
        bias_gs = [None if bias is None else next(found) for bias in biases]
        rest = rest[len(padded_biases) :]
        y_gs, outs = outs[:group], outs[group:]
        s_gs, (x_s, w_s, full, empty, staged, *own) = (
            (outs[:group], outs[group:]) if made else (rest, outs)
        )
        ring = mgpu.Ring((x_s, w_s), full, empty, sizes.stages)
        s_pass = None
        if made:
            a_g, key_g, site_g = rest
            operands = Operands(x_g, a_g, table_g, key_g, site_g)
            tiles = gemm.tile_count(num_rows, widths)
            s_pass = SPass(operands, s_gs, ring, own, tiles, sms)

        def fetch(tile):
            return load_facts(table_g, tile)

        def steps(facts, i):
            """Ring steps of a tile's LoRA term."""
            return jnp.where(facts.adapter >= 0, jnp.int32(lora_steps[i]), jnp.int32(0))

        def memory():
            def visit(place, step, i=0):
                rows_, columns = mgpu.pl.ds(place.row, TILE_M), mgpu.pl.ds(place.column, TILE_N)

                @mgpu.pl.loop(0, base_steps)
                def _(index):
                    here = mgpu.pl.ds(index * TILE_K, TILE_K)
                    ring.fill(step + index, (x_g.at[rows_, here], w_gs[i].at[here, columns]))

                facts = facts_of(place.loaded)
                slot, count = jnp.maximum(facts.adapter, 0), steps(facts, i)
                if s_pass is not None:
                    mgpu.pl.when(count > 0)(partial(s_pass.wait, place.row_tile))

                @mgpu.pl.loop(0, count)
                def _(index):
                    here = mgpu.pl.ds(index * TILE_K, TILE_K)
                    ring.fill(
                        step + base_steps + index,
                        (s_gs[i].at[rows_, here], b_gs[i].at[slot, here, columns]),
                    )

                return step + base_steps + count

            if s_pass is not None:
                s_pass.load()
            walked, step = 0, jnp.int32(0)
            for i in range(group):
                walked, step = gemm.walk(
                    fetch, (num_rows, widths[i]), sizes, sms, walked, step, partial(visit, i=i)
                )
            ring.drain(step)

        def compute(warpgroup):
            shape, row0, column0 = gemm.share(warpgroup, sizes)
            my_rows, my_columns = mgpu.pl.ds(row0, shape[0]), mgpu.pl.ds(column0, shape[1])

            def operands(x_tile, w_tile):
                return x_tile.at[my_rows, :], w_tile.at[:, my_columns]

            def visit(place, step, i=0):
                more = steps(facts_of(place.loaded), i)
                value = mgpu.accumulate(
                    shape,
                    lambda acc: gemm.contract(ring, acc, step, base_steps, operands, more=more),
                )
                row, column = place.row + row0, place.column + column0
                if bias_gs[i] is not None:
                    value = value + mgpu.load_columns(bias_gs[i], column, shape)
                gemm.store_tile(value.astype(dtype), staged, warpgroup, y_gs[i], row, column)
                return step + base_steps + more

            if s_pass is not None:
                s_pass.compute(warpgroup)
            walked, step = 0, jnp.int32(0)
            for i in range(group):
                walked, step = gemm.walk(
                    fetch, (num_rows, widths[i]), sizes, sms, walked, step, partial(visit, i=i)
                )
            mgpu.wait_smem_to_gmem(0)

        mgpu.warp_specialize(memory, compute)

    return tuple(
        mgpu.launch(
            body,
            out_type=(*(jax.ShapeDtypeStruct((num_rows, n), dtype) for n in widths), *made),
            grid=(sms,),
            grid_names=("sm",),
            scratch=(
                *gemm.ring_scratch(sizes, dtype, transposed=False),
                gemm.epilogue_scratch(sizes, dtype),
                *(scratch(sizes) if made else ()),
            ),
            name="lora_base_up_with_s" if made else "lora_base_up",
        )(*inputs)
    )
