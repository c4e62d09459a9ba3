import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorafusion_jax.train.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    Adapters,
    Hyper,
    gated_update,
    init,
    learning_rate,
    reset_slot,
    slot_norms,
)
from tests.tolerance import assert_bit_equal, assert_ulp

SLOTS = 3


def hyper(**changes) -> Hyper:
    values = {
        "kind": 0,
        "schedule": 0,
        "lr": 1e-2,
        "warmup_steps": 0,
        "total_steps": 100,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lora_plus_ratio": 1.0,
        "freeze_on_nonfinite": False,
    } | changes
    dtypes = dict.fromkeys(("kind", "schedule", "warmup_steps", "total_steps"), jnp.int32)
    dtypes["freeze_on_nonfinite"] = jnp.bool_
    columns = {
        name: jnp.broadcast_to(jnp.asarray(value, dtypes.get(name, jnp.float32)), (SLOTS,))
        for name, value in values.items()
    }
    return Hyper(**columns)


def tree(rng, scale=1.0):
    shapes = {"a": {"x": (SLOTS, 4, 6), "y": (SLOTS, 4, 3)}, "b": {"x": (SLOTS, 4, 5)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape) * scale, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def slot(tree, number):
    return jax.tree.map(lambda x: x[number], tree)


def ends(*slots):
    return jnp.asarray([s in slots for s in range(SLOTS)])


update = jax.jit(gated_update)
NO_LOSS = jnp.zeros(SLOTS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_slot_does_what_optax_does_alone(rng, name):
    params, h = tree(rng), hyper(kind=OPTIMIZERS.index(name), weight_decay=0.1)
    reference = {
        "adamw": optax.adamw(1e-2, 0.9, 0.99, 1e-8, weight_decay=0.1),
        "adam": optax.adam(1e-2, 0.9, 0.99, 1e-8),
        "sgd": optax.sgd(1e-2, 0.9),
    }[name]
    reference = optax.chain(optax.clip_by_global_norm(1.0), reference)
    state = init(params, (name,), SLOTS)
    alone = slot(params, 1)
    alone_state = reference.init(alone)
    step = jax.jit(lambda g, s, p: reference.update(g, s, p))
    for _ in range(4):
        grads = tree(rng, 2.0)
        params, _, state, info = update(params, state, grads, NO_LOSS, ends(0, 1, 2), h)
        changes, alone_state = step(slot(grads, 1), alone_state, alone)
        alone = optax.apply_updates(alone, changes)
        assert info.applied.all()
    assert_ulp(slot(params, 1), alone, max_ulp=64)
    assert state.count.tolist() == [4, 4, 4]


@pytest.mark.scenario("C4")
def test_an_absent_slot_keeps_every_bit(rng):
    params = tree(rng)
    state = init(params, ("adamw",), SLOTS)
    # First a step of all, so that there is momentum to move on.
    params, _, state, _ = update(params, state, tree(rng), NO_LOSS, ends(0, 1, 2), hyper())
    before = slot((params, state), 1)
    for _ in range(3):
        params, _, state, _ = update(params, state, tree(rng), NO_LOSS, ends(0, 2), hyper())
    assert_bit_equal(slot((params, state), 1), before)
    assert state.count.tolist() == [4, 1, 4]


def test_accumulators_are_emptied_where_a_batch_ended(rng):
    """Applied or rejected; those of others keep their bits."""
    params, grads = tree(rng), tree(rng)
    grads["a"] = jax.tree.map(lambda g: g.at[0].set(np.nan), grads["a"])
    state = init(params, ("adamw", "sgd"), SLOTS)
    _, held, _, info = update(params, state, grads, NO_LOSS, ends(0, 2), hyper())
    assert info.applied.tolist() == [False, False, True]
    assert_bit_equal(slot(held, 1), slot(grads, 1))
    for ended in (0, 2):
        assert_bit_equal(slot(held, ended), jax.tree.map(jnp.zeros_like, slot(grads, ended)))


@pytest.mark.scenario("C4")
def test_plain_adamw_on_the_stack_moves_an_absent_slot(rng):
    params, transform = tree(rng), optax.adamw(1e-2, weight_decay=0.1)
    state = transform.init(params)
    grads = jax.tree.map(lambda g: g.at[1].set(0), tree(rng))
    changes, _ = transform.update(grads, state, params)
    with pytest.raises(AssertionError):
        assert_bit_equal(slot(optax.apply_updates(params, changes), 1), slot(params, 1))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.scenario("C3")
def test_a_non_finite_gradient_rejects_its_slot_only(rng, poison):
    params, h = tree(rng), hyper()
    state = init(params, ("adamw",), SLOTS)
    params, _, state, _ = update(params, state, tree(rng), NO_LOSS, ends(0, 1, 2), h)
    grads = tree(rng)
    bad = jax.tree.map(lambda g: g, grads)
    bad["b"]["x"] = bad["b"]["x"].at[1, 2, 3].set(poison)
    good = update(params, state, grads, NO_LOSS, ends(0, 1, 2), h)
    got = update(params, state, bad, NO_LOSS, ends(0, 1, 2), h)
    for other in (0, 2):
        assert_bit_equal(slot(got, other), slot(good, other))
    assert_bit_equal(slot(got[0], 1), slot(params, 1))
    assert_bit_equal(slot(got[2].moments, 1), slot(state.moments, 1))
    assert got[2].count.tolist() == [2, 1, 2]
    assert got[2].rejected.tolist() == [0, 1, 0]
    assert got[3].applied.tolist() == [True, False, True]


@pytest.mark.scenario("C3")
def test_a_non_finite_loss_rejects_too(rng):
    params = tree(rng)
    loss = jnp.asarray([0.0, np.nan, 1.0])
    result = update(
        params, init(params, ("adamw",), SLOTS), tree(rng), loss, ends(0, 1, 2), hyper()
    )
    assert result[3].applied.tolist() == [True, False, True]


def test_a_gate_that_ignores_finiteness_is_caught(rng):
    params = tree(rng)
    grads = jax.tree.map(lambda g: g.at[1].set(np.nan), tree(rng))
    step = jax.vmap(lambda p, g: jax.tree.map(lambda x, y: x - 0.01 * y, p, g))(params, grads)
    with pytest.raises(AssertionError):
        assert_bit_equal(slot(step, 1), slot(params, 1))


def test_freeze_holds_for_good_and_skip_goes_on(rng):
    params = tree(rng)
    h = hyper(freeze_on_nonfinite=jnp.asarray([False, True, False]))
    state = init(params, ("adamw",), SLOTS)
    poison = jax.tree.map(lambda g: g.at[:2].set(np.nan), tree(rng))
    params, _, state, _ = update(params, state, poison, NO_LOSS, ends(0, 1, 2), h)
    assert state.frozen.tolist() == [False, True, False]
    before = slot((params, state), 1)
    params, _, state, info = update(params, state, tree(rng), NO_LOSS, ends(0, 1, 2), h)
    assert info.applied.tolist() == [True, False, True]
    assert_bit_equal(slot((params, state), 1), before)
    assert state.rejected.tolist() == [1, 1, 0]


@pytest.mark.scenario("C5")
def test_clipping_sees_the_own_norm_only(rng):
    params, h = tree(rng), hyper(kind=OPTIMIZERS.index("sgd"), b1=0.0, max_grad_norm=1.0)
    state = init(params, ("sgd",), SLOTS)
    grads = tree(rng, 0.01)
    loud = jax.tree.map(lambda g: g.at[0].mul(1e4), grads)
    quiet = update(params, state, grads, NO_LOSS, ends(0, 1, 2), h)
    beside = update(params, state, loud, NO_LOSS, ends(0, 1, 2), h)
    assert_bit_equal(slot(beside, 1), slot(quiet, 1))
    moved = jax.tree.map(lambda x, y: x - y, slot(beside[0], 0), slot(params, 0))
    assert math.isclose(float(optax.tree.norm(moved)), 1e-2, rel_tol=1e-3)


@pytest.mark.scenario("C5")
def test_clipping_by_the_norm_of_all_is_caught(rng):
    grads = tree(rng, 0.01)
    loud = jax.tree.map(lambda g: g.at[0].mul(1e4), grads)
    clip = optax.clip_by_global_norm(1.0)
    with pytest.raises(AssertionError):
        assert_bit_equal(
            slot(clip.update(loud, clip.init(loud))[0], 1),
            slot(clip.update(grads, clip.init(grads))[0], 1),
        )


def test_an_optimizer_of_another_name_leaves_the_slot_alone(rng):
    params = tree(rng)
    h = hyper(kind=jnp.asarray([0, 2, 0]), max_grad_norm=np.inf)
    state = init(params, ("adamw", "sgd"), SLOTS)
    grads = tree(rng)
    result, _, new, _ = update(params, state, grads, NO_LOSS, ends(0, 1, 2), h)
    assert_bit_equal(slot(new.moments["adamw"], 1), slot(state.moments["adamw"], 1))
    assert_bit_equal(slot(new.moments["sgd"], 0), slot(state.moments["sgd"], 0))
    expected = jax.tree.map(lambda p, g: p - np.float32(1e-2) * g, params, grads)
    assert_ulp(slot(result, 1), slot(expected, 1), max_ulp=4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(schedule, warmup):
    total, h = 10, hyper(schedule=SCHEDULES.index(schedule), warmup_steps=warmup, total_steps=10)
    for step in range(total + 2):
        # The formulas of transformers' get_*_schedule_with_warmup.
        progress = (step - warmup) / max(1, total - warmup)
        expected = {
            "constant": 1.0,
            "linear": max(0.0, 1 - progress),
            "cosine": 0.5 * (1 + math.cos(math.pi * min(progress, 1))),
        }[schedule]
        if step < warmup:
            expected = step / warmup
        got = learning_rate(h, jnp.full(SLOTS, step))[0]
        assert math.isclose(got, 1e-2 * expected, rel_tol=1e-5, abs_tol=1e-9)


def test_hyper_parameters_do_not_compile_again(rng):
    params = tree(rng)
    state, grads = init(params, ("adamw",), SLOTS), tree(rng)
    step = jax.jit(lambda *args: gated_update(*args))  # a cache of its own
    step(params, state, grads, NO_LOSS, ends(0), hyper())
    other = hyper(lr=3e-4, schedule=2, warmup_steps=5, b1=0.5, weight_decay=0.0, total_steps=7)
    step(params, state, grads, NO_LOSS, ends(1, 2), other)
    assert step._cache_size() == 1


def test_reset_zeroes_one_slot_whatever_lay_there(rng):
    dirty = jax.tree.map(lambda x: x.at[1].set(np.nan), tree(rng))
    clean = reset_slot(dirty, 1)
    assert_bit_equal(slot(clean, 1), jax.tree.map(jnp.zeros_like, slot(dirty, 1)))
    for other in (0, 2):
        assert_bit_equal(slot(clean, other), slot(dirty, other))


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_lora_plus_multiplies_the_rate_of_b_alone(rng, kind):
    params = tree(rng)
    grads, ended = tree(rng), jnp.ones(SLOTS, bool)

    def moved(ratio):
        h = hyper(kind=OPTIMIZERS.index(kind), lora_plus_ratio=ratio)
        state = init(params, (kind,), SLOTS)
        new, *_ = gated_update(params, state, grads, jnp.ones(SLOTS), ended, h)
        return jax.tree.map(lambda a, b: a - b, new, params)

    plain, plus = moved(1.0), moved(jnp.asarray([1.0, 4.0, 4.0]))
    assert_bit_equal(plus["a"], plain["a"])
    for path, step in plain["b"].items():
        assert_bit_equal(plus["b"][path][0], step[0])
        np.testing.assert_allclose(plus["b"][path][1:], 4 * step[1:], rtol=1e-4, atol=1e-6)


def test_slot_norms_are_those_of_the_whole_gradient(rng):
    """Stacks of other widths, odd ones among them, and a slot that is not finite."""
    grads: Adapters = {
        "a": {"q": jnp.asarray(rng.normal(size=(3, 4, 48)), jnp.float32)},
        "b": {"q": jnp.asarray(rng.normal(size=(3, 4, 7)), jnp.float32).at[1, 2, 3].set(jnp.nan)},
    }
    norms = slot_norms(grads)
    for slot in (0, 2):
        whole = np.concatenate([np.ravel(x[slot]) for x in jax.tree.leaves(grads)])
        np.testing.assert_allclose(norms[slot], np.linalg.norm(whole), rtol=1e-6)
    assert np.isnan(norms[1])
