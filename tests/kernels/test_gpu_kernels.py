"""The kernels on a Hopper GPU: right, repeatable to the bit, isolated. Run by `make test-gpu`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused_lora, fused_multi_lora, tables
from pallas_kernels.dropout import keep_mask
from pallas_kernels.lora import mosaic_gpu, portable
from pallas_kernels.tuning import GemmTiles, GradDownTiles, Shape, candidates
from tests.kernels.oracle import errors, fast_truth, make_problem, relative_error, run

pytestmark = pytest.mark.gpu

fused = partial(fused_multi_lora, implementation="mosaic_gpu")
_run = jax.jit(run, static_argnums=0)

SHAPES = {
    "plain": {"tiles": (0,) * 8, "k": 1024, "ns": (1024,), "rank": 16, "tile_rows": 128},
    "many adapters": {
        "tiles": (0, 1, 2, -1, 3, 3, 4, 0, 6, 7, -1), "k": 576, "ns": (192, 1088), "rank": 8,
        "tile_rows": 128, "rates": (0.1, 0.0, 0.5, 0.05) * 2, "scales": (2.0, 0.5, 1.0, 4.0) * 2,
        "padding": (5, 130, 700, 1407), "biased": True,
    },
    "grouped": {"tiles": (0, 1) * 4, "k": 512, "ns": (512, 128, 128), "rank": 64, "tile_rows": 128},
    "rank 12": {"tiles": (1, 0), "k": 256, "ns": (256,), "rank": 12, "tile_rows": 128},
    "rank 200": {"tiles": (1, 0, 1), "k": 320, "ns": (640,), "rank": 200, "tile_rows": 128},
    "rank 200, grouped": {
        "tiles": (1, 0, 1), "k": 320, "ns": (640, 64, 64), "rank": 200, "tile_rows": 128,
    },
    "rank 256": {"tiles": (0, -1, 1), "k": 256, "ns": (192,), "rank": 256, "tile_rows": 128},
    "narrow output": {"tiles": (0, 1), "k": 256, "ns": (64,), "rank": 16, "tile_rows": 128},
    "narrow outputs, grouped": {
        "tiles": (1, 0), "k": 64, "ns": (640, 64, 24), "rank": 16, "tile_rows": 128,
    },
    "one tile of columns": {"tiles": (1, 0), "k": 64, "ns": (64,), "rank": 200, "tile_rows": 128},
    "widths in 16s": {
        "tiles": (1, 0), "k": 144, "ns": (80, 336), "rank": 24, "tile_rows": 128, "biased": True,
    },
    "widths in 32s": {"tiles": (1, 0), "k": 4128, "ns": (2080,), "rank": 16, "tile_rows": 128},
    "ragged rows": {"tiles": (0,), "k": 320, "ns": (192,), "rank": 16, "tile_rows": 1001},
    "outputs in 16s": {
        "tiles": (0, -1, 1), "k": 320, "ns": (80,), "rank": 16, "padding": (7, 300),
        "tile_rows": 128,
    },
    "few rows": {"tiles": (0,), "k": 8, "ns": (8,), "rank": 1, "tile_rows": 8},
    "tiles of 256": {"tiles": (1, 0, -1), "k": 4096, "ns": (128,), "rank": 16, "tile_rows": 256},
    "float16": {
        "tiles": (0, 1), "k": 512, "ns": (256,), "rank": 16, "tile_rows": 128, "dtype": jnp.float16,
    },
    "no adapter": {"tiles": (-1, -1), "k": 256, "ns": (256,), "rank": 16, "tile_rows": 128},
}  # fmt: skip


def _problem(dtype=jnp.bfloat16, **shape):
    return make_problem(dtype=dtype, **shape)


def _assert_accurate(p, backend=mosaic_gpu, limit=1.1):
    """Asserts errors of at most 1.1 times those that rounding alone makes; all truth from numpy."""
    want = fast_truth(p)
    allowed, ours = errors(fast_truth(p, rounded=True), want), errors(_run(backend, p), want)
    bad = {
        name: f"{error:.2e} instead of {allowed[name]:.2e}"
        for name, error in ours.items()
        if not error <= limit * allowed[name] + 1e-4
    }
    assert not bad, bad


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.scenario("D1")
def test_as_accurate_as_rounding_allows(name):
    _assert_accurate(_problem(**SHAPES[name]))


_TUNED = Shape(640, 512, (576,), 16)
_VARIANT = {
    "tiles": (0, 1, -1, 1, 0), "k": 512, "ns": (576,), "rank": 16, "tile_rows": 128,
    "padding": (7, 300),
}  # fmt: skip


@pytest.mark.parametrize("index", range(len(candidates("dx", _TUNED))))
def test_every_candidate_is_right(index):
    jax.clear_caches()  # sizes are no part of a jitted function's key
    dx, base_up = (candidates(op, _TUNED)[index] for op in ("dx", "base_up"))
    with tables.using(dx=dx, base_up=base_up):
        _assert_accurate(_problem(**_VARIANT))


def test_atomic_sums_are_right():
    jax.clear_caches()
    with tables.atomic_gradients():
        _assert_accurate(_problem(**SHAPES["many adapters"]))
    jax.clear_caches()


_ABSORB = {
    "base_up": GemmTiles("m", minor="m", width=16, absorb=True), "dx": GemmTiles(absorb=True),
}  # fmt: skip
_ABSORBED = {
    "many tiles": {"tiles": (0, 1, -1, 1) * 16, "k": 1024, "ns": (2048, 320), "rank": 16},
    "few tiles": {"tiles": (0, -1, 1), "k": 320, "ns": (576,), "rank": 8, "padding": (7, 300)},
    "one row tile": {"tiles": (0,), "k": 512, "ns": (256,), "rank": 32},
    "ragged rows": {"tiles": (0,), "k": 320, "ns": (192,), "rank": 16, "tile_rows": 1001},
    "outputs in 16s": {"tiles": (0, -1, 1), "k": 320, "ns": (80,), "rank": 16, "padding": (7, 300)},
}


@pytest.mark.parametrize("name", _ABSORBED)
def test_absorbed_passes_give_the_bits_of_separate_ones(name):
    """S at the head of base_up, dA at the tail of dx; 50 times, as blocks wait for each other."""
    p = _problem(**({"tile_rows": 128} | _ABSORBED[name]))
    jax.clear_caches()
    with tables.using(grad_down=GradDownTiles(stages=3, splits=1)):
        separate = _run(mosaic_gpu, p)
    jax.clear_caches()
    with tables.using(**_ABSORB):
        for _ in range(50):
            _same_bits(separate, _run(mosaic_gpu, p))
    jax.clear_caches()


def test_the_portable_products_are_right():
    """S, dA and dB are XLA's there, which rounds the dropped input once more."""
    _assert_accurate(_problem(**_VARIANT, biased=True), portable, limit=1.5)


