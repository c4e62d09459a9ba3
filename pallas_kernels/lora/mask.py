"""The dropout mask inside a kernel: made in registers from row keys, never stored.

Bit for bit the mask of `pallas_kernels.dropout.keep_mask`, and zero in padding rows (key 0).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu as mgpu
from pallas_kernels.dropout import lowbias32

_GOLDEN = 0x9E3779B1
_GROUP = 64  # columns that share 16 hashes, one byte each


class RowMask(NamedTuple):
    """What the mask needs per row, as vectors in the rows of a register layout.

    Attributes:
        start: row key plus mixed site.
        live: all ones, or zeros for a padding row.
        threshold: drop threshold in the top byte; one more than zero for a padding row.
    """

    start: jax.Array
    live: jax.Array
    threshold: jax.Array


def load_keys(key_ref, layout: Any = mgpu.Layout.WGMMA) -> jax.Array:
    """Loads the keys of some rows as a vector over the rows of a register layout."""
    return mgpu.load(key_ref, layout=layout.reduce(1), optimized=False)


def row_mask(keys: jax.Array, site, threshold) -> RowMask:
    """Prepares the mask of rows with the given keys, at a site, for a rate's threshold."""
    padding = keys == jnp.uint32(0)
    ones, zeros = jnp.full_like(keys, 0xFFFFFFFF), jnp.zeros_like(keys)
    top = jnp.full_like(keys, lax.convert_element_type(threshold, jnp.uint32) << jnp.uint32(24))
    return RowMask(
        keys + lowbias32(site),
        jnp.where(padding, zeros, ones),
        jnp.where(padding, jnp.full_like(keys, 1 << 24), top),
    )


def _columns(vector: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))


def _hash_bytes(mask: RowMask, first_column, columns: int, layout: Any = mgpu.Layout.WGMMA):
    """Yields for each group of 64 columns the compared tops of its four bytes, [rows, 16] each."""
    rows = mask.start.shape[0]
    start, live = (_columns(vector, 16) for vector in (mask.start, mask.live))
    lanes = mgpu.broadcasted_iota(jnp.uint32, (rows, 16), 1, layout=layout)
    first = lax.convert_element_type(first_column, jnp.uint32) // jnp.uint32(4)
    counter = (lanes + first) * jnp.uint32(_GOLDEN)
    for group in range(columns // _GROUP):
        h = lowbias32(start ^ (counter + jnp.uint32(group * 16 * _GOLDEN & 0xFFFFFFFF))) & live
        yield [h << jnp.uint32(24 - 8 * byte) if byte < 3 else h for byte in range(4)]


def _select(keeps, value: jax.Array) -> jax.Array:
    """Zeroes what `keeps` drops; it gives 16 columns at a time, in order."""
    zero, rows = jnp.zeros((), value.dtype), value.shape[0]
    pieces = [
        jnp.where(keep, lax.slice(value, (0, 16 * i), (rows, 16 * i + 16)), zero)
        for i, keep in enumerate(keeps)
    ]
    return lax.concatenate(pieces, 1)


def drop(
    value: jax.Array, mask: RowMask, first_column, layout: Any = mgpu.Layout.WGMMA
) -> jax.Array:
    """Zeroes the dropped elements and the padding rows of a [rows, columns] value.

    Args:
        value: in the register layout given; a multiple of 64 columns.
        mask: of its rows.
        first_column: column of the masked input that value starts at, a multiple of 64.
        layout: of value.
    """
    threshold = _columns(mask.threshold, 16)
    groups = _hash_bytes(mask, first_column, value.shape[1], layout)
    return _select((top >= threshold for tops in groups for top in tops), value)


def clear_padding(value: jax.Array, mask: RowMask) -> jax.Array:
    """Zeroes the padding rows of a value, for rows whose rate is 0."""
    live = _columns(mask.live, value.shape[1]) != jnp.uint32(0)
    return jnp.where(live, value, jnp.zeros((), value.dtype))


def mask_tile(tile_ref, mask: RowMask, threshold, first_column) -> None:
    """Applies the mask to a tile in SMEM, in place, and makes it visible to wgmma."""

    @mgpu.pl.when(threshold > 0)
    def _():
        value = mgpu.load(tile_ref, layout=mgpu.Layout.WGMMA)
        tile_ref[...] = drop(value, mask, first_column)

    @mgpu.pl.when(threshold <= 0)
    def _():
        value = mgpu.load(tile_ref, layout=mgpu.Layout.WGMMA)
        tile_ref[...] = clear_padding(value, mask)

    mgpu.commit_smem()
