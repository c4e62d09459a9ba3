"""Accumulators of several data ranks in a checkpoint: one behind the other along axis 0."""

import jax
import numpy as np

from lorafusion_jax.train.checkpoint import Leaves
from lorafusion_jax.train.step import TrainState

_PER_RANK = ("grads/", "loss", "tokens")


def sum_ranks(leaves: Leaves) -> Leaves:
    """Returns a checkpoint's leaves with the sums of all ranks: what one device goes on from."""
    slots = len(leaves["bank/rank"])

    def summed(leaf: np.ndarray) -> np.ndarray:
        if len(leaf) == slots:
            return leaf
        return leaf.reshape(-1, slots, *leaf.shape[1:]).sum(axis=0, dtype=leaf.dtype)

    return {k: summed(x) if k.startswith(_PER_RANK) else x for k, x in leaves.items()}


def of_ranks(fresh: TrainState, leaves: Leaves) -> TrainState:
    """Returns a fresh state with as many accumulators as a checkpoint has, to restore into."""
    ranks = len(leaves["loss"]) // len(leaves["bank/rank"])
    grads, loss, tokens = jax.tree.map(
        lambda x: np.concatenate([np.asarray(x)] * ranks), (fresh.grads, fresh.loss, fresh.tokens)
    )
    return fresh._replace(grads=grads, loss=loss, tokens=tokens)
