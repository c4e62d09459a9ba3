"""Packed attention against a dense reference: values, gradients, samples kept apart, memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorafusion_jax.models import attention_xla as module
from lorafusion_jax.models.attention import _bound as module_bound
from lorafusion_jax.models.attention import attention, attention_and_flags, cached_attention
from lorafusion_jax.models.rotary import Rotary, rotate
from tests.models.tiny import packed
from tests.tolerance import assert_bit_equal, assert_error_ratio

ROWS, LENGTHS = 40, (11, 1, 17, 5)
FIRST = slice(0, 11)


def dense(q, k, v, start, *, window=None, softcap=None, scale=None):
    """Attention with a mask, heads repeated: the textbook."""
    group = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    scores = jnp.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[2] ** -0.5)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    rows = jnp.arange(q.shape[0])
    visible = (rows[None] >= start[:, None]) & (rows[None] <= rows[:, None])
    if window is not None:
        visible &= rows[:, None] - rows[None] < window
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    return jnp.einsum("hqk,khd->qhd", weights, v)


def random_inputs(rng, dtype=np.float32, heads=6, groups=2, rows=ROWS):
    shapes = ((rows, heads, 8), (rows, groups, 8), (rows, groups, 8), (rows, heads, 8))
    return tuple(jnp.asarray(rng.normal(size=shape).astype(dtype)) for shape in shapes)


@partial(jax.jit, static_argnums=0)
def value_and_gradients(function, q, k, v, dout, where):
    out, pull = jax.vjp(lambda *args: function(*args, where), q, k, v)
    return out, pull(dout)


def by_chunks(q, k, v, segments, **scoring):
    """Another name, so that jit does not mistake it for the one without chunks."""
    return attention(q, k, v, segments, **scoring)


@pytest.fixture(params=[attention, by_chunks])
def packed_attention(request, monkeypatch):
    """Attention in one chunk, or in chunks that neither divide the rows nor respect samples."""
    if request.param is by_chunks:
        monkeypatch.setattr(module, "_UNCHUNKED_ROWS", 8)
        monkeypatch.setattr(module, "_QUERY_CHUNK", 12)
    return request.param


@pytest.mark.parametrize("heads, groups", [(6, 2), (5, 1)])
def test_values_and_gradients(rng, packed_attention, heads, groups):
    _, segments = packed(LENGTHS, ROWS)
    inputs = random_inputs(rng, heads=heads, groups=groups)
    ours = value_and_gradients(packed_attention, *inputs, segments)
    reference = value_and_gradients(dense, *inputs, segments.start)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        truth = value_and_gradients(dense, *wide, segments.start)
    assert_error_ratio(ours, reference, jax.tree.map(np.asarray, truth), floor_ulp=8.0)


@pytest.mark.parametrize(
    "scoring",
    [
        pytest.param({"window": 4}, marks=pytest.mark.slow),
        {"window": 1},
        pytest.param({"softcap": 0.7}, marks=pytest.mark.slow),
        pytest.param({"scale": 0.125}, marks=pytest.mark.slow),
        {"window": 5, "softcap": 1.5, "scale": 0.8},
    ],
)
def test_window_soft_cap_and_scale(rng, packed_attention, scoring):
    _, segments = packed(LENGTHS, ROWS)
    inputs = random_inputs(rng)
    ours = value_and_gradients(partial(packed_attention, **scoring), *inputs, segments)
    reference = value_and_gradients(partial(dense, **scoring), *inputs, segments.start)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in inputs]
        truth = value_and_gradients(partial(dense, **scoring), *wide, segments.start)
    truth = jax.tree.map(np.asarray, truth)
    assert_error_ratio(ours, reference, truth, floor_ulp=8.0)
    for ignored in scoring:  # each setting counts: without it the result is another
        rest = {key: value for key, value in scoring.items() if key != ignored}
        other = value_and_gradients(partial(dense, **rest), *inputs, segments.start)
        with pytest.raises(AssertionError, match="error beyond"):
            assert_error_ratio(ours, other, other, floor_ulp=64.0)


def test_bfloat16(rng, packed_attention):
    _, segments = packed(LENGTHS, ROWS)
    inputs = [x.astype(jnp.bfloat16) for x in random_inputs(rng)]
    ours = value_and_gradients(packed_attention, *inputs, segments)
    reference = value_and_gradients(dense, *inputs, segments.start)
    wide = [x.astype(jnp.float32) for x in inputs]
    assert_error_ratio(ours, reference, value_and_gradients(dense, *wide, segments.start))


def rows_of_others(poison, x):
    """Every row but those of the first sample replaced."""
    return jnp.full_like(x, poison).at[FIRST].set(x[FIRST])


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.scenario("C10")
def test_other_samples_change_no_bit(rng, packed_attention, poison):
    """Forward and backward: neighbours and padding may hold anything."""
    _, segments = packed(LENGTHS, ROWS)
    inputs = random_inputs(rng)
    poisoned = [rows_of_others(poison, x) for x in inputs]
    clean = value_and_gradients(packed_attention, *inputs, segments)
    dirty = value_and_gradients(packed_attention, *poisoned, segments)
    first_rows = [jax.tree.map(lambda x: x[FIRST], tree) for tree in (dirty, clean)]
    assert_bit_equal(*first_rows)


@pytest.mark.scenario("C10")
def test_dense_reference_would_not_pass_that(rng):
    """Control: a mask alone lets a neighbour's NaN through."""
    _, segments = packed(LENGTHS, ROWS)
    q, k, v, dout = (rows_of_others(np.nan, x) for x in random_inputs(rng))
    out, gradients = value_and_gradients(dense, q, k, v, dout, segments.start)
    assert all(jnp.isnan(x[FIRST]).any() for x in (out, *gradients))


