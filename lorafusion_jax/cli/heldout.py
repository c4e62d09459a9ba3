"""Evaluation of adapters that lie on disk."""

from collections.abc import Iterator
from pathlib import Path

from lorafusion_jax.cli.answers import load_adapters
from lorafusion_jax.lora.bank import split_adapters
from lorafusion_jax.models import load_base
from lorafusion_jax.train.evaluate import BASE, EvalResult, Evaluator
from lorafusion_jax.train.jobs import resolve_job
from lorafusion_jax.train.prepare import tile_rows
from lorafusion_jax.train.programs import Programs
from lorafusion_jax.train.run_folder import RunFolder
from lorafusion_jax.train.schedule import capacity_that_fills
from lorafusion_jax.train.step import Model, loss_chunk


def evaluate_adapters(
    folder: RunFolder, paths: dict[str, Path]
) -> Iterator[tuple[str, str, EvalResult]]:
    """Evaluates the base and each adapter on the held-out rows of the adapter's job.

    Args:
        folder: the run that held the rows out.
        paths: PEFT folder by job.

    Yields:
        Job, "base" or "adapter", and the result; jobs without held-out rows are left out.
    """
    config = folder.config
    base = load_base(config.base.model, config.base.dtype)
    jobs = [
        resolve_job(job, job.data, base, config.batching, config.seed)
        for name, job in folder.jobs.items()
        if name in paths
    ]
    bank = load_adapters(base, [paths[job.name] for job in jobs])
    graphdef, frozen = split_adapters(base.model)
    tile, limit = tile_rows(config.batching), config.batching.tokens_per_microbatch
    capacity = capacity_that_fills([job.eval_plan() for job in jobs], limit, tile)
    chunk = loss_chunk(base.config.vocab_size, capacity)
    programs = Programs(Model(graphdef, config.train.remat, chunk), frozen)
    evaluator = Evaluator(programs, jobs, capacity, tile)
    for slot, job in enumerate(jobs):
        for who, where in (("base", BASE), ("adapter", slot)):
            result = evaluator(bank, job, where)
            if result is not None:
                yield job.name, who, result
