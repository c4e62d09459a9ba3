"""Microbatch sizes of a run: given, as large as the data can fill, or chosen with the schedule."""

from collections.abc import Sequence
from pathlib import Path

from lorafusion_jax.config import BatchingConfig
from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.train.schedule import capacity_that_fills
from lorafusion_sched import (
    Clock,
    Cost,
    Job,
    PlanError,
    Problem,
    choose_capacity,
    cost_from_json,
    distance_of,
    padded,
)

COST_FILE = "cost.json"
"""Name of the file of measured costs in a run's folder."""

_STEPS = 16  # sizes to choose from
_ROOFLINE_TOKENS = 300  # an H100 multiplies with 300 tokens while it reads the weights once


def capacities_of(
    jobs: Sequence[Job],
    batching: BatchingConfig,
    tile: int,
    cost: Cost,
    *,
    clock: Clock = "1f1b",
    stages: int = 1,
    width: int = 1,
) -> tuple[int, ...]:
    """Returns the microbatch sizes, ascending.

    Args:
        jobs: complete jobs.
        batching: `capacities` are used as they are; "auto" compares whole schedules of sizes up to
            `tokens_per_microbatch`; None is one size, the largest that the data can fill.
        tile: padding multiple of a stretch.
        cost: time of a microbatch, for "auto".
        clock: how pipeline stages take turns, for "auto"; also the next two.
        stages: pipeline stages.
        width: microbatches per slot of the pipeline.

    Raises:
        PlanError: a sample is longer than the largest size.
    """
    if isinstance(batching.capacities, tuple):
        return batching.capacities
    largest = capacity_that_fills(jobs, batching.tokens_per_microbatch, tile)
    if batching.capacities is None:
        return (largest,)
    step = padded(max(tile, largest // _STEPS), tile)
    problem = Problem(
        jobs=tuple(jobs),
        capacities=tuple(sorted({*range(step, largest, step), largest})),
        tile=tile,
        distance=distance_of(clock, stages),
        width=width,
        clock=clock,
        cost=cost,
    )
    return choose_capacity(problem).capacities


def cost_of_run(folder: Path, config: ModelConfig) -> Cost:
    """Returns the cost measured for a run, or what the model's shape tells.

    Args:
        folder: of the run; `lorafusion plan --measure` leaves its measurement there.
        config: of the base model.

    Raises:
        ConfigError: the file cannot be used.
    """
    path = folder / COST_FILE
    if not path.is_file():
        return cost_of_shape(config)
    try:
        return cost_from_json(path.read_text(encoding="utf-8"))
    except (PlanError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}; measure again: `lorafusion plan --measure`") from error


def cost_of_shape(config: ModelConfig) -> Cost:
    """Returns the cost that counting operations gives, in units of one token's linears.

    Attention is causal: half of its products count. The fixed part is the time in which the frozen
    weights are read once.
    """
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    d, inner = config.hidden_size, config.intermediate_size
    linears = 2 * d * q + 2 * d * kv + 3 * d * inner
    head = config.vocab_size * d / config.num_hidden_layers
    return Cost(
        fixed=_ROOFLINE_TOKENS, per_token=1.0, per_square=q / (linears + head), backward=1.0
    )
