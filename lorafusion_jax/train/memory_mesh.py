"""Predicts the memory of one device of a mesh and chooses what its stage computes again.

What differs from one device (`train.memory`): a stage has its share of the layers and of the
vocabulary, and what its layers keep waits in rings, for as many microbatches as are between their
forward and their backward. Policies may differ between the layers of a stage, so that memory is
used up. `tests/train/test_memory_mesh.py` holds the prediction against XLA's own count.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

from lorafusion_jax.config import ParallelConfig
from lorafusion_jax.errors import ResourceError
from lorafusion_jax.models.decoder import Remat
from lorafusion_jax.models.hf_weights import Base
from lorafusion_jax.parallel.layout import even_layout
from lorafusion_jax.parallel.pipeline import Order, ring_of
from lorafusion_jax.parallel.processes import largest
from lorafusion_jax.parallel.residuals import in_words, recomputed_share
from lorafusion_jax.parallel.stage import Residuals
from lorafusion_jax.train.choices import Choices
from lorafusion_jax.train.memory import (
    HEAD_ROOM,
    POLICIES,
    Memory,
    Step,
    backward_per_row,
    device_bytes,
    kept_per_row,
    largest_that,
    linear_widths,
)

_FLOWS = 10
"""Hidden states of one microbatch that a stage has beside its rings: what it sends, what it was
sent, what the head reads and gives back, what enters next, and what a phase is making."""


class Share(NamedTuple):
    """What one device has of a mesh.

    Attributes:
        stages: stages of the pipeline.
        places: layer places of a stage.
        ring: microbatches that the rings hold (`ring_of`).
    """

    stages: int
    places: int
    ring: int


class StagePlan(NamedTuple):
    """What a stage keeps and computes again.

    Attributes:
        residuals: what waits for the backward.
        remat: policy of each layer place.
        memory: predicted for one device.
    """

    residuals: Residuals
    remat: tuple[Remat, ...]
    memory: Memory

    def __str__(self) -> str:
        whole = "" if self.residuals == "save" else ", and the stage's forward twice"
        return in_words(self.remat) + whole


def predict_stage(
    step: Step, share: Share, remat: Sequence[Remat], residuals: Residuals = "save"
) -> StagePlan:
    """Predicts the memory of one device of a mesh.

    Args:
        step: the training step, of the whole model.
        share: of the device.
        remat: policy of each layer place.
        residuals: what waits for the backward.
    """
    config, rows, size = step.config, step.capacity, step.itemsize
    d = config.hidden_size
    linears = linear_widths(config)
    in_layer = sum(k * n for k, n in linears) + 2 * d
    vocabulary = -(-config.vocab_size // share.stages)
    tables = vocabulary * d * (1 if config.tie_word_embeddings else 2)
    adapter = sum(k + n for k, n in linears) * step.r_max * step.slots * share.places
    # What XLA would keep beside the residuals, it finds again: rings hold these and no more.
    in_rings = step if step.kernels else step._replace(kernels=True, segments=1)
    kept = [kept_per_row(in_rings, policy) for policy in remat]
    # The backward of one layer has all that the layer makes, read from a ring or computed again.
    layer = kept_per_row(step, "none") + backward_per_row(step)
    if residuals == "save":  # the first layer's input is in the ring of the stage's
        waiting = share.ring * sum(kept)
    else:  # only the stage's input waits, and the backward keeps all layers' at once
        waiting = share.ring * d * size
        layer += sum(kept)
    head = step.loss_chunk * vocabulary * (8 + size) + rows * d * (4 + 3 * size)
    memory = Memory(
        weights=int(size * (share.places * in_layer + tables)),
        adapters=4 * adapter * (3 + step.moments),
        kept=int(rows * waiting),
        working=int(max(rows * layer, head) + _FLOWS * rows * d * size),
    )
    return StagePlan(residuals, tuple(remat), memory)


def choose_stage(step: Step, share: Share, available: int) -> StagePlan:
    """Returns the plan that computes least again and fits each device, with head-room.

    Args:
        step: the training step, of the whole model.
        share: of a device.
        available: bytes that a device has for all of it.

    Raises:
        ResourceError: none fits; planned against available, and what would fit.
    """
    plans = sorted(_plans(step, share), key=lambda plan: _cost(step, plan))
    for plan in plans:
        if fits(plan, available):
            return plan
    least = min(plans, key=lambda plan: plan.memory.total)
    most = largest_capacity_on_mesh(step, share, available)
    advice = (
        f"lower batching.tokens_per_microbatch from {step.capacity} to {most}"
        if most
        else f"a stage of {share.places} layers and its adapters alone fill it: raise "
        "parallel.stage, train fewer jobs at a time (slots) or lower lora.r"
    )
    raise ResourceError(
        f"a training step on {share.stages} stages needs {least.memory} of each device with "
        f"{least}; a device has {available / 2**30:.2f} GiB of which {HEAD_ROOM:.0%} stay free\n"
        f"{advice}"
    )


class Planned(NamedTuple):
    """A stage's plan, and what it was planned to need in words."""

    plan: StagePlan
    words: str


