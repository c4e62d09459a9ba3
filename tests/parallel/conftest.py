"""One device's training of the tiny mix, in float32 and in float64, and engines that tests share.

A compiled engine is what costs: each mesh is made once and every test puts its own state through.
"""

from dataclasses import dataclass, replace
from functools import cache

import jax
import numpy as np
import pytest

from lorafusion_sched import Plan, plan
from tests.parallel.mix import (
    CONFIG,
    Mix,
    OnMesh,
    first_batches,
    first_state,
    tiny_base,
    train_one_device,
    wide,
)
from tests.train import conftest as train_conftest

STEPS = 10
MIX = Mix(STEPS)


@dataclass(frozen=True)
class OneDevice:
    """What one device trains.

    Attributes:
        plan: what it runs: slots far enough apart for 4 stages in either order.
        grads: of each job's first global batch.
        state: after all steps.
        reports: of the updates, with the slots that ended.
    """

    plan: Plan
    grads: dict
    state: object
    reports: list


@cache
def _base(layers: int):
    return tiny_base(replace(CONFIG, num_hidden_layers=layers))


def run_one_device(layers: int, widen) -> OneDevice:
    base, whole = _base(layers), plan(MIX.problem(distance=8, clock="fbh"))
    grads = train_one_device(base, MIX, first_batches(whole), widen)[0].grads
    state, reports = train_one_device(base, MIX, whole, widen)
    return OneDevice(whole, grads, state, reports)


@pytest.fixture(scope="session")
def reference_of():
    """In float32, the dtype of the engine, for a number of layers."""
    return cache(lambda layers: run_one_device(layers, lambda tree: tree))


@pytest.fixture(scope="session")
def truth_of():
    """In float64."""

    @cache
    def run(layers: int) -> OneDevice:
        with jax.enable_x64(True):
            return run_one_device(layers, wide)

    return run


@pytest.fixture(scope="session")
def start_of():
    """The state before training, on the host."""
    return cache(lambda layers: jax.device_get(first_state(_base(layers), MIX)[2]))


@pytest.fixture
def reference(reference_of) -> OneDevice:
    """Of 4 layers, as the next two."""
    return reference_of(4)


@pytest.fixture
def truth(truth_of) -> OneDevice:
    return truth_of(4)


@pytest.fixture
def start(start_of):
    return start_of(4)


@pytest.fixture(scope="session")
def on_mesh():
    """Makes engines, each setting once."""

    @cache
    def make(data: int, stage: int, **settings) -> OnMesh:
        return OnMesh(_base(4), MIX, data, stage, **settings)

    return make


def sum_of_ranks(tree, slots: int = len(MIX.jobs)):
    """Adds up what the data ranks hold along axis 0."""
    return jax.tree.map(
        lambda x: np.asarray(x).reshape(-1, slots, *x.shape[1:]).sum(0, dtype=x.dtype), tree
    )


# One device's programs too are compiled once for all runs here.
shared_programs = train_conftest.shared_programs
