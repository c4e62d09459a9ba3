"""Several sources by weight: a pure function of seed, job, epoch and position."""

from collections import Counter

import numpy as np

from lorafusion_jax.data import concatenate, mixed_order
from lorafusion_jax.data.dataset import join_samples

SOURCES = [np.arange(0, 40), np.arange(40, 50), np.arange(50, 53)]


def epochs(weights, count=6, seed=0, job="sql"):
    return [mixed_order(seed, job, epoch, SOURCES, weights) for epoch in range(count)]


def test_each_source_has_its_share_of_every_epoch():
    for passes, indices in epochs([2.0, 1.0, 1.0]):
        assert len(passes) == len(indices) == 53
        assert [int(np.isin(indices, source).sum()) for source in SOURCES] == [27, 13, 13]


def test_no_row_comes_again_before_all_of_its_source_came():
    seen = Counter()
    for passes, indices in epochs([2.0, 1.0, 1.0]):
        for number, index in zip(passes, indices, strict=True):
            assert (int(number), int(index)) not in seen  # a new dropout mask each time
            seen[int(number), int(index)] += 1
    for source in SOURCES:
        times = Counter(index for _, index in seen if index in source)
        assert max(times.values()) - min(times.values()) <= 1 and len(times) == len(source)
        assert {number for number, index in seen if index in source} == set(
            range(max(times.values()))
        )


def test_the_order_is_a_function_of_its_arguments():
    first = epochs([1.0, 1.0, 1.0])
    again = [mixed_order(0, "sql", epoch, SOURCES, [1.0, 1.0, 1.0]) for epoch in (5, 0, 3)]
    for epoch, pair in zip((5, 0, 3), again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(pair, first[epoch], strict=True))
    others = (epochs([1.0] * 3, seed=1), epochs([1.0] * 3, job="b"), first[1:])
    assert all(not np.array_equal(other[0][1], first[0][1]) for other in others)
    scaled = mixed_order(0, "sql", 0, SOURCES, [0.1, 0.1, 0.1])
    assert np.array_equal(scaled[1], first[0][1])  # only proportions count


def test_a_tiny_weight_still_gets_a_row():
    _, indices = mixed_order(0, "a", 0, SOURCES, [1e9, 1.0, 1.0])
    assert [int(np.isin(indices, source).sum()) for source in SOURCES] == [51, 1, 1]


def test_the_sources_are_mixed_and_not_one_after_the_other():
    _, indices = mixed_order(0, "a", 0, SOURCES, [1.0, 1.0, 1.0])
    kinds = np.digitize(indices, [40, 50])
    assert (np.diff(kinds) != 0).sum() > 20


def test_data_sets_put_together():
    parts = [
        join_samples([(n + 1, [n] * (n + 2), [False] + [True] * (n + 1)) for n in range(count)])
        for count in (3, 1, 2)
    ]
    whole = concatenate(parts)
    assert len(whole) == 6 and whole.sizes == (3, 1, 2)
    assert [whole.source_of(i) for i in range(6)] == [0, 0, 0, 1, 2, 2]
    assert whole.lines.tolist() == [1, 2, 3, 1, 1, 2]
    flat = [part[i] for part in parts for i in range(len(part))]
    for i, (tokens, supervised) in enumerate(flat):
        assert np.array_equal(whole[i][0], tokens) and np.array_equal(whole[i][1], supervised)
    assert concatenate(parts[:1]) is parts[0] and parts[0].source_of(2) == 0
