"""The engine trains what one device trains, on every mesh, and every claim has a twin that fails.

Quick meshes here; the whole grid runs with the long tests.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest

from lorafusion_jax.train.checkpoint import Checkpoints, leaves_of, unflatten_like
from tests.parallel.conftest import MIX, STEPS, sum_of_ranks
from tests.parallel.mix import (
    CONFIG,
    OnMesh,
    empty_slot,
    first_batches,
    noop_positions,
    tiny_base,
    unfinished_near,
)
from tests.tolerance import assert_bit_equal, assert_error_ratio

# Together they have: both orders, saved and recomputed residuals, uneven layers, both axis types.
PIPELINE = {"data": 1, "stage": 4, "residuals": "recompute"}
BOTH = {
    "data": 2,
    "stage": 2,
    "order": "bfh",
    "remat": ("none", "full", "attention"),
    "layers": (3, 1),
    "axis_kind": "explicit",
}
QUICK = pytest.mark.parametrize("settings", [PIPELINE, BOTH], ids=["pipeline", "both"])
# A pipeline alone is what BOTH has, without its reduction over `data`.
QUICKEST = pytest.mark.parametrize(
    "settings",
    [pytest.param(PIPELINE, marks=pytest.mark.slow, id="pipeline"), pytest.param(BOTH, id="both")],
)


def adapters(state):
    return {"a": state.bank.a, "b": state.bank.b}


def vectors(tree):
    """Each slot's A and B as one vector: an error ratio of single small leaves is chance."""
    return {
        side: np.concatenate([np.asarray(x).reshape(len(MIX.jobs), -1) for x in leaves.values()], 1)
        for side, leaves in tree.items()
    }


def check_against_one_device(on: OnMesh, start, reference, truth):
    """Gradients of the first global batches and weights after 10 steps."""
    whole = on.plan()
    _, _, stale = feeding = on.run(on.start(start), on.slots(first_batches(whole)))
    grads = sum_of_ranks(on.finish(feeding[0]).grads)
    assert_error_ratio(*(vectors(g) for g in (grads, reference.grads, truth.grads)))
    state, report, stale = on.run(on.start(start), on.slots(whole))
    done = on.finish(state)
    assert stale.tolist() == [0, 0]
    assert done.opt.count.tolist() == [STEPS] * len(MIX.jobs)
    assert report.applied.sum(axis=0).tolist() == [STEPS] * len(MIX.jobs)
    assert_error_ratio(*(vectors(adapters(s)) for s in (done, reference.state, truth.state)))
    return done, report


@QUICKEST
@pytest.mark.scenario("C11")
def test_trains_like_one_device(settings, on_mesh, start, reference, truth):
    on = on_mesh(**settings)
    done, report = check_against_one_device(on, start, reference, truth)
    # A ten-thousandth is too much.
    with pytest.raises(AssertionError, match="error beyond"):
        wrong = jax.tree.map(lambda x: x * np.float32(1 + 1e-4), vectors(adapters(done)))
        assert_error_ratio(wrong, *(vectors(adapters(s)) for s in (reference.state, truth.state)))
    check_norms(report, reference, truth)


def norms_of(reports, dtype) -> np.ndarray:
    """Gradient norms of each slot's updates, in order, from one device's reports."""
    found = [[] for _ in MIX.jobs]
    for ended, report in reports:
        for slot in np.flatnonzero(ended):
            found[slot].append(report.grad_norm[slot])
    return np.array(found, dtype)


def check_norms(report, reference, truth):
    """The norm that clips is that of the whole gradient, not of a stage's part."""
    ours = np.array([report.grad_norm[report.applied[:, i], i] for i in range(len(MIX.jobs))])
    references = norms_of(reference.reports, np.float32), norms_of(truth.reports, np.float64)
    assert_error_ratio(ours, *references, floor_ulp=4)
    assert min(ours[1]) > MIX.jobs[1].max_grad_norm, "job b is there to be clipped"


@pytest.mark.scenario("C11")
def test_a_stages_part_of_the_norm_is_not_the_norm(reference):
    """The twin of `check_norms`: what two of four layers have is far from the whole."""

    def norm(paths):
        grads = reference.grads
        return np.sqrt(sum((grads[k][p] ** 2).sum() for k in grads for p in paths))

    paths = list(reference.grads["a"])
    half = [p for p in paths if p.startswith(("model.layers.0", "model.layers.1"))]
    assert norm(half) < 0.99 * norm(paths)


