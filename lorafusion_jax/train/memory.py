"""Predicts the device memory of a training step and chooses what its backward pass computes again.

The prediction counts, per row of a microbatch, what each layer keeps for its backward pass under a
remat policy, and what exists only for a while: one layer's backward pass, or a chunk of the LM
head. `tests/train/test_memory.py` holds it against XLA's own count of compiled programs.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax

from lorafusion_jax.errors import ResourceError
from lorafusion_jax.models.attention_cudnn import num_pages
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.decoder import REMAT_POLICIES, Remat

HEAD_ROOM = 0.08
"""Share of the device's memory that plans leave free: the prediction errs, and memory splinters."""

_GIB = 2**30
_QUERY_CHUNK, _UNCHUNKED_ROWS = 512, 2048  # of attention by XLA


class Step(NamedTuple):
    """What the memory of a training step depends on.

    Attributes:
        config: shape of the base model.
        capacity: rows of a microbatch.
        slots: adapter slots.
        r_max: largest rank.
        itemsize: bytes of a weight or activation, 2 or 4.
        loss_chunk: rows whose logits exist at a time.
        segments: static segments of a microbatch.
        longest: static bound of their rows; None for none.
        moments: arrays that the optimizers keep per parameter (2 for adam and adamw).
        kernels: the fused kernels and cuDNN's attention run; else XLA, which keeps more.
        tile: rows per tile.
    """

    config: ModelConfig
    capacity: int
    slots: int
    r_max: int
    itemsize: int = 2
    loss_chunk: int = 1024
    segments: int = 16
    longest: int | None = None
    moments: int = 2
    kernels: bool = True
    tile: int = 128


class Memory(NamedTuple):
    """Predicted bytes on the device.

    Attributes:
        weights: of the frozen base model.
        adapters: parameters, moments and gradients of all slots, float32.
        kept: what all layers keep from forward to backward.
        working: what exists for a while at the peak.
    """

    weights: int
    adapters: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {getattr(self, name) / _GIB:.2f}" for name in self._fields)
        return f"{self.total / _GIB:.2f} GiB ({parts})"


def linear_widths(config: ModelConfig) -> list[tuple[int, int]]:
    """Returns (in, out) of the seven linears of a layer."""
    d, inner = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return [(d, q), (d, kv), (d, kv), (q, d), (d, inner), (d, inner), (inner, d)]


def predict(step: Step, remat: Remat) -> Memory:
    """Predicts the memory of a training step under a remat policy.

    Raises:
        ValueError: unknown policy.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"{remat=} is unknown: expected one of {REMAT_POLICIES}")
    config, rows = step.config, step.capacity
    linears = linear_widths(config)
    in_layer = sum(k * n for k, n in linears) + 2 * config.hidden_size
    embeddings = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    weights = step.itemsize * (config.num_hidden_layers * in_layer + embeddings)
    adapter = sum(k + n for k, n in linears) * step.r_max * step.slots * config.num_hidden_layers
    kept, everything = kept_per_row(step, remat), kept_per_row(step, "none")
    layer = everything - kept + backward_per_row(step)
    head = step.loss_chunk * config.vocab_size * (8 + step.itemsize)
    head += 2 * rows * config.hidden_size * step.itemsize
    return Memory(
        weights=int(weights),
        adapters=4 * adapter * (3 + step.moments),  # with the gradients of this microbatch
        kept=int(rows * kept * config.num_hidden_layers),
        working=int(max(rows * layer, head)),
    )


def kept_bytes(step: Step, remat: Remat) -> int:
    """Returns the bytes that one layer keeps from its forward to its backward pass."""
    return int(step.capacity * kept_per_row(step, remat))


def choose_remat(step: Step, available: int) -> tuple[Remat, Memory]:
    """Returns the policy that computes least again and fits, with head-room.

    Args:
        step: the training step.
        available: bytes that the device has for all of it.

    Raises:
        ResourceError: not even full rematerialisation fits; planned against available, and a size
            that would fit.
    """
    budget = int(available * (1 - HEAD_ROOM))
    plans: dict[Remat, Memory] = {remat: predict(step, remat) for remat in POLICIES}
    for remat, memory in plans.items():
        if memory.total <= budget:
            return remat, memory
    largest = largest_capacity(step, available, "full")
    advice = (
        f"lower batching.tokens_per_microbatch from {step.capacity} to {largest}"
        if largest
        else "the base model and its adapters alone fill it: train fewer jobs at a time (slots) or "
        "lower lora.r"
    )
    raise ResourceError(
        f"a training step needs {plans['full']} with train.remat: full, the device has "
        f"{available / _GIB:.2f} GiB of which {HEAD_ROOM:.0%} stay free\n{advice}"
    )


def largest_capacity(step: Step, available: int, remat: Remat) -> int:
    """Returns the most rows of a microbatch that fit, a multiple of the tile; 0 if none do."""
    budget = available * (1 - HEAD_ROOM)
    return largest_that(step, lambda sized: predict(sized, remat).total <= budget)


def largest_that(step: Step, fits: Callable[[Step], bool]) -> int:
    """Returns the most rows of a microbatch of which a step fits; see `largest_capacity`."""
    low, high = 0, 1 << 22
    while high - low > step.tile:  # memory only grows with the rows
        middle = (low + high) // 2 // step.tile * step.tile
        sized = step._replace(capacity=middle, loss_chunk=min(step.loss_chunk, middle))
        low, high = (middle, high) if fits(sized) else (low, middle)
    return low


def device_bytes(*, every: bool = False) -> int | None:
    """Returns the bytes that a device lets this process have; CPUs do not tell.

    Args:
        every: the least of all devices of this process; else of the first one, where runs on one
            device are.
    """
    devices = jax.local_devices() if every else jax.local_devices()[:1]
    found = [(device.memory_stats() or {}).get("bytes_limit") for device in devices]
    known = [size for size in found if size is not None]
    return min(known) if len(known) == len(found) else None


def memory_now() -> list[str]:
    """Says what of the first device's memory is in use, for messages; nothing where CPUs run."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if not {"bytes_in_use", "bytes_limit"} <= stats.keys():
        return []
    line = f"in use {stats['bytes_in_use'] / _GIB:.1f} of {stats['bytes_limit'] / _GIB:.1f} GiB"
    if stats.get("largest_free_block_bytes"):
        line += f"; the largest free piece has {stats['largest_free_block_bytes'] / _GIB:.1f} GiB"
    return [line]


