"""What the layers of a stage keep for their backwards: the richest policies that fit its memory.

A stage keeps residuals of as many microbatches as the ring is long, so memory decides what is
computed again. Policies may differ between layer places: where one that keeps more fits for some
layers only, these get it. All stages have the same policies, because they run one program.
"""

from collections.abc import Sequence

from lorafusion_jax.errors import ResourceError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import Remat
from lorafusion_jax.train.memory import HEAD_ROOM, Memory, Step, kept_bytes, linear_widths, predict

LEAST_FIRST: tuple[Remat, ...] = ("full", "attention", "mlp", "none")
"""Policies by what they keep; each keeps more and computes less than the one before."""

BACKWARD = 1.1
"""Backward over forward where nothing is computed again: dX alone, and the LoRA products."""

_TILES = 10  # of hidden states that a tick has at a time: exchanged ones twice


def recomputed_share(config: ModelConfig, remat: Remat) -> float:
    """Returns the share of a layer's large products that the backward computes again.

    `full` leaves out the last one, whose output no backward needs, and so does `attention` in its
    block. Attention itself and what is bound by memory are not counted.
    """
    sizes = [k * n for k, n in linear_widths(config)]
    again = {"none": 0, "mlp": 0, "attention": sum(sizes[:3]), "full": sum(sizes[:6])}
    return again[remat] / sum(sizes)


def backward_ratio(config: ModelConfig, policies: Sequence[Remat]) -> float:
    """Returns the time of a stage's backward over that of its forward."""
    return BACKWARD + sum(recomputed_share(config, p) for p in policies) / len(policies)


def stage_memory(step: Step, stages: int, ring: int, policies: Sequence[Remat]) -> Memory:
    """Predicts the memory of one device of a pipeline.

    Args:
        step: of the whole model.
        stages: of the pipeline.
        ring: microbatches that wait for their backward.
        policies: of the layer places of a stage.
    """
    config, places = step.config, len(policies)
    whole = predict(step, "none")
    layers = config.num_hidden_layers
    vocabulary = config.vocab_size * config.hidden_size * step.itemsize
    vocabulary *= 1 if config.tie_word_embeddings else 2
    tile = step.capacity * config.hidden_size * step.itemsize
    # The ring of the stage's inputs holds that of its first layer.
    kept = ring * sum(kept_bytes(step, remat) for remat in policies)
    # One layer's backward pass, of the layer that keeps least, or a chunk of the head and its sums.
    backward = predict(step, min(policies, key=LEAST_FIRST.index)).working
    head = step.loss_chunk * config.vocab_size // stages * (8 + step.itemsize)
    head += 2 * 4 * step.capacity * config.hidden_size
    return Memory(
        weights=(whole.weights - vocabulary) * places // layers + vocabulary // stages,
        adapters=whole.adapters * places // layers,
        kept=kept,
        working=max(backward, head) + _TILES * tile,
    )


def choose_policies(
    step: Step, stages: int, ring: int, available: int
) -> tuple[tuple[Remat, ...], Memory]:
    """Returns the policies of a stage's layer places that compute least again and fit.

    Args:
        step: of the whole model.
        stages: of the pipeline.
        ring: microbatches that wait for their backward.
        available: bytes of a device.

    Raises:
        ResourceError: not even full rematerialisation fits.
    """
    places = -(-step.config.num_hidden_layers // stages)
    budget = int(available * (1 - HEAD_ROOM))
    policies: list[Remat] = [LEAST_FIRST[0]] * places
    memory = stage_memory(step, stages, ring, policies)
    if memory.total > budget:
        raise ResourceError(
            f"a stage of {places} layers needs {memory} with train.remat: full, the device has "
            f"{available / 2**30:.2f} GiB of which {HEAD_ROOM:.0%} stay free\n"
            "take more stages, fewer tokens per microbatch, or fewer jobs at a time (slots)"
        )
    for remat in LEAST_FIRST[1:]:
        for place in range(places):
            richer: list[Remat] = [*policies]
            richer[place] = remat
            more = stage_memory(step, stages, ring, richer)
            if more.total > budget:
                return tuple(policies), memory
            policies, memory = richer, more
    return tuple(policies), memory


def in_words(policies: Sequence[Remat]) -> str:
    """Returns policies as a short text, such as "attention 3, full 17"."""
    names = dict.fromkeys(policies)
    if len(names) == 1:
        return policies[0]
    return ", ".join(f"{name} {policies.count(name)}" for name in names)
