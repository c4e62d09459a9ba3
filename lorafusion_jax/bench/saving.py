"""How long training stands still for a checkpoint, at the size of real adapters.

    lorafusion bench saving [--jobs 1] [--rank 16] [--rounds 3]

The state is that of adapters on all linears of an 8B Llama: A and B, two moments and gradients in
float32. `blocked_s` is the copy to the host, `blocked_cpu_s` the processor's time for it, which a
busy machine does not stretch; hashing, writing and reading back go on beside training.
`step_s_for_2_percent` is the step time above which a save every 100 steps, the default of a job,
costs less than 2% of the time by the latter.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from lorafusion_jax.bench.results import Row, write_results
from lorafusion_jax.config import SaveConfig
from lorafusion_jax.train.background import BackgroundSaver
from lorafusion_jax.train.checkpoint import Checkpoints

LAYERS = 32
LINEARS = {  # of an 8B Llama: inputs, outputs
    "q": (4096, 4096),
    "k": (4096, 1024),
    "v": (4096, 1024),
    "o": (4096, 4096),
    "gate": (4096, 14336),
    "up": (4096, 14336),
    "down": (14336, 4096),
}
COPIES = ("weights", "first_moment", "second_moment", "gradient")


def adapter_state(jobs: int, rank: int) -> dict[str, dict[str, jax.Array]]:
    """Returns a state of that many adapters, on the device."""
    shapes = {
        f"layers.{layer}.{name}.{side}": (jobs, rank, width)
        for layer in range(LAYERS)
        for name, widths in LINEARS.items()
        for side, width in zip("ab", widths, strict=True)
    }
    return {
        copy: {name: jnp.full(shape, number, jnp.float32) for name, shape in shapes.items()}
        for number, copy in enumerate(COPIES)
    }


def measure(jobs: int, rank: int, rounds: int) -> list[Row]:
    """Saves a few times and returns one row per save."""
    state = jax.block_until_ready(adapter_state(jobs, rank))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    every = SaveConfig().every
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep_last=1)
        with BackgroundSaver(checkpoints) as saver:
            for step in range(rounds):
                start, worked = time.perf_counter(), time.thread_time()
                saver.save(step, state, {}, None)
                worked = time.thread_time() - worked
                blocked = time.perf_counter() - start
                (done,) = saver.wait()
                rows.append(
                    {
                        "jobs": jobs,
                        "rank": rank,
                        "state_bytes": size,
                        "every": every,
                        "blocked_s": round(blocked, 3),
                        "blocked_cpu_s": round(worked, 3),
                        "until_verified_s": round(done.seconds, 3),
                        "step_s_for_2_percent": round(worked / (0.02 * every), 3),
                    }
                )
    return rows


def main(arguments: Sequence[str]) -> int:
    """Measures and writes docs/results/<device>/saving.json."""
    parser = argparse.ArgumentParser(prog="lorafusion bench saving", description=__doc__)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args(arguments)
    rows = measure(asked.jobs, asked.rank, asked.rounds)
    for row in rows:
        print(
            f"{row['state_bytes']:,} bytes: training stood still for {row['blocked_s']} s "
            f"({row['blocked_cpu_s']} s of work), whole after {row['until_verified_s']} s"
        )
    command = f"lorafusion bench saving --jobs {asked.jobs} --rank {asked.rank}"
    print(write_results("saving", rows, command=command))
    return 0
