"""Runs two small problems through the kernels once: what compute-sanitizer looks at."""

import sys

import jax
import jax.numpy as jnp

from pallas_kernels.lora import mosaic_gpu
from tests.kernels.oracle import errors, fast_truth, make_problem, run

SHAPES = (
    {"tiles": (0, 1, -1, 1), "k": 320, "ns": (320,), "rank": 16, "padding": (3, 300)},
    {"tiles": (1, 0), "k": 128, "ns": (128, 64), "rank": 72, "biased": True},
)


def main() -> int:
    """Returns 1 if a result is not what it should be."""
    worst = 0.0
    for shape in SHAPES:
        p = make_problem(dtype=jnp.bfloat16, tile_rows=128, **shape)
        ours = jax.jit(run, static_argnums=0)(mosaic_gpu, p)
        worst = max(worst, *errors(ours, fast_truth(p)).values())
    print(f"largest error {worst:.1e}")
    return int(not worst < 0.02)


if __name__ == "__main__":
    sys.exit(main())
