"""Systems that pad batches to their longest sample: timed at several lengths, and interpolated."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafusion_jax.bench.training import Program, Setup

SAMPLES = 4
PADDED_LENGTHS = (512, 1024, 2048, 4096)


def measure_padded(program: "Program", setup: "Setup", system: str, repeat: int) -> dict:
    """Measures a or c at several lengths, and adds up all batches of the jobs.

    Args:
        program: the system's step, not compiled yet.
        setup: what all systems share.
        system: letter.
        repeat: times that a global batch is run at each length.

    Returns:
        What `measure` makes a row of.
    """
    import numpy as np

    from lorafusion_jax.bench.systems import padded_batch
    from lorafusion_sched import Sample

    groups = _padded_groups(setup.jobs, system)
    grid = _grid(groups)
    times, batches = [], []
    for length in grid:
        samples = [(i % program.slots, Sample(0, i, length)) for i in range(SAMPLES)]
        ends = frozenset(range(program.slots))
        make = partial(padded_batch, tile=setup.tile, num_slots=program.slots)
        vocabulary = setup.config.vocab_size
        batch = make(sorted(samples), length, vocab_size=vocabulary)
        last = make(sorted(samples), length, vocab_size=vocabulary, ends=ends)
        batches = [batch, last]  # a global batch of 8 samples is two batches of 4
        program.compile(batch)
        program.run(batches)
        times.append(program.run(batches * repeat) / (2 * repeat))
    lengths, seconds, rows = [], 0.0, 0
    for group in groups:
        widest = max(sample.length for _, sample in group)
        # Fewer samples than 4 take their share of the time.
        seconds += float(np.interp(widest, grid, times)) * len(group) / SAMPLES
        rows += widest * len(group)
        lengths += [sample.length for _, sample in group]
    return {
        "program": program, "batches": batches, "seconds": seconds, "lengths": lengths,
        "padding": 1 - sum(lengths) / rows, "microbatches": len(groups), "plan_seconds": 0.0,
        "pack_ms": 0.0, "more": {},
    }  # fmt: skip


def _grid(groups: Sequence[Sequence]) -> list[int]:
    """The lengths at which a step is timed: up to the first that holds the longest sample."""
    longest = max(sample.length for group in groups for _, sample in group)
    last = next((n for n in PADDED_LENGTHS if n >= longest), PADDED_LENGTHS[-1])
    return [n for n in PADDED_LENGTHS if n < longest] + [last]


def write_padded_batches(path: Path, lengths: str, jobs: Sequence) -> None:
    """Adds the batches of system a to a JSON file, for programs that train the same samples.

    It holds, by mix, `grid` (lengths to time a step at) and `batches` (lengths of their samples).
    """
    groups = _padded_groups(jobs, "a")
    found = json.loads(path.read_text()) if path.exists() else {}
    batches = [[sample.length for _, sample in group] for group in groups]
    path.write_text(json.dumps(found | {lengths: {"grid": _grid(groups), "batches": batches}}))


def _padded_groups(jobs: Sequence, system: str) -> list[list]:
    """Slot and sample of each padded batch: of one job, or one sample of each job."""
    if system == "a":
        return [
            [(0, sample) for sample in batch[i : i + SAMPLES]]
            for job in jobs
            for batch in job.batches
            for i in range(0, len(batch), SAMPLES)
        ]
    columns = [[sample for batch in job.batches for sample in batch] for job in jobs]
    return [list(enumerate(samples)) for samples in zip(*columns, strict=True)]
