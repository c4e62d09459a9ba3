"""What it costs not to keep what a stage's backwards need, and policies in words.

Policies may differ between layer places; `train.memory_mesh` chooses them. All stages have the
same, because they run one program.
"""

from collections.abc import Sequence

from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import Remat
from lorafusion_jax.train.memory import linear_widths

BACKWARD = 1.1
"""Backward over forward where nothing is computed again: dX alone, and the LoRA products."""


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


def in_words(policies: Sequence[Remat]) -> str:
    """Returns policies as a short text, such as "attention 3, full 17"."""
    names = dict.fromkeys(policies)
    if len(names) == 1:
        return policies[0]
    return ", ".join(f"{name} {policies.count(name)}" for name in names)
