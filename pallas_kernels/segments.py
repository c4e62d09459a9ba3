"""Row tiles in tables, sorted by adapter, and ordered sums of partial results over them.

Gradients of A and B are sums over the rows of each adapter. Blocks walk the tiles in the order of
their adapter, so each (split, adapter) pair is one run: its partial result goes to row
split + adapter of a buffer. Along the walk both numbers never fall, so no two runs share a row and
the runs of an adapter are neighbours; adding them in order is bit-repeatable, and no adapter ever
meets another's NaN.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.dropout import drop_threshold, keep_scale

TILE_ROWS = 128
_CHUNK = 2048  # elements that a block sums at a time


class Tiles(NamedTuple):
    """What the kernels know of the rows.

    Attributes:
        table: facts of each tile of 128 rows, see `TileFacts`; side by side, so that a kernel gets
            them all in one memory latency (the integers among them are exact in float32).
        walk: the same sorted by adapter, tiles without one last.
        start: where each adapter's tiles begin in `walk`, and the end of the last one's.
        row_key: dropout identity per row of whole tiles; 0 for padding and rows without adapter.
        site: dropout site.
    """

    table: Float[Array, "tiles 5"]
    walk: Float[Array, "tiles 5"]
    start: Int[Array, " E1"]
    row_key: UInt32[Array, " Tp"]
    site: UInt32[Array, " 1"]


class TileFacts(NamedTuple):
    """A row of a table, inside a kernel.

    Attributes:
        tile: which tile.
        adapter: its slot, -1 for none.
        threshold: drop threshold of the slot.
        padding: 1 if any row is padding, else 0.
        factor: LoRA scale times the factor of kept values.
    """

    tile: jax.Array
    adapter: jax.Array
    threshold: jax.Array
    padding: jax.Array
    factor: jax.Array


def load_facts(table_ref, index) -> tuple[jax.Array, ...]:
    """Starts reading a row of a table; `facts_of` makes sense of it, and waits for it."""
    return tuple(table_ref[index, column] for column in range(len(TileFacts._fields)))


def facts_of(loaded: tuple[jax.Array, ...]) -> TileFacts:
    """Returns the facts in a row that `load_facts` read."""
    tile, adapter, threshold, padding = (
        lax.convert_element_type(value, jnp.int32) for value in loaded[:-1]
    )
    return TileFacts(tile, adapter, threshold, padding, loaded[-1])


def read_facts(table_ref, index) -> TileFacts:
    """Reads a row of a table."""
    return facts_of(load_facts(table_ref, index))


def prepare(
    scale: Float[Array, " E"],
    rate: Float[Array, " E"],
    tile_adapter: Int[Array, " tiles"],
    row_key: UInt32[Array, " T"],
    site: UInt32[Array, " 1"],
) -> Tiles:
    """Tabulates the rows for the kernels. The same for all layers of a step: XLA does it once.

    Tiles may be any multiple of 128 rows, or a single one of any size.
    """
    rows, slots = row_key.shape[0], scale.shape[0]
    num_tiles = -(-rows // TILE_ROWS)
    adapter = tile_adapter.astype(jnp.int32)
    if num_tiles != adapter.shape[0]:
        adapter = jnp.repeat(adapter, num_tiles // adapter.shape[0])
    keys = jnp.pad(row_key.astype(jnp.uint32), (0, num_tiles * TILE_ROWS - rows))
    keys = keys.reshape(num_tiles, TILE_ROWS) * (adapter >= 0).astype(jnp.uint32)[:, None]
    slot = jnp.maximum(adapter, 0)
    factor = (scale * keep_scale(rate)).astype(jnp.float32)[slot]
    columns = (
        jnp.arange(num_tiles),
        adapter,
        drop_threshold(rate)[slot],
        jnp.any(keys == 0, axis=1),
        factor,
    )
    table = jnp.stack([column.astype(jnp.float32) for column in columns], axis=1)
    walk, start = _sorted_by_adapter(table, adapter, slots)
    return Tiles(table, walk, start, keys.reshape(-1), site.astype(jnp.uint32))


def _sorted_by_adapter(table, adapter, slots: int):
    if slots == 1:  # tiles without adapter may stay: all their rows count as padding
        return table, jnp.asarray([0, adapter.shape[0]], jnp.int32)
    key = jnp.where(adapter < 0, slots, adapter)
    order = jnp.argsort(key, stable=True)
    start = jnp.sum(key[None, :] < jnp.arange(slots + 1)[:, None], axis=1, dtype=jnp.int32)
    return table[order], start


class Split(NamedTuple):
    """A block's stretch of the walk, inside a kernel: tiles first to last, exclusive."""

    first: jax.Array
    last: jax.Array
    number: jax.Array


def split_bounds(start_ref, slots: int, index, length: int) -> Split:
    """Returns the stretch of a split of `length` tiles; empty past the last tile in use."""
    used = start_ref[slots]
    first = jnp.minimum(index * length, used)
    return Split(first, jnp.minimum(first + length, used), index)


def for_each_run(split: Split, walk_ref, start_ref, slots: int, run) -> None:
    """Calls `run(slot, first, last, segment)` for each adapter of a stretch of the walk."""

    @mgpu.pl.when(split.first < split.last)
    def _():
        if slots == 1:
            run(jnp.int32(0), split.first, split.last, split.number)
            return
        low, high = (read_facts(walk_ref, p).adapter for p in (split.first, split.last - 1))

        @mgpu.pl.loop(low, high + 1)
        def _(slot):
            first = jnp.maximum(split.first, start_ref[slot])
            last = jnp.minimum(split.last, start_ref[slot + 1])

            @mgpu.pl.when(first < last)
            def _():
                run(slot, first, last, split.number + slot)


@mgpu.traced_once
def sum_segments(
    parts: Float[Array, "segments R N"], start: Int[Array, " E1"], split_length: int
) -> Float[Array, "E R N"]:
    """Adds each adapter's partial results in order; zeros for adapters without tiles.

    Args:
        parts: partial results by segment; rows that belong to no run are never read.
        start: as in `Tiles`.
        split_length: tiles per split.
    """
    _, rank, columns = parts.shape
    slots, size = start.shape[0] - 1, rank * columns
    flat = parts.reshape(parts.shape[0], size)
    tail = -size % _CHUNK
    if tail:
        flat = jnp.pad(flat, ((0, 0), (0, tail)))
    layout = mgpu.Layout.WG_STRIDED((_CHUNK,), 4)

    def body(parts_g, start_g, out_g):
        slot, chunk = lax.axis_index("slot"), lax.axis_index("chunk")
        here = mgpu.pl.ds(chunk * _CHUNK, _CHUNK)
        first, last = start_g[slot], start_g[slot + 1]
        low = lax.div(first, jnp.int32(split_length)) + slot
        high = lax.div(last - 1, jnp.int32(split_length)) + slot + 1

        def add(segment, total):
            return total + mgpu.load(parts_g.at[segment, here], layout=layout, optimized=False)

        zeros = mgpu.layout_cast(jnp.zeros((_CHUNK,), jnp.float32), layout)
        out_g[slot, here] = lax.fori_loop(low, jnp.where(last > first, high, low), add, zeros)

    out = mgpu.launch_simple(
        body,
        out_type=jax.ShapeDtypeStruct((slots, size + tail), jnp.float32),
        grid=(slots, (size + tail) // _CHUNK),
        grid_names=("slot", "chunk"),
        name="lora_sum_segments",
    )(flat, start)
    return out[:, :size].reshape(slots, rank, columns)
