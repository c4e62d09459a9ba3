"""Times training microbatches on this device and fits the planner's cost to them."""

import time
from collections.abc import Sequence

import numpy as np

from lorafusion_jax.lora.bank import attach_adapters, split_adapters
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.train.batch import JobRows, pack
from lorafusion_jax.train.jobs import TrainJob
from lorafusion_jax.train.prepare import targeted
from lorafusion_jax.train.programs import Programs
from lorafusion_jax.train.step import Model, init_state, loss_chunk
from lorafusion_sched import Cost, Measured, Microbatch, Sample, Stretch, fit_cost

_SHORT = 8  # samples in a microbatch of short ones
_REPEATS = 3


class _MadeUpSamples:
    """Tokens to measure with: sample i has i of them."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        tokens = (np.arange(index) * 7919 % self._vocab_size).astype(np.int32)
        return tokens, np.ones(index, np.bool_)


def measure_cost(
    base: Base, jobs: Sequence[TrainJob], sizes: Sequence[int], tile: int, *, remat: str = "none"
) -> tuple[Cost, list[Measured]]:
    """Times training steps without updates, each size with short samples and with one long one.

    Args:
        base: with its weights.
        jobs: of the run: their number, modules and largest rank decide the adapters.
        sizes: at least two, multiples of the tile; one compilation each.
        tile: rows per tile.
        remat: rematerialisation policy.

    Returns:
        The fitted cost in seconds, and what was measured.

    Raises:
        PlanError: fewer than two sizes.
    """
    bank = attach_adapters(
        base.model, targeted(base, jobs), len(jobs), max(job.max_rank for job in jobs)
    )
    graphdef, frozen = split_adapters(base.model)
    attach_adapters(base.model, (), 0, 1)
    chunk = loss_chunk(base.config.vocab_size, max(sizes))
    programs = Programs(Model(graphdef, remat, chunk), frozen)
    state = init_state(bank, tuple(sorted({job.config.optim.name for job in jobs})))
    rows = {"probe": JobRows(0, 1, _MadeUpSamples(base.config.vocab_size), {0: 1})}
    measured = []
    for size in sizes:
        for count in (_SHORT, 1):
            length = size // count
            samples = tuple(Sample(0, length, length) for _ in range(count))
            microbatch = Microbatch((Stretch("probe", 0, samples, False),), size)
            batch, _ = pack(
                microbatch, rows, tile=tile, num_slots=len(jobs), max_segments=2 * _SHORT
            )
            seconds = []
            for _ in range(1 + _REPEATS):  # the first compiles
                start = time.perf_counter()
                state, loss = programs.train(state, batch)
                loss.block_until_ready()
                seconds.append(time.perf_counter() - start)
            measured.append(Measured(size, count * length**2, min(seconds[1:])))
    return fit_cost(measured), measured