@pytest.mark.parametrize("wrong", ["scale", "adapter"])
@pytest.mark.scenario("D1")
def test_the_comparison_sees_a_planted_mistake(wrong):
    p = _problem(**SHAPES["grouped"])
    routing = {
        "scale": p.routing._replace(scale=p.routing.scale * 1.01),
        "adapter": p.routing._replace(tile_adapter=p.routing.tile_adapter.at[0].set(1)),
    }[wrong]

    class Mistaken:
        @staticmethod
        def forward(*args):
            return mosaic_gpu.forward(*args[:-1], routing)

        @staticmethod
        def backward(*args):
            return mosaic_gpu.backward(*args[:5], routing, args[6])

    with pytest.raises(AssertionError, match="instead of"):
        _assert_accurate(p, Mistaken)


@pytest.mark.parametrize("wrt", [0, 1, 2], ids=["x", "a", "b"])
def test_gradients_equal_finite_differences(wrt):
    """The op is linear in each operand, so that a long step costs nothing but rounding."""
    p = _problem(tiles=(0, 1), k=256, ns=(256,), rank=16, rates=(0.2, 0.1), tile_rows=128)

    @jax.jit
    def loss(x, a, b):
        ys = fused(x, p.ws, a, b, *p.routing)
        return sum(
            jnp.vdot(dy.astype(jnp.float32), y.astype(jnp.float32))
            for dy, y in zip(p.dys, ys, strict=True)
        )

    operands = (p.x, p.a, p.b)
    gradient = jax.grad(loss, argnums=wrt)(*operands)
    direction = jax.tree.map(lambda g: jnp.sign(g).astype(g.dtype), gradient)

    def moved(step):
        changed = list(operands)
        changed[wrt] = jax.tree.map(lambda v, d: v + step * d, operands[wrt], direction)
        return float(loss(*changed))

    analytic = sum(
        jnp.vdot(g.astype(jnp.float32), d.astype(jnp.float32))
        for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    )
    assert float(analytic) == pytest.approx(moved(0.5) - moved(-0.5), rel=0.02)


