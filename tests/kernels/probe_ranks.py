"""On a GPU: which result goes wrong where a launch holds more than 256 ranks side by side?

    python -m tests.kernels.probe_ranks

Once, two projections of rank 200 that share X failed as one launch, and groups have been taken
apart since. This prints each result's error over the least possible one, taken apart and not; a
ratio over 1.1 is wrong (but for dX taken apart, which is rounded once per part: 1.2). Cases differ
from the one that failed in one thing each.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.lora import mosaic_gpu
from tests.kernels.oracle import errors, fast_truth, make_problem, run

_FAILED = {"tiles": (1, 0, 1), "k": 320, "ns": (640, 64), "rank": 200}
CASES = {
    "as it failed": _FAILED,
    "no padded ranks": _FAILED | {"rank": 256},
    "256 ranks in two": _FAILED | {"rank": 128},
    "wide second output": _FAILED | {"ns": (640, 640)},
    "whole tiles": _FAILED | {"k": 256, "ns": (512, 512)},
    "without dropout": _FAILED | {"rates": (0.0, 0.0)},
    "one tile of one adapter": _FAILED | {"tiles": (0,)},
}


def main() -> None:
    """Prints a line per case and limit."""
    for name, case in CASES.items():
        p = make_problem(dtype=jnp.bfloat16, tile_rows=128, **case)
        want = fast_truth(p)
        least = errors(fast_truth(p, rounded=True), want)
        for limit in (256, 1024):
            mosaic_gpu.MAX_RANKS = limit
            jax.clear_caches()
            found = errors(jax.jit(run, static_argnums=0)(mosaic_gpu, p), want)
            ratios = {key: error / max(least[key], 1e-4) for key, error in found.items()}
            print(f"{name:<24} {limit:>5}", {k: round(v, 2) for k, v in ratios.items()}, flush=True)


if __name__ == "__main__":
    main()