@pytest.mark.parametrize("which", range(4))
def test_one_bad_value_shows_in_its_whole_sample(rng, which):
    """NaN is contained, never hidden: neither in values nor in gradients."""
    _, segments = packed(LENGTHS, ROWS)
    inputs = list(random_inputs(rng))
    inputs[which] = inputs[which].at[14, 0, 0].set(jnp.inf)
    out, gradients = value_and_gradients(attention, *inputs, segments)
    sample = slice(12, 29)
    for x in gradients if which == 3 else (out, *gradients):
        bad = np.isnan(x).any(axis=(1, 2))
        assert bad[sample].all() and not bad[:12].any() and not bad[29:].any()


def angles(rng) -> Rotary:
    turned = rng.uniform(0, 6, size=(ROWS, 4)).astype(np.float32)
    return Rotary(jnp.cos(turned), jnp.sin(turned))


def test_rotated_inside_is_rotated_before(rng):
    _, segments = packed(LENGTHS, ROWS)
    inputs, rotary = random_inputs(rng), angles(rng)

    def before(q, k, v, segments):
        return attention(rotate(q, rotary), rotate(k, rotary), v, segments)

    def inside(q, k, v, segments):
        return attention_and_flags(q, k, v, segments, rotary=rotary)[0]

    found, expected = (value_and_gradients(f, *inputs, segments) for f in (inside, before))
    assert_bit_equal(found, expected)


