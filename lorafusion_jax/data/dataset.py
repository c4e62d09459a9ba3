"""Tokenised samples in flat arrays."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Samples one after the other; `dataset[i]` is the tokens and the loss mask of sample i.

    Attributes:
        tokens: token ids.
        supervised: whether the token is a target; never the first token of a sample, which nothing
            predicts.
        offsets: sample i is [offsets[i], offsets[i + 1]).
        lines: 1-based line of each sample in its file.
        truncated: samples that were cut to the longest length.
        dropped: rows left out: too long, or without a target after the cut.
        sizes: samples of each source, where several were put together, in their order.
    """

    tokens: Int32[np.ndarray, " tokens"]
    supervised: Bool[np.ndarray, " tokens"]
    offsets: Int64[np.ndarray, " bounds"]
    lines: Int32[np.ndarray, " samples"]
    truncated: int = 0
    dropped: int = 0
    sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> tuple[Int32[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.supervised[part]

    @property
    def lengths(self) -> Int64[np.ndarray, " samples"]:
        """Tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def supervised_counts(self) -> Int64[np.ndarray, " samples"]:
        """Targets of each sample."""
        before = np.concatenate([[0], np.cumsum(self.supervised, dtype=np.int64)])
        return before[self.offsets[1:]] - before[self.offsets[:-1]]

    def source_of(self, index: int) -> int:
        """Number of the source that a sample comes from."""
        return int(np.searchsorted(np.cumsum(self.sizes), index, side="right")) if self.sizes else 0

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, masks and offsets: equal exactly when the samples are."""
        digest = hashlib.sha256()
        for array in (self.tokens, self.supervised, self.offsets):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        return digest.hexdigest()


def concatenate(datasets: Sequence[Dataset]) -> Dataset:
    """Puts data sets together, one after the other; `sizes` remembers where each begins."""
    if len(datasets) == 1:
        return datasets[0]
    starts = np.cumsum([0, *(data.offsets[-1] for data in datasets)])
    moved = [data.offsets[1:] + start for data, start in zip(datasets, starts, strict=False)]
    return Dataset(
        tokens=np.concatenate([data.tokens for data in datasets]),
        supervised=np.concatenate([data.supervised for data in datasets]),
        offsets=np.concatenate([np.zeros(1, np.int64), *moved]),
        lines=np.concatenate([data.lines for data in datasets]),
        truncated=sum(data.truncated for data in datasets),
        dropped=sum(data.dropped for data in datasets),
        sizes=tuple(len(data) for data in datasets),
    )


def join_samples(
    samples: Iterable[tuple[int, list[int], list[bool]]], *, truncated: int = 0, dropped: int = 0
) -> Dataset:
    """Makes a data set of (line, tokens, supervised) samples."""
    lines, tokens, masks, ends = [], [np.zeros(0, np.int32)], [np.zeros(0, bool)], [0]
    for line, ids, supervised in samples:
        lines.append(line)
        tokens.append(np.asarray(ids, np.int32))
        masks.append(np.asarray(supervised, bool))
        ends.append(ends[-1] + len(ids))
    return Dataset(
        tokens=np.concatenate(tokens),
        supervised=np.concatenate(masks),
        offsets=np.asarray(ends, np.int64),
        lines=np.asarray(lines, np.int32),
        truncated=truncated,
        dropped=dropped,
    )