def moments_of(optimizers: Iterable[str]) -> int:
    """Returns how many arrays the optimizers in use keep per parameter."""
    return sum(1 if name == "sgd" else 2 for name in set(optimizers))


POLICIES: tuple[Remat, ...] = ("none", "mlp", "attention", "full")


def kept_per_row(step: Step, remat: Remat) -> float:
    """Bytes that one layer keeps of a row from its forward to its backward pass."""
    config, size = step.config, step.itemsize
    d, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    q, kv = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rank = step.r_max * size
    inputs = d * size + 4  # of a norm, with its inverse root mean square
    if remat == "full":
        return d * size
    # Normed input, ranks of four projections, queries, keys, values, output twice (in a pipeline's
    # rings it lies in two shapes, on one device once: there this is 4% too much), statistics.
    statistics = 4 * heads * (_segments_per_page(step) if step.kernels else 1)
    block = inputs + (d + 3 * q + 2 * kv) * size + 4 * rank + statistics
    if config.qk_norm:
        block += (q + kv) * size
    if config.post_norms:
        block += inputs
    feed_forward = inputs + (d + 3 * inner) * size + 3 * rank + (inputs if config.post_norms else 0)
    if not step.kernels:  # XLA finds drop(X) and each tile's adapter of the forward pass again
        widths = [(k + n) * step.r_max / step.tile * size for k, n in linear_widths(config)]
        block += (d + q) * size + sum(widths[:4])
        feed_forward += (d + inner) * size + sum(widths[4:])
    if remat == "none":
        return block + feed_forward
    gates = (d + 2 * inner + (d if config.post_norms else 0)) * size
    return gates + (d * size if remat == "attention" else block)


def _segments_per_page(step: Step) -> int:
    """cuDNN's statistics are [segments, heads, rows of a page]."""
    pages = num_pages(step.capacity, step.longest or step.capacity)
    return max(2, -(-step.segments // pages))


def backward_per_row(step: Step) -> float:
    """Bytes per row of what one layer's backward pass makes for a while."""
    config, size = step.config, step.itemsize
    q = config.num_attention_heads * config.head_dim
    gradients = (3 * config.intermediate_size + 3 * config.hidden_size) * size
    if step.kernels:
        attention = 4 * q + 3 * q * size  # dQ is added up in float32
    else:
        rows = step.capacity
        chunk = rows if rows <= _UNCHUNKED_ROWS else _QUERY_CHUNK
        attention = 3 * 4 * config.num_attention_heads * chunk
    return gradients + attention
