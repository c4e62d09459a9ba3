"""Counter-based dropout: a mask that is a function of (row key, site, column, rate) only.

The mask of a token is therefore the same alone, packed with others, re-ordered, recomputed,
resumed, or on another pipeline stage. All arithmetic is uint32; every implementation reproduces
it bit for bit.

Element (row, c) of a site belongs to the hash
    h = lowbias32((row_key + lowbias32(site)) ^ (((c // 64) * 16 + c % 16) * 0x9E3779B1))
and to its byte (c // 16) % 4. It is kept if byte >= t with t = round(256 * rate), and kept
values are scaled by 256 / (256 - t), so the expectation is exact for the quantised rate.

Row key 0 is reserved: it marks a padding row, whose LoRA branch is exactly zero.
"""

import hashlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

_GOLDEN = 0x9E3779B1
_COLUMNS_PER_GROUP = 64  # one hash serves 4 columns, 16 apart: cheap in a wgmma register layout
MIN_RATE = 1 / 512  # below this the 8-bit threshold would round to "never drop"


def lowbias32(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Mixes 32 bits with a low-bias multiply-xorshift finaliser (constants by C. Wellons)."""
    x = x ^ (x >> jnp.uint32(16))
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> jnp.uint32(15))
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def job_seed(seed: int, job: str) -> int:
    """Returns the 32-bit seed of a job; a function of its name, never of its slot."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{job}".encode()).digest()[:4], "big")


def row_keys(
    job_seed: UInt32[Array, " T"],
    epoch: Int[Array, " T"],
    sample: Int[Array, " T"],
    position: Int[Array, " T"],
) -> UInt32[Array, " T"]:
    """Returns the dropout identity of each token; never 0, which marks padding rows.

    >>> import jax.numpy as jnp
    >>> zeros, position = jnp.zeros(3, jnp.int32), jnp.arange(3)
    >>> keys = row_keys(jnp.full(3, 7, jnp.uint32), zeros, zeros, position)
    >>> len(set(keys.tolist()))
    3
    """
    h = job_seed.astype(jnp.uint32)
    for value in (epoch, sample, position):
        h = lowbias32(h ^ value.astype(jnp.uint32))
    return jnp.where(h == 0, jnp.uint32(1), h)


def drop_threshold(rate: Float[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Returns t = round(256 * rate): a byte below t is dropped."""
    return jnp.round(rate.astype(jnp.float32) * 256).astype(jnp.uint32)


def keep_scale(rate: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns 256 / (256 - t), the factor of kept values, in float32."""
    return 256.0 / (256.0 - drop_threshold(rate).astype(jnp.float32))


def keep_mask(
    row_key: UInt32[Array, " T"], site: UInt32[Array, " 1"], rate: Float[Array, " T"], columns: int
) -> Bool[Array, "T columns"]:
    """Returns the keep mask of `columns` columns for rows of the given keys and rates.

    Args:
        row_key: dropout identity of each row.
        site: which input of the model is dropped (8 * layer + input group).
        rate: dropout rate of each row.
        columns: width of the masked input.
    """
    groups = -(-columns // _COLUMNS_PER_GROUP)
    counter = jax.lax.iota(jnp.uint32, groups * 16) * jnp.uint32(_GOLDEN)
    h = lowbias32((row_key + lowbias32(site))[:, None] ^ counter[None, :])
    h = h.reshape(-1, groups, 1, 16)
    shifts = (jax.lax.iota(jnp.uint32, 4) * jnp.uint32(8)).reshape(1, 1, 4, 1)
    byte = (h >> shifts) & jnp.uint32(255)
    kept = byte >= drop_threshold(rate)[:, None, None, None]
    return kept.reshape(row_key.shape[0], groups * _COLUMNS_PER_GROUP)[:, :columns]
