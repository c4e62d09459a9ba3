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
_TOP_BITS = 0x80808080


class RowMask(NamedTuple):
    """What the mask of some rows needs: vectors over the rows of a register layout, and scalars.

    Attributes:
        start: row key plus mixed site.
        live: all ones, or zeros for a padding row.
        low: the low seven bits of the drop threshold, in each byte.
        either: all ones for a threshold below 128, else zeros.
    """

    start: jax.Array
    live: jax.Array
    low: jax.Array
    either: jax.Array


def load_keys(key_ref, layout: Any = mgpu.Layout.WGMMA) -> jax.Array:
    """Loads the keys of some rows as a vector over the rows of a register layout."""
    return mgpu.load(key_ref, layout=layout.reduce(1), optimized=False)


def row_mask(keys: jax.Array, site, threshold) -> RowMask:
    """Prepares the mask of rows with the given keys, at a site, for a rate's threshold."""
    ones, zeros = jnp.full_like(keys, 0xFFFFFFFF), jnp.zeros_like(keys)
    threshold = lax.convert_element_type(threshold, jnp.uint32)
    return RowMask(
        keys + lowbias32(site),
        jnp.where(keys == jnp.uint32(0), zeros, ones),
        (threshold & jnp.uint32(127)) * jnp.uint32(0x01010101),
        jnp.where(threshold < jnp.uint32(128), jnp.uint32(0xFFFFFFFF), jnp.uint32(0)),
    )


def _columns(vector: jax.Array, columns: int) -> jax.Array:
    return lax.broadcast_in_dim(vector, (vector.shape[0], columns), (0,))


def _kept(mask: RowMask, first_column, columns: int, layout: Any):
    """Yields for each group of 64 columns a [rows, 16] array: the top bit of byte b of lane l says
    whether column 16 b + l is kept."""
    start, live = (_columns(vector, 16) for vector in (mask.start, mask.live))
    lanes = mgpu.broadcasted_iota(jnp.uint32, start.shape, 1, layout=layout)
    first = lax.convert_element_type(first_column, jnp.uint32) // jnp.uint32(4)
    counter = (lanes + first) * jnp.uint32(_GOLDEN)
    for group in range(columns // _GROUP):
        h = lowbias32(start ^ (counter + jnp.uint32(group * 16 * _GOLDEN & 0xFFFFFFFF)))
        # All four bytes at once. Top bits of `over`: the low seven bits reach the threshold's. A
        # byte reaches a threshold below 128 by either top bit, another one by both.
        over = (h | jnp.uint32(_TOP_BITS)) - mask.low
        yield ((h & over) | ((h | over) & mask.either)) & live


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
    (rows, columns), pieces = value.shape, []
    packed = value.dtype.itemsize == 2 and not mgpu.interpreting()
    for group, kept in enumerate(_kept(mask, first_column, columns, layout)):
        low = group * _GROUP
        if packed:
            piece = lax.slice(value, (0, low), (rows, low + _GROUP))
            pieces.append(mgpu.keep_pairs(piece, kept, layout))
            continue
        for byte in range(4):
            piece = lax.slice(value, (0, low + 16 * byte), (rows, low + 16 * byte + 16))
            bit = kept & jnp.uint32(0x80 << 8 * byte)
            pieces.append(jnp.where(bit != jnp.uint32(0), piece, jnp.zeros((), value.dtype)))
    return lax.concatenate(pieces, 1)


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
