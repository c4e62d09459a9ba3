"""From packed microbatches to the schedule rows that a chunk of ticks needs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import PyTree

from lorafusion_jax.parallel.pipeline import WINDOW_SPECS, Window
from lorafusion_jax.train.batch import JobRows, PackedBatch, pack
from lorafusion_sched import Microbatch


class Slot(NamedTuple):
    """One row of the schedule on the host.

    Attributes:
        batches: one packed microbatch per data rank.
        valid: which of them hold work.
        ends: per adapter slot, whether a global batch ends here.
        expected: per adapter slot, the version its forward must use, -1 where it is absent.
        limit: per adapter slot, the loss above which a global batch that ends here is rejected.
    """

    batches: tuple[PackedBatch, ...]
    valid: np.ndarray
    ends: np.ndarray
    expected: np.ndarray
    limit: np.ndarray


def pack_slot(
    microbatches: Sequence[Microbatch],
    jobs: Mapping[str, JobRows],
    *,
    capacity: int,
    tile: int,
    num_slots: int,
    max_segments: int,
    longest: int | None = None,
) -> Slot:
    """Packs one slot of a plan.

    Args:
        microbatches: one per data rank.
        jobs: rows of each job that takes part.
        capacity: rows of every microbatch of the engine.
        tile: rows per tile.
        num_slots: adapter slots.
        max_segments: static number of segments.
        longest: static bound of the samples' lengths.
    """
    batches, valid = [], np.zeros(len(microbatches), np.bool_)
    expected = np.full(num_slots, -1, np.int32)
    for rank, microbatch in enumerate(microbatches):
        widened = Microbatch(microbatch.stretches, capacity)
        batch, owners = pack(
            widened,
            jobs,
            tile=tile,
            num_slots=num_slots,
            max_segments=max_segments,
            longest=longest,
        )
        batches.append(batch)
        valid[rank] = bool(owners)
        for stretch in microbatch.stretches:
            if stretch.job in jobs:
                expected[jobs[stretch.job].slot] = stretch.batch
    ends = np.any([batch.batch_end for batch in batches], axis=0)
    return Slot(tuple(batches), valid, ends, expected, np.full(num_slots, np.inf, np.float32))


def empty_slot(like: Slot) -> Slot:
    """Returns a slot without work, of the same shapes."""
    capacity = like.batches[0].tokens.shape[0]
    batch, _ = pack(
        Microbatch((), capacity),
        {},
        tile=capacity // like.batches[0].tile_adapter.shape[0],
        num_slots=like.ends.shape[0],
        max_segments=like.batches[0].segment_offsets.shape[0] - 1,
        longest=like.batches[0].longest.rows,
    )
    return Slot(
        (batch,) * len(like.batches),
        np.zeros_like(like.valid),
        np.zeros_like(like.ends),
        np.full_like(like.expected, -1),
        np.full_like(like.limit, np.inf),
    )


def window_of(slots: Sequence[Slot], mesh: Mesh) -> Window:
    """Puts consecutive slots on the mesh, each rank's microbatches on its devices."""
    batches = [jax.tree.map(lambda *x: np.stack(x), *slot.batches) for slot in slots]
    rows = [
        (batch, slot.valid, slot.ends, slot.expected, slot.limit)
        for batch, slot in zip(batches, slots, strict=True)
    ]
    window = Window(*jax.tree.map(lambda *x: np.stack(x), *rows))
    return put_global(window, WINDOW_SPECS, mesh)


def put_global(tree: PyTree, specs: PyTree, mesh: Mesh) -> PyTree:
    """Puts host arrays that every process has whole on the mesh.

    Args:
        tree: of arrays.
        specs: how they lie; one spec may stand for a part of the tree.
        mesh: to put them on.
    """

    def put(spec, array):
        array = np.asarray(array)
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(lambda spec, part: jax.tree.map(partial(put, spec), part), specs, tree)
