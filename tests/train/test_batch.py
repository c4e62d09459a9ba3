import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.train.batch import longest_bucket, num_segments, pack, segment_bucket
from lorafusion_sched import Microbatch, Sample, Stretch
from pallas_kernels import row_keys
from tests.train.tiny import CAPACITY, TILE, TinyJob, dataset, plan_jobs

JOBS = [TinyJob("a", dataset(1, 12), 4), TinyJob("b", dataset(2, 10), 5)]
SLOTS = {"a": 2, "b": 0}


def packed(microbatch, names=("a", "b"), segments=32, longest=None):
    rows = {job.name: job.rows(SLOTS[job.name]) for job in JOBS if job.name in names}
    sizes = {"tile": TILE, "num_slots": 3, "max_segments": segments, "longest": longest}
    return pack(microbatch, rows, **sizes)


@pytest.mark.parametrize("number", range(5))
@pytest.mark.scenario("C10")
def test_rows_hold_what_the_plan_says(number):
    microbatch = plan_jobs(JOBS)[number]
    batch, owners = packed(microbatch)
    samples = {job.name: job.samples for job in JOBS}
    expected = [(s.job, sample.index) for s in microbatch.stretches for sample in s.samples]
    assert [(owner.job, owner.index) for owner in owners] == expected
    live = np.zeros(CAPACITY, bool)
    for owner in owners:
        tokens, supervised = samples[owner.job][owner.index]
        rows = slice(owner.start, owner.stop)
        assert not live[rows].any()
        live[rows] = True
        assert (batch.tokens[rows] == tokens).all()
        assert (batch.positions[rows] == np.arange(len(tokens))).all()
        assert (batch.segment_start[rows] == owner.start).all()
        assert (batch.labels[owner.start : owner.stop - 1] == tokens[1:]).all()
        assert ((batch.loss_weight[owner.start : owner.stop - 1] > 0) == supervised[1:]).all()
        assert batch.loss_weight[owner.stop - 1] == 0  # nothing follows the last token
        tiles = batch.tile_adapter[owner.start // TILE : -(-owner.stop // TILE)]
        assert (tiles == SLOTS[owner.job]).all()
    assert (batch.row_key[live] != 0).all()
    assert (batch.row_key[~live] == 0).all()
    assert (batch.loss_weight[~live] == 0).all()
    assert (batch.positions[~live] == 0).all()
    assert (batch.segment_start[~live] == np.flatnonzero(~live)).all()


@pytest.mark.scenario("C5")
def test_weights_of_a_global_batch_sum_to_one():
    totals = {}
    for microbatch in plan_jobs(JOBS):
        batch, owners = packed(microbatch)
        number = {stretch.job: stretch.batch for stretch in microbatch.stretches}
        for owner in owners:
            key = owner.job, number[owner.job]
            totals[key] = totals.get(key, 0) + batch.loss_weight[owner.start : owner.stop].sum()
    assert len(totals) == 5
    assert np.allclose(list(totals.values()), 1, rtol=1e-6)


@pytest.mark.scenario("B7")
def test_row_keys_are_those_of_the_kernels():
    microbatch = plan_jobs(JOBS)[0]
    batch, owners = packed(microbatch)
    seeds = {job.name: job.rows(0).seed for job in JOBS}
    for owner in owners:
        length = owner.stop - owner.start
        expected = row_keys(
            jnp.full(length, seeds[owner.job], jnp.uint32),
            jnp.zeros(length, jnp.int32),
            jnp.full(length, owner.index, jnp.int32),
            jnp.arange(length, dtype=jnp.int32),
        )
        assert (batch.row_key[owner.start : owner.stop] == np.asarray(expected)).all()


def test_offsets_are_where_segments_start():
    for microbatch in plan_jobs(JOBS):
        batch, _ = packed(microbatch)
        offsets = batch.segment_offsets
        assert offsets[0] == 0 and offsets[-1] == CAPACITY
        assert (np.diff(offsets) >= 0).all()
        starts = set(offsets.tolist())
        live = batch.row_key != 0
        assert set(batch.segment_start[live].tolist()) <= starts
        # No padding row shares a segment with a token.
        segment = np.searchsorted(offsets, np.arange(CAPACITY), side="right")
        assert not set(segment[live]) & set(segment[~live])


def test_batch_end_is_the_plan_s():
    ends = [packed(m)[0].batch_end for m in plan_jobs(JOBS)]
    assert np.sum(ends, axis=0).tolist() == [2, 0, 3]


def test_a_dropped_job_leaves_the_others_in_place():
    microbatch = next(m for m in plan_jobs(JOBS) if len(m.stretches) == 2)
    both, owners = packed(microbatch)
    alone, _ = packed(microbatch, names=("b",))
    mine = np.zeros(CAPACITY, bool)
    for owner in owners:
        if owner.job == "b":
            mine[owner.start : owner.stop] = True
    for name in ("tokens", "positions", "labels", "segment_start", "loss_weight", "row_key"):
        assert (getattr(both, name)[mine] == getattr(alone, name)[mine]).all()
    assert (alone.row_key[~mine] == 0).all()
    assert set(alone.tile_adapter.tolist()) == {-1, SLOTS["b"]}


def test_segment_bucket_fits():
    microbatches = plan_jobs(JOBS)
    bucket = segment_bucket(microbatches)
    assert bucket >= max(map(num_segments, microbatches))
    for microbatch in microbatches:
        packed(microbatch, segments=bucket)


@pytest.mark.parametrize(
    ("samples", "bucket"),
    [
        (0, 8),
        (7, 8),
        (8, 12),
        (16, 20),
        (23, 24),
        (31, 32),
        (32, 40),
        (63, 64),
        (64, 80),
        (128, 160),
    ],
)
def test_segment_buckets_are_few_and_close(samples, bucket):
    """A microbatch of one stretch has one segment of padding besides its samples."""
    stretch = Stretch("a", 0, tuple(Sample(0, i, 16) for i in range(samples)), ends=True)
    assert segment_bucket([Microbatch((stretch,) if samples else (), 4096)]) == bucket


@pytest.mark.parametrize("names", [("a", "b"), ("b",), ()])
def test_no_segment_is_longer_than_the_bound(names):
    """Runs of padding are cut, whole dropped jobs among them, and the bucket has room for all."""
    for microbatch in plan_jobs(JOBS):
        longest = max(s.length for stretch in microbatch.stretches for s in stretch.samples)
        bound = num_segments(microbatch, longest)
        batch, _ = packed(microbatch, names, bound, longest)
        assert np.diff(batch.segment_offsets).max() <= longest < CAPACITY
        assert batch.longest.rows == longest


def test_a_sample_above_the_bound_is_an_error():
    microbatch = plan_jobs(JOBS)[0]
    with pytest.raises(AssertionError, match="longest=2"):
        packed(microbatch, segments=64, longest=2)


def test_longest_bucket_is_a_power_of_two_that_fits():
    def of(length):
        stretch = Stretch("a", 0, (Sample(0, 0, length),), ends=True)
        return longest_bucket([Microbatch((stretch,), 4096)])

    assert [of(n) for n in (1, 256, 257, 1024, 1025)] == [256, 256, 512, 1024, 2048]
    assert longest_bucket([]) == 256
