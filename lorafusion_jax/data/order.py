"""Which sample comes when: pure functions of the seed, the job's name and the epoch.

The numbers come from SHA-256 and SplitMix64 (Steele, Lea, Flood 2014), not from a library's
generator, so that a resumed run sees the same order under any version of NumPy.
"""

import hashlib

import numpy as np
from jaxtyping import Int64

from lorafusion_jax.errors import DataError


def batch_order(seed: int, job: str, epoch: int, num_samples: int) -> Int64[np.ndarray, " n"]:
    """Returns the order in which an epoch visits the samples: a permutation of their indices."""
    return _permutation(f"order:{seed}:{job}:{epoch}", num_samples)


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
