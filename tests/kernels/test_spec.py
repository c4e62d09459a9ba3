"""The mathematics of the fused op: truth, gradients, isolation. What every kernel is held to."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_lora, fused_multi_lora
from pallas_kernels.dropout import keep_mask, keep_scale
from pallas_kernels.lora import spec
from tests.kernels.oracle import Results, errors, fast_truth, make_problem, run, truth

fused = partial(fused_multi_lora, implementation="xla")

SHAPES = {
    "plain": {},
    "grouped": {"ns": (40, 24, 8)},
    "ragged": {"k": 72, "ns": (8,), "rank": 3, "tiles": (1,), "tile_rows": 5},
    "biased": {"biased": True, "ns": (16, 16)},
    "padded": {"padding": (0, 5, 30, 31)},
    "wide rank": {"rank": 33, "k": 40},
    "no adapter": {"tiles": (-1, -1)},
    "half dropped": {"rates": (0.5, 0.25)},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.scenario("D1")
def test_float32_equals_the_truth(shape):
    p = make_problem(**shape)
    assert max(errors(run(spec, p), truth(p)).values()) < 2e-6


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_fast_truth_is_the_truth(shape):
    p = make_problem(**shape)
    assert max(errors(fast_truth(p), truth(p)).values()) < 1e-12


def test_no_formula_beats_the_error_of_rounding_alone():
    p = make_problem(dtype=jnp.bfloat16, k=256, ns=(128, 64), rank=8, padding=(3, 4))
    want = truth(p)
    least, spec_ = errors(fast_truth(p, rounded=True), want), errors(run(spec, p), want)
    for name, error in spec_.items():
        assert 0.9 * least[name] < error < 2 * least[name], (name, error, least[name])


def _naive(p):
    """PEFT's sequence of operations in X's own dtype: the error to be held to."""
    rows = len(p.x) // len(p.routing.tile_adapter)
    slots = np.repeat(np.asarray(p.routing.tile_adapter), rows)
    live = ((slots >= 0) & (np.asarray(p.routing.row_key) != 0))[:, None]
    rate = p.routing.rate[slots]
    factor = keep_mask(p.routing.row_key, p.routing.site, rate, p.x.shape[1]) & live
    factor = (factor * keep_scale(rate)[:, None]).astype(p.x.dtype)

    def forward(x, a, b):
        ys, ss = [], []
        for w, a_i, b_i in zip(p.ws, a, b, strict=True):
            a_i, b_i = a_i.astype(x.dtype)[slots], b_i.astype(x.dtype)[slots]
            s = jnp.einsum("tk,trk->tr", x * factor, a_i)
            s = s * jnp.where(live, p.routing.scale[slots][:, None], 0).astype(x.dtype)
            ys.append(x @ w + jnp.einsum("tr,trn->tn", s, b_i))
            ss.append(s)
        return tuple(ys), tuple(ss)

    ys, pullback, ss = jax.vjp(forward, p.x, p.a, p.b, has_aux=True)
    return Results(ys, ss, *pullback(p.dys))


def _worst_ratio(actual, p):
    """Largest error relative to that of the naive formula in the same dtype."""
    want = truth(p)
    naive = errors(_naive(p), want)
    return max(e / max(naive[name], 1e-3) for name, e in errors(actual, want).items())


BF16 = {"dtype": jnp.bfloat16, "k": 200, "ns": (96, 56), "rank": 8, "padding": (3, 4)}


@pytest.mark.scenario("D1")
def test_bfloat16_is_no_less_accurate_than_peft():
    p = make_problem(**BF16)
    assert _worst_ratio(run(spec, p), p) < 1.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.scenario("D1")
def test_the_error_ratio_catches_planted_mistakes(dtype):
    p = make_problem(**{**BF16, "dtype": dtype})
    off = p.routing._replace(scale=p.routing.scale * 1.01)
    swapped = p.routing._replace(tile_adapter=p.routing.tile_adapter.at[0].set(1))
    site = p.routing._replace(site=p.routing.site + 1)
    assert _worst_ratio(run(spec, p), p) < 1.1
    for routing in (off, swapped, site):
        assert _worst_ratio(run(spec, p._replace(routing=routing)), p) > 1.5


@pytest.mark.scenario("D2")
def test_every_pattern_of_empty_tiles():
    p = make_problem(tiles=(0,) * 6, tile_rows=2, k=16, ns=(8,), rank=2)
    step = jax.jit(lambda p: run(spec, p))
    for pattern in itertools.product((0, -1), repeat=6):
        tiles = jnp.asarray(pattern, jnp.int32)
        q = p._replace(routing=p.routing._replace(tile_adapter=tiles))
        assert max(errors(step(q), truth(q)).values()) < 2e-6, pattern


def _directional(p, wrt, direction, step):
    def loss(operand):
        x, a, b = (operand if wrt == i else v for i, v in enumerate((p.x, p.a, p.b)))
        ys = fused(x, p.ws, a, b, *p.routing)
        return sum(jnp.vdot(dy, y) for dy, y in zip(p.dys, ys, strict=True))

    operand = (p.x, p.a, p.b)[wrt]
    moved = [jax.tree.map(lambda v, d, h=h: v + h * d, operand, direction) for h in (step, -step)]
    numeric = (loss(moved[0]) - loss(moved[1])) / (2 * step)
    analytic = jax.tree.map(jnp.vdot, jax.grad(loss)(operand), direction)
    return float(numeric), float(sum(jax.tree.leaves(analytic)))


@pytest.mark.parametrize("wrt", [0, 1, 2], ids=["x", "a", "b"])
@pytest.mark.scenario("B7", "D7")
def test_gradients_equal_finite_differences_with_dropout_on(wrt):
    with jax.enable_x64(True):
        p = make_problem(dtype=jnp.float64, ns=(40, 24), rates=(0.3, 0.1), padding=(2,))
        rng = np.random.default_rng(wrt)
        operand = (p.x, p.a, p.b)[wrt]
        direction = jax.tree.map(lambda v: jnp.asarray(rng.standard_normal(v.shape)), operand)
        numeric, analytic = _directional(p, wrt, direction, 1e-3)
        assert analytic == pytest.approx(numeric, rel=1e-8)
        wrong = p._replace(routing=p.routing._replace(site=p.routing.site + 1))
        assert _directional(wrong, wrt, direction, 1e-3)[0] != pytest.approx(analytic, rel=1e-4)


def _bits_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def _poison(p, rows, value=np.nan):
    rows = jnp.asarray(rows)
    dys = tuple(dy.at[rows].set(value) for dy in p.dys)
    return p._replace(x=p.x.at[rows].set(value), dys=dys)


@pytest.mark.scenario("D3")
def test_padding_rows_contribute_nothing_even_if_they_hold_nan():
    padding = (0, 7, 12)
    p = make_problem(padding=padding)
    rows = np.setdiff1d(np.arange(len(p.x)), padding)
    clean, poisoned = run(spec, _poison(p, padding, 0.0)), run(spec, _poison(p, padding))
    _bits_equal((clean.ss, clean.da, clean.db), (poisoned.ss, poisoned.da, poisoned.db))
    _bits_equal((clean.ys[0][rows], clean.dx[rows]), (poisoned.ys[0][rows], poisoned.dx[rows]))
    assert all((np.asarray(s)[list(padding)] == 0).all() for s in poisoned.ss)
    unmarked = p._replace(routing=p.routing._replace(row_key=p.routing.row_key | 1))
    assert np.isnan(run(spec, _poison(unmarked, padding)).da[0]).any()  # the key is what protects


@pytest.mark.scenario("C3")
def test_nan_of_one_adapter_changes_no_bit_of_another():
    p = make_problem(tiles=(0, 1, -1, 1))
    clean = run(spec, p)
    broken = _poison(p, range(8))._replace(
        a=tuple(v.at[0].set(np.nan) for v in p.a), b=tuple(v.at[0].set(np.inf) for v in p.b)
    )
    nan = run(spec, broken)
    others = slice(8, None)
    _bits_equal((clean.ys[0][others], clean.dx[others]), (nan.ys[0][others], nan.dx[others]))
    _bits_equal((clean.da[0][1], clean.db[0][1]), (nan.da[0][1], nan.db[0][1]))
    assert np.isnan(nan.da[0][0]).any()


def test_a_tile_without_adapter_is_the_frozen_linear():
    p = make_problem(tiles=(-1, -1), biased=True)
    nan = p._replace(a=(p.a[0] * np.nan,), b=(p.b[0] * np.nan,))
    result = run(spec, nan)
    np.testing.assert_allclose(result.ys[0], p.x @ p.ws[0] + p.biases[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.dx, p.dys[0] @ p.ws[0].T, rtol=1e-5, atol=1e-5)
    assert not np.asarray(result.da[0]).any() and not np.asarray(result.db[0]).any()


@pytest.mark.scenario("B7", "C1")
def test_one_adapter_alone_equals_its_rows_in_a_mix():
    mix = make_problem(tiles=(0, 1, 1), rates=(0.1, 0.3))
    alone = mix._replace(
        x=mix.x[8:],
        dys=tuple(dy[8:] for dy in mix.dys),
        routing=mix.routing._replace(
            tile_adapter=mix.routing.tile_adapter[1:], row_key=mix.routing.row_key[8:]
        ),
    )
    together, single = run(spec, mix), run(spec, alone)
    _bits_equal((together.ys[0][8:], together.dx[8:]), (single.ys[0], single.dx))
    _bits_equal((together.da[0][1], together.db[0][1]), (single.da[0][1], single.db[0][1]))


def test_grouped_projections_equal_separate_ones():
    p = make_problem(ns=(40, 24))
    grouped = run(spec, p)
    for i in range(2):
        one = p._replace(
            **{f: (getattr(p, f)[i],) for f in ("ws", "a", "b", "biases", "dys")},
        )
        single = run(spec, one)
        _bits_equal((grouped.ys[i], grouped.ss[i]), (single.ys[0], single.ss[0]))
        _bits_equal((grouped.da[i], grouped.db[i]), (single.da[0], single.db[0]))


@pytest.mark.scenario("D11")
def test_the_public_op_under_jit_vmap_scan_and_remat():
    p = make_problem(tiles=(0, 1), tile_rows=4, k=16, ns=(16,))

    def layer(x, site):
        return jax.checkpoint(lambda x: fused(x, p.ws, p.a, p.b, *p.routing[:4], site)[0])(x)

    sites = jnp.arange(3, dtype=jnp.uint32)[:, None]
    unrolled = layer(layer(layer(p.x, sites[0]), sites[1]), sites[2])
    scanned = jax.jit(lambda x: jax.lax.scan(lambda x, s: (layer(x, s), None), x, sites)[0])(p.x)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-5)
    batched = jax.vmap(layer, in_axes=(None, 0))(p.x, sites)
    np.testing.assert_allclose(batched[1], layer(p.x, sites[1]), rtol=1e-5, atol=1e-5)


def test_one_adapter_with_a_batch_axis():
    p = make_problem(tiles=(0,), tile_rows=12, rates=(0.1,), scales=(2.0,))
    args = (p.ws[0], p.a[0][0], p.b[0][0], 2.0)
    keys = p.routing.row_key.reshape(3, 4)
    y = fused_lora(p.x.reshape(3, 4, -1), *args, rate=0.1, row_key=keys, site=9)
    np.testing.assert_allclose(y.reshape(12, -1), run(spec, p).ys[0], rtol=1e-6, atol=1e-6)


def test_bad_arguments_are_refused_by_name():
    p = make_problem()
    with pytest.raises(ValueError, match="pad x to a whole number of tiles"):
        short = p.routing._replace(row_key=p.routing.row_key[:-1])
        fused(p.x[:-1], p.ws, p.a, p.b, *short)
    with pytest.raises(ValueError, match=r"ws\[0\]\.dtype=bfloat16"):
        fused(p.x, (p.ws[0].astype(jnp.bfloat16),), p.a, p.b, *p.routing)
    with pytest.raises((ValueError, TypeError), match="implementation"):
        fused_multi_lora(p.x, p.ws, p.a, p.b, *p.routing, implementation="cuda")
    with pytest.raises(ValueError, match="needs row_key"):
        fused_lora(p.x, p.ws[0], p.a[0][0], p.b[0][0], 1.0, rate=0.1)
