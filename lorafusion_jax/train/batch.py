"""PackedBatch: what crosses from the planner to the jitted step. Static shapes, one per bucket."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from lorafusion_jax.errors import DataError
from lorafusion_sched import Microbatch, Sample


@jax.tree_util.register_static
@dataclass(frozen=True)
class LongestSegment:
    """A static bound of the rows of every sample and run of padding; None for none."""

    rows: int | None = None


class PackedBatch(NamedTuple):
    """One microbatch of C rows in tiles of P, holding samples of several jobs.

    Tokens of a job are contiguous and padded to whole tiles. Padding rows have weight 0, position
    0, segment_start = own row and row_key 0; they influence nothing, even if they hold NaN.

    Attributes:
        tokens: token ids.
        positions: position of the token in its own sample.
        labels: the token after this one in its own sample (already shifted).
        segment_start: first row of the token's sample.
        segment_offsets: first row of each sample and of each run of padding, and one past the last
            row; filled up with C. Its static length M + 1 is bucketed.
        loss_weight: 1 / supervised tokens of the job's whole global batch, 0 where unsupervised.
        row_key: dropout identity of the token, 0 for padding.
        tile_adapter: slot of each tile, -1 for none.
        batch_end: per slot, whether the slot's global batch ends with this microbatch.
        longest: bound of the segments' rows.
    """

    tokens: Int[Array, " C"]
    positions: Int[Array, " C"]
    labels: Int[Array, " C"]
    segment_start: Int[Array, " C"]
    segment_offsets: Int[Array, " M1"]
    loss_weight: Float[Array, " C"]
    row_key: UInt32[Array, " C"]
    tile_adapter: Int[Array, " tiles"]
    batch_end: Bool[Array, " slots"]
    longest: LongestSegment = LongestSegment()


class TokenisedSamples(Protocol):
    """What packing needs of a data set: tokens of sample i, and which of them are supervised."""

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray]:
        """Returns (tokens, supervised) of one sample, both [length]."""
        ...


@dataclass(frozen=True)
class JobRows:
    """Where the rows of one job come from and which slot they go to.

    Attributes:
        slot: adapter slot; -1 runs the base model without an adapter.
        seed: the job's 32-bit seed (`pallas_kernels.job_seed`).
        samples: its tokenised data set.
        batch_tokens: supervised tokens of each of its global batches; the loss weight is one over
            this, or 1 where it is None (evaluation).
    """

    slot: int
    seed: int
    samples: TokenisedSamples
    batch_tokens: Mapping[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RowOwner:
    """Which sample a span of rows holds: for per-sample evaluation."""

    job: str
    index: int
    start: int
    stop: int


def supervised_labels(supervised: np.ndarray) -> int:
    """Returns how many tokens of a sample are predicted; the first never is."""
    return int(np.count_nonzero(supervised[1:]))


def num_segments(microbatch: Microbatch, longest: int | None = None) -> int:
    """Returns an upper bound of the segments (samples and runs of padding) of a microbatch.

    Args:
        microbatch: what the planner decided.
        longest: rows above which a run of padding is cut into several.
    """
    padding = microbatch.capacity - sum(s.tokens() for s in microbatch.stretches)
    cuts = 0 if longest is None else padding // longest
    # What is left behind the last stretch's samples is one run with the padding of its last tile.
    return (sum(len(s.samples) + 1 for s in microbatch.stretches) or 1) + cuts


def segment_bucket(microbatches: Iterable[Microbatch], longest: int | None = None) -> int:
    """Returns the static M for these microbatches: 8, 12, 16, 20 ... 32, 40 ... 64, 80 ...

    Few values, so that plans share programs, and close ones, because cuDNN's time grows with M.
    """
    most = max((num_segments(m, longest) for m in microbatches), default=1)
    step = max(4, (1 << (most - 1).bit_length()) // 8)
    return max(8, -(-most // step) * step)


def longest_bucket(microbatches: Iterable[Microbatch]) -> int:
    """Returns the static bound of the samples' lengths: 256, 512, 1024, ..."""
    samples = (s for m in microbatches for stretch in m.stretches for s in stretch.samples)
    longest = max((sample.length for sample in samples), default=1)
    return max(256, 1 << (longest - 1).bit_length())


