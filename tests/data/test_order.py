"""Order and split: pure, complete, and different for every seed, job and epoch."""

import itertools

import numpy as np
import pytest

from lorafusion_jax.data import batch_order, split_eval
from lorafusion_jax.errors import DataError


@pytest.mark.scenario("B4")
def test_order_is_frozen():
    """These numbers must never change: a resumed run relies on them."""
    assert batch_order(0, "sql", 0, 8).tolist() == [7, 5, 1, 6, 2, 0, 4, 3]
    assert batch_order(0, "sql", 1, 8).tolist() == [4, 6, 2, 7, 0, 3, 1, 5]
    assert split_eval(8, 2, 0, "sql")[1].tolist() == [1, 5]


@pytest.mark.parametrize("size", [0, 1, 2, 1000])
@pytest.mark.scenario("B4")
def test_order_is_a_permutation(size):
    order = batch_order(3, "job", 5, size)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(size))


@pytest.mark.scenario("B4")
def test_order_depends_on_everything_and_nothing_else():
    keys = itertools.product((0, 1, 2**62), ("a", "b"), (0, 1, 10))
    orders = {key: tuple(batch_order(*key, 50).tolist()) for key in keys}
    assert len(set(orders.values())) == len(orders)
    np.random.seed(0)
    assert all(tuple(batch_order(*key, 50).tolist()) == order for key, order in orders.items())


def test_order_is_uniform():
    """Each sample is first, and each pair is swapped, as often as chance predicts."""
    orders = np.stack([batch_order(0, "job", epoch, 6) for epoch in range(6000)])
    firsts = np.bincount(orders[:, 0], minlength=6)
    assert np.abs(firsts - 1000).max() < 4 * np.sqrt(1000 * 5 / 6)
    swapped = np.mean(np.argmax(orders == 0, axis=1) > np.argmax(orders == 1, axis=1))
    assert abs(swapped - 0.5) < 4 * 0.5 / np.sqrt(6000)


@pytest.mark.parametrize(
    ("size", "split", "held_out"),
    [(100, 0, 0), (100, 0.05, 5), (100, 48, 48), (10, 0.01, 1), (2, 1, 1), (3, 0.5, 2)],
)
def test_split(size, split, held_out):
    train, evaluation = split_eval(size, split, 0, "job")
    assert len(evaluation) == held_out
    assert sorted([*train, *evaluation]) == list(range(size))
    assert (np.diff(train) > 0).all() and (np.diff(evaluation) > 0).all()
    assert np.array_equal(evaluation, split_eval(size, split, 0, "job")[1])


def test_split_differs_by_job_and_grows_by_inclusion():
    small, large = (set(split_eval(1000, n, 0, "a")[1]) for n in (10, 20))
    assert small < large
    assert small != set(split_eval(1000, 10, 0, "b")[1])


@pytest.mark.parametrize(("size", "split"), [(10, 10), (10, 11), (1, 0.5), (1, 1)])
def test_something_must_be_left_to_train_on(size, split):
    with pytest.raises(DataError, match=r"job sql: eval\.split=.* lower it"):
        split_eval(size, split, 0, "sql")
