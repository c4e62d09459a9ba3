"""How long the training step compiles: from nothing, and from the cache in a second process."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from lorafusion_jax.errors import ResourceError

COMPILE_ONLY = "--compile-only"


def compile_times(arguments: Sequence[str]) -> dict[str, float]:
    """Compiles in two processes, one after the other, that share a new cache.

    It must come before this process touches the device: each of them needs its memory.

    Args:
        arguments: of `lorafusion bench training`; with `--compile-only` it prints one JSON line.

    Returns:
        `compile_cold_seconds` and `compile_cached_seconds`: of tracing, lowering and compiling, or
        loading, the training step and the update.

    Raises:
        ResourceError: a process failed; says how.
    """
    words = [sys.executable, "-m", "lorafusion_jax.cli", "bench", "training", *arguments]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        cache = {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_ENABLE_COMPILATION_CACHE": "true"}
        for _ in range(2):
            ran = subprocess.run(
                [*words, COMPILE_ONLY],
                env=os.environ | cache,
                capture_output=True,
                text=True,
                check=False,
            )
            if ran.returncode:
                tail = "\n".join(ran.stderr.splitlines()[-5:])
                raise ResourceError(f"compiling in a process of its own failed: {tail}")
            found.append(float(json.loads(ran.stdout.splitlines()[-1])["compile_seconds"]))
    return {"compile_cold_seconds": found[0], "compile_cached_seconds": found[1]}
