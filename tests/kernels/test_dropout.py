"""Mask bits, statistics and independence of the counter-based dropout."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.dropout import job_seed, keep_mask, keep_scale, row_keys
from tests.kernels.oracle import keep_of_row, keep_of_rows

SITE = jnp.full((1,), 8 * 3 + 2, jnp.uint32)


def _keys(rows, job="a job", epoch=0):
    position = jnp.arange(rows, dtype=jnp.int32)
    full = jnp.full((rows,), job_seed(0, job), jnp.uint32)
    return row_keys(full, jnp.full((rows,), epoch), position // 512, position % 512)


@pytest.mark.parametrize("columns", [8, 64, 200])
@pytest.mark.scenario("B7")
def test_mask_bits_follow_the_definition(columns):
    keys, rates = _keys(12), jnp.asarray([0.0, 0.05, 0.5] * 4, jnp.float32)
    mask = np.asarray(keep_mask(keys, SITE, rates, columns))
    for t in range(12):
        expected = keep_of_row(int(keys[t]), int(SITE[0]), float(rates[t]), columns)
        np.testing.assert_array_equal(mask[t], expected)
    np.testing.assert_array_equal(mask, keep_of_rows(keys, int(SITE[0]), rates, columns))


@pytest.mark.scenario("B7")
def test_mask_of_a_row_depends_on_nothing_but_key_site_rate_and_column():
    keys, rates = _keys(64), jnp.full((64,), 0.1)
    whole = keep_mask(keys, SITE, rates, 256)
    shuffled = np.random.default_rng(0).permutation(64)
    np.testing.assert_array_equal(keep_mask(keys[shuffled], SITE, rates, 256), whole[shuffled])
    np.testing.assert_array_equal(keep_mask(keys[5:6], SITE, rates[:1], 96)[0], whole[5, :96])


def test_rate_zero_keeps_everything():
    assert keep_mask(_keys(64), SITE, jnp.zeros(64), 256).all()


def _z_of_correlation(one, other):
    """z-score of the correlation of two masks; their own keep rates are not held against them."""
    one, other = (v.ravel() - v.mean(dtype=np.float64) for v in (one, other))
    return (one @ other) / np.sqrt((one @ one) * (other @ other)) * np.sqrt(one.size)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5])
def test_statistics_of_the_mask(rate):
    rows, columns = 4096, 1024
    rates = jnp.full((rows,), rate)
    mask = np.asarray(keep_mask(_keys(rows), SITE, rates, columns))
    keep = 1 - round(256 * rate) / 256
    assert abs(mask.mean() - keep) / np.sqrt(keep * (1 - keep) / mask.size) < 3.5
    assert float(keep_scale(jnp.float32(rate))) == pytest.approx(1 / keep, rel=1e-6)
    pairs = {
        "columns": (mask[:, 1:], mask[:, :-1]),
        "columns 16 apart": (mask[:, 16:], mask[:, :-16]),
        "rows": (mask[1:], mask[:-1]),
        "sites": (mask, np.asarray(keep_mask(_keys(rows), SITE + 1, rates, columns))),
        "epochs": (mask, np.asarray(keep_mask(_keys(rows, epoch=1), SITE, rates, columns))),
        "jobs": (mask, np.asarray(keep_mask(_keys(rows, job="another"), SITE, rates, columns))),
    }
    scores = {name: _z_of_correlation(*pair) for name, pair in pairs.items()}
    assert all(abs(z) < 3.5 for z in scores.values()), scores
    assert _z_of_correlation(mask, mask) > 100  # the score does see dependence


def test_row_and_column_correlations_are_those_of_chance():
    rows = columns = 1024
    mask = np.asarray(keep_mask(_keys(rows), SITE, jnp.full((rows,), 0.5), columns))
    for samples in (mask, mask.T):
        correlation = np.corrcoef(samples.astype(np.float32))
        np.fill_diagonal(correlation, 0)
        # The largest of n^2/2 normal deviates of 1/sqrt(n) is near sqrt(4 ln n) of them: 5.3.
        assert np.abs(correlation).max() * np.sqrt(rows) < 6.2


def test_row_keys_never_mark_a_token_as_padding():
    keys = np.asarray(_keys(1 << 16))
    assert (keys != 0).all()
    assert len(np.unique(keys)) > (1 << 16) - 8
