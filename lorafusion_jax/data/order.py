"""Which sample comes when: pure functions of the seed, the job's name and the epoch.

The numbers come from SHA-256 and SplitMix64 (Steele, Lea, Flood 2014), not from a library's
generator, so that a resumed run sees the same order under any version of NumPy.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Int64

from lorafusion_jax.errors import DataError


def batch_order(seed: int, job: str, epoch: int, num_samples: int) -> Int64[np.ndarray, " n"]:
    """Returns the order in which an epoch visits the samples: a permutation of their indices."""
    return _permutation(f"order:{seed}:{job}:{epoch}", num_samples)


def mixed_order(
    seed: int,
    job: str,
    epoch: int,
    sources: Sequence[Int64[np.ndarray, " _"]],
    weights: Sequence[float],
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Returns what an epoch over weighted sources visits, and in which order.

    An epoch has as many samples as the sources together, and of each source its share by weight.
    A source is walked through in an order of its own, pass after pass, and each epoch goes on
    where the last one stopped: no row is seen a second time before all of its source were seen.

    Args:
        seed: of the run.
        job: name.
        epoch: from 0.
        sources: indices of each source's samples; none is empty.
        weights: of each source, positive.

    Returns:
        For each position, which pass over its source this is (from 0), and the sample's index.
    """
    counts = _shares(sum(len(indices) for indices in sources), weights)
    passes, chosen = [], []
    for number, (indices, count) in enumerate(zip(sources, counts, strict=True)):
        visits = np.arange(epoch * count, (epoch + 1) * count)
        rounds, places = np.divmod(visits, len(indices))
        passes.append(rounds)
        order = {
            int(turn): _permutation(f"source:{seed}:{job}:{number}:{turn}", len(indices))
            for turn in np.unique(rounds)
        }
        picked = [order[turn][place] for turn, place in zip(rounds, places, strict=True)]
        chosen.append(indices[np.asarray(picked, np.int64)])
    mixed = batch_order(seed, job, epoch, sum(counts))
    return np.concatenate(passes)[mixed], np.concatenate(chosen)[mixed]


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """Splits a count by weight, at least one each; what rounding leaves goes to the largest rest.

    The arithmetic is of fractions, so that no machine rounds otherwise.
    """
    exact = [Fraction(weight) for weight in weights]
    parts = [total * weight / sum(exact) for weight in exact]
    counts = [max(int(part), 1) for part in parts]
    by_rest = sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], i))
    while sum(counts) != total:
        missing = total - sum(counts)
        if missing > 0:
            for i in by_rest[:missing]:
                counts[i] += 1
        else:
            counts[max(range(len(counts)), key=lambda i: counts[i])] -= 1
    return counts


def split_eval(
    num_samples: int, split: float, seed: int, job: str
) -> tuple[Int64[np.ndarray, " train"], Int64[np.ndarray, " eval"]]:
    """Splits sample indices into a training and a held-out part.

    Args:
        num_samples: of the data set.
        split: share (below 1; at least one sample) or number of samples to hold out; 0 is none.
        seed: of the run.
        job: name.

    Returns:
        Training and held-out indices, each ascending.

    Raises:
        DataError: nothing would be left to train on.
    """
    held_out = int(split) if split >= 1 else round(split * num_samples)
    if 0 < split < 1:
        held_out = max(held_out, 1)
    if held_out >= num_samples:
        raise DataError(
            f"job {job}: eval.split={split} holds out {held_out} of {num_samples} samples, "
            "which leaves none to train on: lower it"
        )
    order = _permutation(f"split:{seed}:{job}", num_samples)
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def _permutation(label: str, size: int) -> Int64[np.ndarray, " n"]:
    start = np.frombuffer(hashlib.sha256(label.encode()).digest()[:8], "<u8")
    state = start + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(state ^ (state >> np.uint64(31)), kind="stable").astype(np.int64)
