"""Keeps a GPU busy until it is killed, with products of changing sizes.

python -m tests.reliability.gpu_load
"""

import itertools

import jax
import jax.numpy as jnp


def main() -> None:
    """Says `busy` once everything is compiled, then never ends."""
    product = jax.jit(lambda x: x @ x * (1 / x.shape[0]))
    operands = [jnp.ones((size, size), jnp.bfloat16) for size in (512, 1536, 4096)]
    jax.block_until_ready([product(x) for x in operands])
    print("busy", flush=True)
    for x in itertools.cycle(operands):
        product(x).block_until_ready()


if __name__ == "__main__":
    main()