def _same_bits(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.scenario("B6")
def test_two_hundred_repetitions_give_the_same_bits():
    p = _problem(
        tiles=tuple(np.random.default_rng(0).integers(-1, 4, 16)), tile_rows=128, k=2048,
        ns=(2048, 512), rank=16, rates=(0.1, 0.0, 0.2, 0.1), scales=(1.0,) * 4, padding=(7, 300),
    )  # fmt: skip
    step = partial(_run, mosaic_gpu)
    live = np.repeat(np.asarray(p.routing.tile_adapter) >= 0, 128)
    first = step(p)
    differ = jax.jit(
        lambda one, other: sum(
            jnp.sum(a != b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True)
        )
    )
    assert live.any() and all(jnp.isfinite(v).all() for v in jax.tree.leaves(first))
    counts = [differ(first, step(p)) for _ in range(200)]
    assert sum(int(count) for count in counts) == 0


def _poison(p, rows, value):
    rows = jnp.asarray(rows)
    dys = tuple(dy.at[rows].set(value) for dy in p.dys)
    return p._replace(x=p.x.at[rows].set(value), dys=dys)


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.scenario("D3")
def test_padding_rows_contribute_nothing_even_if_they_hold_nan(rate):
    padding = (0, 63, 64, 127, 200, 511)
    p = _problem(
        tiles=(0, 1, -1, 0), tile_rows=128, k=512, ns=(256, 384), rank=16, rates=(rate, rate),
        padding=padding,
    )  # fmt: skip
    rows = np.setdiff1d(np.arange(512), padding)
    clean, nan = (
        _run(mosaic_gpu, _poison(p, padding, 0)),
        _run(mosaic_gpu, _poison(p, padding, np.nan)),
    )
    _same_bits((clean.ss, clean.da, clean.db), (nan.ss, nan.da, nan.db))
    _same_bits([y[rows] for y in clean.ys], [y[rows] for y in nan.ys])
    _same_bits(clean.dx[rows], nan.dx[rows])


@pytest.mark.scenario("C3")
def test_nan_of_one_adapter_changes_no_bit_of_another():
    p = _problem(tiles=(0, 1, -1, 1), tile_rows=128, k=512, ns=(256,), rank=16)
    broken = _poison(p, range(128), np.nan)._replace(
        a=tuple(v.at[0].set(np.nan) for v in p.a), b=tuple(v.at[0].set(np.inf) for v in p.b)
    )
    clean, nan = _run(mosaic_gpu, p), _run(mosaic_gpu, broken)
    _same_bits((clean.ys[0][128:], clean.dx[128:]), (nan.ys[0][128:], nan.dx[128:]))
    _same_bits((clean.da[0][1], clean.db[0][1]), (nan.da[0][1], nan.db[0][1]))
    assert np.isnan(np.asarray(nan.da[0][0])).any()


@pytest.mark.scenario("B7")
def test_mask_bits_are_those_of_the_definition():
    p = _problem(tiles=(0, 1), tile_rows=128, k=256, ns=(64,), rank=64, rates=(0.25, 0.5))
    rate = jnp.repeat(p.routing.rate, 128)
    want = np.asarray(keep_mask(p.routing.row_key, p.routing.site, rate, 256))
    for chunk in range(4):  # A picks 64 columns of X, all ones
        pick = jnp.zeros((2, 64, 256)).at[:, jnp.arange(64), 64 * chunk + jnp.arange(64)].set(1)
        ones = p._replace(x=jnp.ones_like(p.x), a=(pick,))
        got = np.asarray(_run(mosaic_gpu, ones).ss[0]) != 0
        np.testing.assert_array_equal(got, want[:, 64 * chunk : 64 * chunk + 64])
    ones = p._replace(
        ws=(jnp.zeros_like(p.ws[0]),),
        a=tuple(jnp.ones_like(v) for v in p.a),
        b=tuple(jnp.ones_like(v) for v in p.b),
        dys=tuple(jnp.ones_like(v) for v in p.dys),
    )
    np.testing.assert_array_equal(np.asarray(_run(mosaic_gpu, ones).dx) != 0, want)


@pytest.mark.parametrize("wrt", [0, 1, 2], ids=["x", "a", "b"])
def test_gradients_agree_with_finite_differences(wrt):
    p = _problem(tiles=(0, 1), tile_rows=128, k=512, ns=(256,), rank=16, rates=(0.1, 0.2))
    direction = jax.tree.map(
        lambda v: jax.random.normal(jax.random.key(wrt), v.shape).astype(v.dtype),
        (p.x, p.a, p.b)[wrt],
    )

    def loss(operand):
        x, a, b = (operand if wrt == i else v for i, v in enumerate((p.x, p.a, p.b)))
        (y,) = fused(x, p.ws, a, b, *p.routing)
        return jnp.vdot(p.dys[0].astype(jnp.float32), y.astype(jnp.float32))

    def moved(step):
        return jax.tree.map(lambda v, d: v + step * d, (p.x, p.a, p.b)[wrt], direction)

    grad = jax.grad(loss)((p.x, p.a, p.b)[wrt])
    dots = jax.tree.map(
        lambda g, d: jnp.vdot(*(v.astype(jnp.float32) for v in (g, d))), grad, direction
    )
    numeric = float(loss(moved(0.5)) - loss(moved(-0.5)))
    scale = float(jnp.linalg.norm(p.dys[0].astype(jnp.float32))) * 16
    assert abs(float(sum(jax.tree.leaves(dots))) - numeric) < 0.02 * max(scale, abs(numeric))


@pytest.mark.scenario("D11")
def test_jit_scan_remat_grad_and_vmap():
    p = _problem(tiles=(0, 1), tile_rows=128, k=256, ns=(256,), rank=16)
    sites = jnp.arange(3, dtype=jnp.uint32)[:, None]

    def net(x, a, b, implementation):
        def layer(x, site):
            (y,) = fused_multi_lora(
                x, p.ws, a, b, *p.routing[:4], site, implementation=implementation
            )
            return jnp.tanh(y), None

        return jax.lax.scan(jax.checkpoint(layer), x, sites)[0].astype(jnp.float32).sum()

    grads = [
        jax.jit(jax.grad(partial(net, implementation=name), argnums=(0, 1, 2)))(p.x, p.a, p.b)
        for name in ("mosaic_gpu", "xla")
    ]
    for ours, xla in zip(*map(jax.tree.leaves, grads), strict=True):
        assert relative_error(np.asarray(ours, np.float32), np.asarray(xla, np.float32)) < 0.03
    batched = jax.jit(jax.vmap(lambda site: fused(p.x, p.ws, p.a, p.b, *p.routing[:4], site)[0]))(
        sites
    )
    single = fused(p.x, p.ws, p.a, p.b, *p.routing[:4], sites[1])[0]
    _same_bits(batched[1], single)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.scenario("D11")
def test_gradients_inside_shard_map(kind):
    p = _problem(tiles=(0, 1), tile_rows=128, k=256, ns=(256,), rank=16)
    mesh = jax.make_mesh((1,), ("d",), axis_types=(getattr(jax.sharding.AxisType, kind),))
    rows, whole = jax.sharding.PartitionSpec("d"), jax.sharding.PartitionSpec()

    def local(x, tile_adapter, row_key):
        def loss(x, a):
            routing = p.routing._replace(tile_adapter=tile_adapter, row_key=row_key)
            return fused(x, p.ws, a, p.b, *routing)[0].astype(jnp.float32).sum()

        return jax.grad(loss, argnums=(0, 1))(x, p.a)

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, rows), out_specs=(rows, whole), check_vma=False
    )
    args = (p.x, p.routing.tile_adapter, p.routing.row_key)
    placed = jax.device_put(args, jax.sharding.NamedSharding(mesh, rows))
    _same_bits(jax.jit(sharded)(*placed), jax.jit(local)(*args))


def test_the_default_implementation_here_is_ours():
    p = _problem(tiles=(0,), tile_rows=128, k=256, ns=(256,), rank=16, rates=(0.0,), scales=(2.0,))
    args = (p.x, p.ws[0], p.a[0][0], p.b[0][0], 2.0)
    _same_bits(fused_lora(*args), fused_lora(*args, implementation="mosaic_gpu"))
    in_float32 = fused_lora(*(v.astype(jnp.float32) for v in args[:2]), *args[2:])
    assert in_float32.dtype == jnp.float32
    with pytest.raises(ExceptionGroup):
        fused_lora(
            *(v.astype(jnp.float32) for v in args[:2]), *args[2:], implementation="mosaic_gpu"
        )
