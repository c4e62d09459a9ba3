"""Runs one kernel that reads its table far behind its end: what a sanitizer must find.

python -m tests.reliability.overrun
"""

from unittest import mock

import jax
import jax.numpy as jnp

from pallas_kernels.lora import down as module
from pallas_kernels.segments import Tiles, prepare, read_facts
from pallas_kernels.tables import choose
from pallas_kernels.tuning import Shape

TILES, K, RANK, SLOTS = 4, 128, 16, 2
# 5 GB further. XLA maps memory for an array in pieces of 2 MB, whose rest is as good as the array
# for the sanitizer: an overrun of a few rows is none.
FAR = 1 << 28


def overrun(x: jax.Array, a: jax.Array, rows: Tiles) -> tuple[jax.Array, ...]:
    """The down-projection of all tiles, with the facts of tiles that are not there."""
    sizes = choose("down", Shape(x.shape[0], K, (128,), RANK))
    with mock.patch.object(module, "read_facts", lambda table, tile: read_facts(table, tile + FAR)):
        return module.down(x, a, rows, (RANK,), sizes)


def operands() -> tuple[jax.Array, jax.Array, Tiles]:
    """Rows of a few tiles, and how they are routed."""
    rows = TILES * 128
    routing = (
        jnp.ones(SLOTS),
        jnp.zeros(SLOTS),
        jnp.arange(TILES, dtype=jnp.int32) % SLOTS,
        jnp.ones(rows, jnp.uint32),
        jnp.zeros(1, jnp.uint32),
    )
    a = jnp.ones((SLOTS, RANK, K), jnp.bfloat16)
    return jnp.ones((rows, K), jnp.bfloat16), a, prepare(*routing)


if __name__ == "__main__":
    jax.block_until_ready(jax.jit(overrun)(*operands()))