@QUICK
@pytest.mark.scenario("C12")
def test_versions_catch_a_distance_one_too_small(settings, on_mesh, start):
    on = on_mesh(**settings)
    near = on.plan(on.pipeline.distance - 1)
    state, _, stale = on.run(on.start(start), on.slots(near))
    assert stale[0] > 0 and stale[1] > 0
    far, _, stale = on.run(on.start(start), on.slots(on.plan()))
    assert stale.tolist() == [0, 0]
    with pytest.raises(AssertionError, match="not bit-equal"):
        assert_bit_equal(adapters(on.finish(state)), adapters(on.finish(far)))


@pytest.mark.scenario("C12")
def test_distance_is_that_of_the_order(on_mesh):
    fbh, bfh = on_mesh(**PIPELINE).pipeline, on_mesh(**BOTH).pipeline
    assert (fbh.distance, fbh.lag, fbh.ring) == (8, 7, 8)
    assert (bfh.distance, bfh.lag, bfh.ring) == (3, 3, 3)
    assert replace(fbh, order="bfh").distance == 7


@QUICK
@pytest.mark.scenario("C11")
def test_noops_and_chunk_boundaries_change_no_bit(settings, on_mesh, start):
    on = on_mesh(**settings)
    whole = on.plan()
    slots = on.slots(whole)
    rng = np.random.default_rng(0)
    spread = []
    for slot in slots:
        spread += [empty_slot(slot)] * int(rng.integers(0, 3)) + [slot]
    assert len(spread) > len(slots) + noop_positions(whole)
    plain = on.finish(on.run(on.start(start), slots)[0])
    assert_bit_equal(on.finish(on.run(on.start(start), spread)[0]), plain)
    # The twin: an empty row that claims an end does change the job.
    last = spread[0]._replace(ends=np.array([True, False, False, False]))
    other = on.finish(on.run(on.start(start), [last, *slots])[0])
    with pytest.raises(AssertionError, match="not bit-equal"):
        assert_bit_equal(other, plain)


@QUICK
def test_one_jobs_nan_changes_no_bit_of_another(settings, on_mesh, start):
    on = on_mesh(**settings)
    slots = on.slots(on.plan())
    poisoned = jax.tree.map(np.array, start)
    for stack in poisoned.bank.a.values():
        stack[2, 0, 0] = np.nan
    plain, _, _ = on.run(on.start(start), slots)
    hurt, report, _ = on.run(on.start(poisoned), slots)
    plain, hurt = on.finish(plain), on.finish(hurt)
    assert hurt.opt.rejected.tolist() == [0, 0, STEPS, 0] and hurt.opt.count[2] == 0
    assert not report.applied[:, 2].any()
    others = [0, 1, 3]
    assert_bit_equal(*(jax.tree.map(lambda x: x[others], adapters(s)) for s in (hurt, plain)))
    with pytest.raises(AssertionError, match="not bit-equal"):
        assert_bit_equal(adapters(hurt), adapters(plain))


@QUICK
@pytest.mark.scenario("G8")
def test_a_loss_above_its_limit_is_skipped_alone(settings, on_mesh, start):
    on = on_mesh(**settings)
    slots = on.slots(on.plan())
    plain, before, _ = on.run(on.start(start), slots)
    ends = [number for number, slot in enumerate(slots) if slot.ends[0]]
    limit = np.full(len(MIX.jobs), np.inf, np.float32)
    limit[0] = 1e-3  # of job a, in its fourth global batch
    slots[ends[3]] = slots[ends[3]]._replace(limit=limit)
    hurt, report, stale = on.run(on.start(start), slots)
    assert stale.tolist() == [0, 0]
    plain, hurt = on.finish(plain), on.finish(hurt)
    assert hurt.opt.rejected.tolist() == [1, 0, 0, 0] and hurt.opt.count[0] == STEPS - 1
    skipped = np.flatnonzero(before.applied[:, 0] & ~report.applied[:, 0])
    assert len(skipped) == 1 and np.isfinite(report.loss[skipped[0], 0])
    others = [1, 2, 3]
    assert_bit_equal(*(jax.tree.map(lambda x: x[others], adapters(s)) for s in (hurt, plain)))
    with pytest.raises(AssertionError, match="not bit-equal"):
        assert_bit_equal(adapters(hurt), adapters(plain))