@pytest.mark.scenario("C10")
@pytest.mark.parametrize("which", range(2))
def test_what_is_finite_until_it_is_rotated_stays_in_its_sample(rng, which):
    _, segments = packed(LENGTHS, ROWS)
    inputs, rotary = list(random_inputs(rng)), angles(rng)

    def inside(q, k, v, segments):
        return attention_and_flags(q, k, v, segments, rotary=rotary)

    inputs[which] = inputs[which].at[14].set(float(np.finfo(np.float32).max))
    assert not np.isfinite(rotate(inputs[which], rotary)[14]).all()
    out, bad = inside(*inputs[:3], segments)
    gradients = value_and_gradients(lambda *args: inside(*args)[0], *inputs, segments)[1]
    sample = np.arange(ROWS)[12:29]
    assert np.flatnonzero(bad).tolist() == sample.tolist() and np.isfinite(out).all()
    for x in gradients:
        assert np.flatnonzero(np.isnan(x).any(axis=(1, 2))).tolist() == sample.tolist()


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16])
def test_what_is_just_usable_gives_finite_values(rng, dtype):
    """The bound keeps its promise, to neighbours too, and what is beyond it is never hidden."""
    _, segments = packed(LENGTHS, ROWS)
    inputs = [x.astype(dtype) for x in random_inputs(rng)]
    signs = [jnp.sign(x) for x in inputs]
    large = [x * module_bound(x) for x in signs]
    out = np.asarray(attention(*large[:3], segments), np.float32)
    whole = np.isfinite(out).all(axis=(1, 2)) | np.isnan(out).all(axis=(1, 2))
    assert whole.all() if dtype == np.float16 else np.isfinite(out).all()
    mixed = [big.at[FIRST].set(x[FIRST]) for x, big in zip(inputs, large, strict=True)]
    found, clean = (value_and_gradients(attention, *x, segments) for x in (mixed, inputs))
    assert_bit_equal(*(jax.tree.map(lambda x: x[FIRST], tree) for tree in (found, clean)))
    large[0] = large[0] * jnp.asarray(1.01, dtype)
    assert np.isnan(np.asarray(attention(*large[:3], segments), np.float32)).all()


def stored_sizes(function, q, k, v, where) -> list[int]:
    """Sizes of what the backward pass keeps."""

    def pull(*args):
        return jax.vjp(lambda *qkv: function(*qkv, where), *args)[1]

    return [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(pull, q, k, v))]


def test_nothing_quadratic_is_stored(rng, packed_attention):
    rows = 96
    _, segments = packed([rows], rows)
    q, k, v, _ = random_inputs(rng, rows=rows)
    assert max(stored_sizes(packed_attention, q, k, v, segments)) <= q.size
    assert max(stored_sizes(dense, q, k, v, segments.start)) >= 6 * rows**2


def test_cache_rows_beyond_the_position_are_not_seen(rng):
    q, k, v, _ = random_inputs(rng, rows=12)
    _, segments = packed([9], 12)
    expected = jax.jit(attention)(q, k, v, segments)[6:9]
    k, v = (x.at[9:].set(1e30) for x in (k, v))
    out = jax.jit(cached_attention)(q[None, 6:9], k[None], v[None], jnp.arange(6, 9)[None])
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scoring", [{"window": 3}, {"softcap": 0.7, "scale": 0.5, "window": 7}])
def test_cache_obeys_window_soft_cap_and_scale(rng, scoring):
    q, k, v, _ = random_inputs(rng, rows=12)
    _, segments = packed([9], 12)
    expected = dense(q, k, v, segments.start, **scoring)[4:9]
    out = cached_attention(q[None, 4:9], k[None], v[None], jnp.arange(4, 9)[None], **scoring)
    np.testing.assert_allclose(out[0], expected, rtol=1e-5, atol=1e-6)


def test_refusals(rng):
    q, k, v, _ = random_inputs(rng)
    _, segments = packed(LENGTHS, ROWS)
    with pytest.raises(ValueError, match="6 query heads are no multiple of 4"):
        attention(q, jnp.tile(k, (1, 2, 1)), jnp.tile(v, (1, 2, 1)), segments)
    with pytest.raises(Exception, match="implementation"):
        attention(q, k, v, segments, implementation="triton")
    with pytest.raises(ValueError, match="window=0"):
        attention(q, k, v, segments, window=0)
    with pytest.raises(ValueError, match=r"softcap=0\.0"):
        attention(q, k, v, segments, softcap=0.0)
