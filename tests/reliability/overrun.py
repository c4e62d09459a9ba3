"""Runs one kernel with a table that is far too short: the overrun that a sanitizer must find.

python -m tests.reliability.overrun
"""

import jax
import jax.numpy as jnp

from pallas_kernels.lora.down import down
from pallas_kernels.segments import Tiles, prepare
from pallas_kernels.tables import choose
from pallas_kernels.tuning import Shape

TILES, K, RANK, SLOTS = 512, 128, 16, 2


def overrun(x: jax.Array, a: jax.Array, rows: Tiles) -> tuple[jax.Array, ...]:
    """The down-projection of all tiles."""
    sizes = choose("down", Shape(x.shape[0], K, (128,), RANK))
    return down(x, a, rows, (RANK,), sizes)


def operands() -> tuple[jax.Array, jax.Array, Tiles]:
    """Rows of 512 tiles, whose facts are 10 KB, with a table of the first tile's 20 bytes.

    The table is cut here and not under jit, where XLA would hand the kernel the whole one.
    """
    rows = TILES * 128
    routing = (
        jnp.ones(SLOTS),
        jnp.zeros(SLOTS),
        jnp.arange(TILES, dtype=jnp.int32) % SLOTS,
        jnp.ones(rows, jnp.uint32),
        jnp.zeros(1, jnp.uint32),
    )
    a = jnp.ones((SLOTS, RANK, K), jnp.bfloat16)
    tiles = prepare(*routing)
    return jnp.ones((rows, K), jnp.bfloat16), a, tiles._replace(table=jnp.array(tiles.table[:1]))


if __name__ == "__main__":
    jax.block_until_ready(jax.jit(overrun)(*operands()))
