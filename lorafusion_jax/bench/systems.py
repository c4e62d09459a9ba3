"""Other ways to apply LoRA and to lay out batches, rebuilt in this framework to be compared.

They run the same model, loss and optimizer; only the LoRA linears and the rows differ. Where a
choice was open it favours them: padding is skipped by attention and by the LM head, and dropout of
the naive linear is one mask per input, as ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorafusion_jax.lora import linear
from lorafusion_jax.train.batch import LongestSegment, PackedBatch
from lorafusion_jax.train.stored import Compiled
from lorafusion_sched import Sample
from pallas_kernels import fused_multi_lora


def _naive(x, ws, a, b, scale, rate, tile_adapter, row_key, site, *, biases):
    """One adapter as in a tutorial: dropout by jax.random, two thin products, a sum."""
    key = jax.random.fold_in(jax.random.key(0), site[0])
    keep = jax.random.bernoulli(key, 1 - rate[0], x.shape)
    dropped = jnp.where(keep, x / (1 - rate[0]).astype(x.dtype), jnp.zeros((), x.dtype))
    ys = []
    for w, a_i, b_i, bias in zip(ws, a, b, biases, strict=True):
        w = jax.lax.stop_gradient(w)
        y = x @ w if bias is None else x @ w + bias
        small = (dropped @ a_i[0].astype(x.dtype).T) @ b_i[0].astype(x.dtype)
        ys.append(y + scale[0].astype(x.dtype) * small)
    return tuple(ys)


def _one_by_one(function: Callable, x, ws, a, b, *routing, biases):
    """Each projection by itself: X is read once for each of them."""
    return tuple(
        function(x, (w,), (a_i,), (b_i,), *routing, biases=(bias,))[0]
        for w, a_i, b_i, bias in zip(ws, a, b, biases, strict=True)
    )


LINEARS: dict[str, Callable] = {
    "naive": _naive,
    "xla": partial(fused_multi_lora, implementation="xla"),
    "ungrouped": partial(_one_by_one, fused_multi_lora),
    "separate": fused_multi_lora,
    "ours": fused_multi_lora,
}
"""How LoRA linears are computed: `naive` knows one adapter, the others any number.

All but `ours` leave what stands between two linears, such as an activation, to XLA."""


@contextmanager
def lora_linears(kind: str) -> Iterator[None]:
    """Lets the models traced within use another LoRA linear; programs compiled there keep it."""
    before = linear.fused_multi_lora, linear.fused_gated_mlp
    jax.clear_caches()  # the layers' traces are shared, and would be those of another kind
    linear.fused_multi_lora = LINEARS[kind]
    linear.fused_gated_mlp = before[1] if kind == "ours" else None
    try:
        yield
    finally:
        linear.fused_multi_lora, linear.fused_gated_mlp = before
        jax.clear_caches()


def compiled_bytes(program: Compiled) -> int:
    """Returns the device memory of a program, arguments included; 0 if XLA does not say."""
    found = program.memory_analysis()
    if found is None:
        return 0
    kept = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return kept + found.temp_size_in_bytes


def padded_batch(
    samples: list[tuple[int, Sample]],
    length: int,
    *,
    tile: int,
    num_slots: int,
    ends: frozenset[int] = frozenset(),
    vocab_size: int,
) -> PackedBatch:
    """Lays samples out as a classic batch: one after another, each padded to `length` rows.

    Args:
        samples: slot and sample.
        length: rows of each, a multiple of the tile.
        tile: rows per tile.
        num_slots: slots of the bank.
        ends: slots whose global batch ends.
        vocab_size: tokens are drawn below it.
    """
    rows = len(samples) * length
    place = np.arange(rows) % length
    lengths = np.repeat([sample.length for _, sample in samples], length)
    real = place < lengths
    starts = np.where(real, np.arange(rows) - place, np.arange(rows)).astype(np.int32)
    tokens = np.random.default_rng(0).integers(0, vocab_size, rows).astype(np.int32)
    cuts = [row for i, (_, s) in enumerate(samples) for row in (i * length, i * length + s.length)]
    firsts = np.unique([row for row in cuts if row < rows])
    offsets = np.full(max(16, 2 * len(samples)) + 1, rows, np.int32)
    offsets[: len(firsts)] = firsts
    supervised = place + 1 < lengths
    rows_of: dict[str, Any] = {
        "tokens": tokens,
        "positions": np.where(real, place, 0).astype(np.int32),
        "labels": np.roll(tokens, -1),
        "segment_start": starts,
        "segment_offsets": offsets,
        "loss_weight": np.where(supervised, 1 / 4096, 0).astype(np.float32),
        "row_key": np.where(real, np.arange(rows) + 1, 0).astype(np.uint32),
        "tile_adapter": np.repeat([s for s, _ in samples], length // tile).astype(np.int32),
        "batch_end": np.isin(np.arange(num_slots), list(ends)),
        "longest": LongestSegment(length),
    }
    return PackedBatch(**rows_of)
