"""Nothing that happens to one adapter changes a bit of another's, and training together is alone.

Every adapter here has non-zero A and B: with B = 0 most of these tests could not fail.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.lora import LoraSpec
from lorafusion_jax.lora.bank import write_slot
from lorafusion_jax.train.optimizer import reset_slot
from lorafusion_jax.train.step import TrainState
from tests.tolerance import assert_bit_equal, assert_error_ratio
from tests.train.tiny import (
    R_MAX,
    SLOTS,
    Bench,
    TinyJob,
    dataset,
    frozen_leaves,
    plan_jobs,
    slot_of,
    tiny_base,
)

JOBS = [
    TinyJob("sql", dataset(1, 40), 4, LoraSpec(r=8, alpha=16, dropout=0.1), lr=1e-2,
            weight_decay=0.1),
    TinyJob("emoji", dataset(2, 30, 4, 9), 3, LoraSpec(r=2, alpha=8), lr=3e-3,
            schedule="cosine"),
    TinyJob("translate", dataset(3, 50), 5, LoraSpec(r=4, alpha=4, dropout=0.5),
            lr=2e-2, optimizer="sgd", max_grad_norm=0.1),
    TinyJob("spelling", dataset(4, 60, 10, 40), 6, LoraSpec(r=1, alpha=2, dropout=0.05),
            lr=5e-3, optimizer="adam", schedule="linear"),
]  # fmt: skip
TOGETHER = dict(enumerate(JOBS))


@pytest.fixture(scope="module")
def microbatches():
    return plan_jobs(JOBS)


@pytest.fixture(scope="module")
def together(microbatches):
    """All four jobs, 10 steps each."""
    return Bench(TOGETHER).run(microbatches)


@pytest.mark.scenario("C1")
def test_ten_steps_of_everybody(together):
    assert together.state.opt.count.tolist() == [10, 10, 10, 10]
    assert together.state.opt.rejected.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("slot", range(SLOTS))
@pytest.mark.scenario("C1")
def test_bit_equal_to_alone_in_the_same_places(together, microbatches, slot):
    alone = Bench({slot: JOBS[slot]}).run(microbatches)
    assert_bit_equal(alone.slot(slot), together.slot(slot))


@pytest.mark.scenario("C1")
def test_another_learning_rate_would_be_seen(together, microbatches):
    changed = TinyJob(**{**vars(JOBS[1]), "lr": JOBS[1].lr * 1.0001})
    alone = Bench({1: changed}).run(microbatches)
    with pytest.raises(AssertionError):
        assert_bit_equal(alone.slot(1), together.slot(1))


def in_float64(job: TinyJob, slot: int):
    """Trains a job alone, packed its own way, in float64: the truth."""
    with jax.enable_x64(True):
        bench = Bench({slot: job}, dtype=jnp.float64)
        return bench.run(plan_jobs([job])).slot(slot)


@pytest.mark.parametrize("slot", range(SLOTS))
@pytest.mark.scenario("C1")
def test_within_twice_the_error_of_alone(together, slot):
    alone = Bench({slot: JOBS[slot]}).run(plan_jobs([JOBS[slot]]))
    truth = in_float64(JOBS[slot], slot)
    trained = [weights(x) for x in (together.slot(slot), alone.slot(slot), truth)]
    assert_error_ratio(*trained, factor=2)


def weights(slot: dict) -> dict:
    """The adapter as one vector a side: an error ratio of single small leaves is chance."""
    return {
        side: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(slot["bank"][side])])
        for side in ("a", "b")
    }


@pytest.mark.scenario("C1")
def test_a_small_difference_would_exceed_twice_the_error(together):
    alone = Bench({0: JOBS[0]}).run(plan_jobs([JOBS[0]]))
    truth = in_float64(JOBS[0], 0)
    changed = TinyJob(**{**vars(JOBS[0]), "lr": JOBS[0].lr * 1.001})
    other = Bench({0: changed}).run(plan_jobs([changed]))
    with pytest.raises(AssertionError):
        assert_error_ratio(*(weights(x) for x in (other.slot(0), alone.slot(0), truth)), factor=2)


@pytest.mark.scenario("C2")
def test_my_neighbours_content_is_nothing_to_me(together, microbatches):
    bench = Bench(TOGETHER)
    for microbatch in microbatches:
        batch = bench.pack(microbatch)
        other = np.repeat(batch.tile_adapter != 1, 16)
        bench.step(batch._replace(tokens=np.where(other, 96 - batch.tokens, batch.tokens)))
    assert_bit_equal(bench.slot(1), together.slot(1))
    with pytest.raises(AssertionError):
        assert_bit_equal(bench.slot(0), together.slot(0))


def scaled_adapter(bench: Bench, slot: int, factor: float) -> None:
    a = {p: x.at[slot].multiply(factor) for p, x in bench.bank.a.items()}
    bench.state = bench.state._replace(bank=bench.bank._replace(a=a))


@pytest.mark.parametrize("factor", [7.0, np.nan, np.inf])
@pytest.mark.scenario("C2", "C3")
def test_my_neighbours_weights_are_nothing_to_me(together, microbatches, factor):
    bench = Bench(TOGETHER)
    scaled_adapter(bench, 0, factor)
    before = bench.slot(0)
    bench.run(microbatches)
    for mine in (1, 2, 3):
        assert_bit_equal(bench.slot(mine), together.slot(mine))
    if not np.isfinite(factor):  # every batch is rejected; nothing of the slot moves
        assert bench.state.opt.rejected.tolist() == [10, 0, 0, 0]
        rejected = {"rejected": np.int32(10)}
        assert_bit_equal(bench.slot(0), before | {"opt": before["opt"] | rejected})


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.scenario("C3")
def test_a_nan_gradient_rejects_one_batch_of_one_job(together, microbatches, freeze):
    jobs = {s: TinyJob(**{**vars(job), "freeze": freeze}) for s, job in TOGETHER.items()}
    bench, poisoned = Bench(jobs), 0
    for microbatch in microbatches:
        batch = bench.pack(microbatch)
        third = any(s.job == "sql" and s.batch == 3 for s in microbatch.stretches)
        if third:
            mine = np.repeat(batch.tile_adapter == 0, 16) & (batch.loss_weight > 0)
            weight = np.where(mine, np.float32(np.inf), batch.loss_weight)
            batch, poisoned = batch._replace(loss_weight=weight), poisoned + mine.sum()
        bench.step(batch)
    assert poisoned
    for mine in (1, 2, 3):
        assert_bit_equal(bench.slot(mine), together.slot(mine))
    opt = bench.state.opt
    assert opt.rejected.tolist() == [1, 0, 0, 0]
    assert opt.frozen.tolist() == [freeze, False, False, False]
    assert opt.count.tolist() == [3 if freeze else 9, 10, 10, 10]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(bench.slot(0)))


@pytest.mark.scenario("C6")
def test_slots_may_be_permuted(together, microbatches):
    order = [2, 0, 3, 1]
    bench = Bench({slot: JOBS[number] for slot, number in enumerate(order)}).run(microbatches)
    for slot, number in enumerate(order):
        assert_bit_equal(bench.slot(slot), together.slot(number))


@pytest.mark.scenario("C6")
def test_a_reused_slot_starts_fresh_whatever_lay_there():
    job = JOBS[1]
    spec, paths = job.spec, None
    fresh, used = Bench({}), Bench({0: JOBS[0]})
    poison = jax.tree.map(
        lambda x: x.at[0].set(np.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, used.state
    )
    states = []
    for state in (fresh.state, poison):
        opt, grads, loss, tokens = reset_slot(state[1:], 0)
        bank = write_slot(state.bank, 0, spec, 7, paths)
        states.append(TrainState(bank, opt, grads, loss, tokens))
    assert_bit_equal(slot_of(states[1], 0), slot_of(states[0], 0))
    assert np.isnan(slot_of(poison, 0)["loss"])  # it was there


@pytest.mark.scenario("C7")
def test_rank_padding_stays_exactly_zero(together):
    for slot, job in TOGETHER.items():
        state = together.slot(slot)
        padded = [
            leaf[job.spec.r :]
            for part in (state["bank"]["a"], state["bank"]["b"], state["opt"], state["grads"])
            for leaf in jax.tree.leaves(part)
            if leaf.ndim == 2
        ]
        assert all((leaf == 0).all() for leaf in padded)
        assert (padded[0].shape[0] == R_MAX - job.spec.r) and len(padded) > 100


@pytest.mark.scenario("C9")
def test_base_weights_keep_their_bits(microbatches):
    before = frozen_leaves(tiny_base())
    Bench(TOGETHER).run(microbatches[:3])
    assert_bit_equal(frozen_leaves(tiny_base()), before)


def test_one_program_per_step_and_bucket(together, microbatches):
    compiled = together.programs.num_compiled
    other = TinyJob("new", dataset(9, 10), 2, LoraSpec(r=3, alpha=1, dropout=0.25), lr=1.0)
    Bench({2: other}).run(plan_jobs([other]))
    assert together.programs.num_compiled == compiled == 2
    Bench({2: other}).run(plan_jobs([other], capacity=96))
    assert together.programs.num_compiled == 3
