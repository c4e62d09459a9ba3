"""Row tiles sorted by adapter, and ordered sums of partial results over them.

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
from jaxtyping import Array, Float, Int

from pallas_kernels import _mgpu as mgpu

_CHUNK = 2048  # elements that a block sums at a time


class TileOrder(NamedTuple):
    """Row tiles sorted by adapter, those without one last.

    Attributes:
        tile: the tiles in that order.
        adapter: adapter of each of them, clamped to the last slot where there is none.
        start: where each adapter's tiles begin in it, and the end of the last one's.
    """

    tile: Int[Array, " tiles"]
    adapter: Int[Array, " tiles"]
    start: Int[Array, " E1"]


def order_tiles(tile_adapter: Int[Array, " tiles"], slots: int) -> TileOrder:
    """Sorts the tiles by adapter, stably."""
    key = jnp.where(tile_adapter < 0, slots, tile_adapter)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    start = jnp.sum(key[None, :] < jnp.arange(slots + 1)[:, None], axis=1, dtype=jnp.int32)
    return TileOrder(order, jnp.minimum(key[order], slots - 1), start)


class Split(NamedTuple):
    """A block's stretch of sorted tiles, inside a kernel: [first, last) of the walk."""

    first: jax.Array
    last: jax.Array
    index: jax.Array


def split_bounds(start_ref, slots: int, index, length: int) -> Split:
    """Returns the stretch of a split of `length` tiles; empty past the last tile in use."""
    used = start_ref[slots]
    first = jnp.minimum(index * length, used)
    return Split(first, jnp.minimum(first + length, used), index)


def for_each_run(split: Split, adapter_ref, start_ref, run) -> None:
    """Calls `run(slot, first, last, segment)` for each adapter of a stretch of sorted tiles."""

    @mgpu.pl.when(split.first < split.last)
    def _():
        @mgpu.pl.loop(adapter_ref[split.first], adapter_ref[split.last - 1] + 1)
        def _(slot):
            first = jnp.maximum(split.first, start_ref[slot])
            last = jnp.minimum(split.last, start_ref[slot + 1])

            @mgpu.pl.when(first < last)
            def _():
                run(slot, first, last, split.index + slot)


def sum_segments(
    parts: Float[Array, "segments R N"], start: Int[Array, " E1"], split_length: int
) -> Float[Array, "E R N"]:
    """Adds each adapter's partial results in order; zeros for adapters without tiles.

    Args:
        parts: partial results by segment; rows that belong to no run are never read.
        start: as in `TileOrder`.
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