def plan_stage(
    step: Step, share: Share, wish: Remat | Literal["auto"], before: Choices | None = None
) -> Planned:
    """Plans a stage for the devices there are.

    Args:
        step: the training step, of the whole model.
        share: of a device.
        wish: one policy for all layers, or "auto" for `choose_stage`; on CPUs, which do not tell
            how much memory they have, that is "none".
        before: what the run chose when it began; kept for as many layers, wherever there is room.

    Raises:
        ResourceError: see `choose_stage`.
    """
    available, old = available_everywhere(), None
    if wish == "auto" and before is not None and len(before.policies) == share.places:
        old = predict_stage(step, share, before.policies, before.residuals)
    if old is not None and (available is None or old.memory.total <= available):
        plan = old
    elif wish == "auto" and available is not None:
        plan = choose_stage(step, share, available)
    else:
        policy: Remat = "none" if wish == "auto" else wish
        plan = predict_stage(step, share, (policy,) * share.places)
    has = "" if available is None else f"; each has {available / 2**30:.2f} GiB"
    return Planned(plan, f"train.remat {plan} was planned to need {plan.memory} of a device{has}")


def share_of(base: Base, parallel: ParallelConfig, order: Order) -> Share:
    """Returns what each device has of a run's mesh."""
    order = "bfh" if parallel.stage == 1 else order
    places = even_layout(base.config.num_hidden_layers, parallel.stage).places
    return Share(parallel.stage, places, ring_of(order, parallel.stage))


def fits(plan: StagePlan, available: int) -> bool:
    """Whether a device has room for a plan."""
    return plan.memory.total <= available * (1 - HEAD_ROOM)


def largest_capacity_on_mesh(step: Step, share: Share, available: int) -> int:
    """Returns the most rows of a microbatch that fit somehow, a multiple of the tile, or 0."""

    def any_fits(sized: Step) -> bool:
        full = ("full",) * share.places
        both: tuple[Residuals, ...] = ("save", "recompute")
        return any(fits(predict_stage(sized, share, full, kind), available) for kind in both)

    return largest_that(step, any_fits)


def available_everywhere() -> int | None:
    """Returns the bytes that every device lets its process have, at least; CPUs do not tell.

    All processes of a run get the same answer, to the mebibyte, and must ask together.
    """
    known = device_bytes(every=True)
    least = -largest(1 if known is None else -(known >> 20))
    return None if least < 0 else least << 20


def _plans(step: Step, share: Share) -> Iterator[StagePlan]:
    """One policy for all places, or a richer one for the first of them."""
    places = share.places
    for policy in POLICIES:
        yield predict_stage(step, share, (policy,) * places)
    for rich, poor in combinations(POLICIES, 2):
        for count in range(1, places):
            yield predict_stage(step, share, (rich,) * count + (poor,) * (places - count))
    yield predict_stage(step, share, ("full",) * places, "recompute")


def _cost(step: Step, plan: StagePlan) -> float:
    """Forwards of a layer that a stage computes again, and a little for what is no product."""
    products = sum(recomputed_share(step.config, policy) for policy in plan.remat)
    cost = products + sum(0.02 for policy in plan.remat if policy != "none")
    return cost if plan.residuals == "save" else cost + len(plan.remat)