def pack(
    microbatch: Microbatch,
    jobs: Mapping[str, JobRows],
    *,
    tile: int,
    num_slots: int,
    max_segments: int,
    longest: int | None = None,
) -> tuple[PackedBatch, list[RowOwner]]:
    """Lays the samples of a planned microbatch out in rows.

    Stretches of jobs that are not in `jobs` (dropped ones) become padding in place: the rows of
    the others do not move.

    Args:
        microbatch: what the planner decided.
        jobs: rows of each job by name.
        tile: rows per tile.
        num_slots: adapter slots of the bank.
        max_segments: static number of segments M.
        longest: static bound of the samples' lengths; longer runs of padding are cut. None for no
            bound.

    Returns:
        The batch in numpy arrays, and which rows hold which sample.
    """
    capacity = microbatch.capacity
    rows = _padding_rows(capacity)
    tile_adapter = np.full(capacity // tile, -1, np.int32)
    batch_end = np.zeros(num_slots, np.bool_)
    owners: list[RowOwner] = []
    start = 0
    for stretch in microbatch.stretches:
        num_tiles = -(-stretch.tokens() // tile)
        if stretch.job in jobs:
            job = jobs[stretch.job]
            first_tile = start // tile
            tile_adapter[first_tile : first_tile + num_tiles] = job.slot
            if stretch.ends and job.slot >= 0:
                batch_end[job.slot] = True
            weight = 1.0 if job.batch_tokens is None else 1.0 / job.batch_tokens[stretch.batch]
            row = start
            for sample in stretch.samples:
                _check_length(stretch.job, sample, job)
                _write_sample(rows, row, job, sample.epoch, sample.index, weight)
                owners.append(RowOwner(stretch.job, sample.index, row, row + sample.length))
                row += sample.length
        start += num_tiles * tile
    assert start <= capacity, f"stretches need {start} rows of {capacity}"
    rows |= {
        "segment_offsets": _offsets(owners, capacity, max_segments, longest or capacity),
        "tile_adapter": tile_adapter,
        "batch_end": batch_end,
        "longest": LongestSegment(longest),
    }
    return PackedBatch(**rows), owners


def _padding_rows(capacity: int) -> dict[str, Any]:
    return {
        "tokens": np.zeros(capacity, np.int32),
        "positions": np.zeros(capacity, np.int32),
        "labels": np.zeros(capacity, np.int32),
        "segment_start": np.arange(capacity, dtype=np.int32),
        "loss_weight": np.zeros(capacity, np.float32),
        "row_key": np.zeros(capacity, np.uint32),
    }


def _check_length(name: str, sample: Sample, job: JobRows) -> None:
    """A sample that has changed since it was planned would leave holes, or reach its neighbour."""
    length = len(job.samples[sample.index][0])
    if length != sample.length:
        raise DataError(
            f"sample {sample.index} of {name} has {length} tokens, {sample.length} were planned: "
            "its data changed while it was used"
        )


def _write_sample(
    rows: dict[str, np.ndarray], row: int, job: JobRows, epoch: int, index: int, weight: float
) -> None:
    tokens, supervised = job.samples[index]
    length = len(tokens)
    span, shifted = slice(row, row + length), slice(row, row + length - 1)
    rows["tokens"][span] = tokens
    rows["positions"][span] = np.arange(length)
    rows["labels"][shifted] = tokens[1:]
    rows["segment_start"][span] = row
    rows["loss_weight"][shifted] = np.where(supervised[1:], np.float32(weight), np.float32(0))
    rows["row_key"][span] = _row_keys(job.seed, epoch, index, length)


def _offsets(owners: list[RowOwner], capacity: int, max_segments: int, longest: int) -> np.ndarray:
    """First rows of samples and of runs of padding, filled up with the capacity."""
    starts: list[int] = []
    end = 0
    for owner in owners:
        starts += range(end, owner.start, longest)
        starts.append(owner.start)
        end = owner.stop
        assert end - owner.start <= longest, f"a sample of {end - owner.start} rows, {longest=}"
    starts += range(end, capacity, longest)
    assert len(starts) <= max_segments, f"{len(starts)} segments, room for {max_segments}"
    offsets = np.full(max_segments + 1, capacity, np.int32)
    offsets[: len(starts)] = starts
    return offsets


def _lowbias32(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def _row_keys(seed: int, epoch: int, index: int, length: int) -> np.ndarray:
    """`pallas_kernels.row_keys` in numpy: packing on the host must not wait for the device."""
    keys = np.full(1, seed, np.uint32)
    for value in (epoch, index):
        keys = _lowbias32(keys ^ np.uint32(value))
    keys = _lowbias32(keys ^ np.arange(length, dtype=np.uint32))
    return np.where(keys == 0, np.uint32(1), keys)