def in_three(whole):
    """A plan's thirds, cut where global batches are under way."""
    third = len(whole.microbatches) // 3
    first, second = (unfinished_near(whole, i) for i in (third, 2 * third))
    return [
        replace(whole, microbatches=whole.microbatches[i:j])
        for i, j in ((0, first), (first, second), (second, None))
    ]


@pytest.mark.scenario("A12")
def test_restores_on_other_stage_counts_bit_equal(on_mesh, start, reference, truth):
    """One device, 4 stages, 2 uneven stages of 2 ranks: each goes on where the other stopped."""
    parts = in_three(reference.plan)
    saved, versions = start, np.zeros(len(MIX.jobs), np.int32)
    for part, settings in zip(parts, (BOTH, PIPELINE, BOTH), strict=True):
        on = on_mesh(**settings)
        put = on.start(saved, versions)
        # What goes in comes out, whatever the mesh.
        back = on.finish(put)
        assert_bit_equal(
            (back.bank, back.opt, sum_of_ranks(back.grads)),
            (saved.bank, saved.opt, sum_of_ranks(saved.grads)),
        )
        state, report, stale = on.run(put, on.slots(part))
        assert stale.tolist() == [0, 0]
        versions = versions + report.applied.sum(axis=0)
        saved = on.finish(state)
        assert any(np.any(x) for x in jax.tree.leaves(saved.grads)) or part is parts[-1]
    assert saved.opt.count.tolist() == [STEPS] * len(MIX.jobs)
    assert_error_ratio(*(vectors(adapters(s)) for s in (saved, reference.state, truth.state)))


GRID = [(data, stage) for stage in range(1, 9) for data in range(1, 9) if data * stage <= 8]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "stage"), GRID)
@pytest.mark.scenario("C11")
def test_grid(data, stage, start_of, reference_of, truth_of):
    """Every mesh of up to 8 devices; 8 layers where there are more than 4 stages."""
    layers = 8 if stage > 4 else 4
    order = "bfh" if (data + stage) % 2 else "fbh"
    on = OnMesh(tiny_base(replace(CONFIG, num_hidden_layers=layers)), MIX, data, stage, order=order)
    check_against_one_device(on, start_of(layers), reference_of(layers), truth_of(layers))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["fbh", "bfh"])
@pytest.mark.parametrize(
    ("residuals", "remat"),
    [("save", "attention"), ("save", "full"), ("recompute", "attention"), ("recompute", "full")],
)
def test_remat_policies(order, residuals, remat, on_mesh, start, reference, truth):
    on = on_mesh(1, 2, order=order, residuals=residuals, remat=remat)
    check_against_one_device(on, start, reference, truth)


@pytest.mark.slow
@pytest.mark.scenario("A12")
def test_one_stage_four_stages_two_stages(on_mesh, start, reference, truth, tmp_path):
    """Through checkpoint files, in the middle of global batches: 1 -> 4 -> 2 stages, bit by bit."""
    parts = in_three(reference.plan)
    store = Checkpoints(tmp_path)
    store.prepare()
    saved, versions = start, np.zeros(len(MIX.jobs), np.int32)
    for number, (part, stage) in enumerate(zip(parts, (1, 4, 2), strict=True)):
        on = on_mesh(1, stage)
        put = on.start(saved, versions)
        assert_bit_equal(leaves_of(on.finish(put)), leaves_of(saved))
        state, report, stale = on.run(put, on.slots(part))
        assert stale.tolist() == [0, 0]
        versions = versions + report.applied.sum(axis=0)
        done = on.finish(state)
        open_sums = any(np.any(x) for x in jax.tree.leaves(done.grads))
        assert open_sums or part is parts[-1]
        store.write(number, leaves_of(done), {})
        saved = unflatten_like(done, store.load(number).leaves)
        assert_bit_equal(leaves_of(saved), leaves_of(done))
    assert saved.opt.count.tolist() == [STEPS] * len(MIX.jobs)
    assert_error_ratio(*(vectors(adapters(s)) for s in (saved, reference.state, truth.state)))
    # The twin: a state of which a stage's part was lost does not pass.
    lost = jax.tree.map(np.array, saved)
    next(iter(lost.bank.a.values()))[:] = 0
    with pytest.raises(AssertionError, match="not bit-equal"):
        assert_bit_equal(leaves_of(lost), leaves_of(saved))
