"""The fused feed-forward block on a Hopper GPU: the bits of separate kernels, always the same."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora import mosaic_gpu
from pallas_kernels.tables import choose
from pallas_kernels.tuning import Shape, gated_grad_tiles
from tests.kernels.mlps import block, errors, make_mlp, mlp_truth, run, separate
from tests.kernels.oracle import fast_truth

pytestmark = pytest.mark.gpu

SHAPES = {
    "plain": {"tiles": (0,) * 8, "k": 1024, "inner": 2048, "n": 1024, "rank": 16},
    "many adapters": {
        "tiles": (0, 1, 2, -1, 3, 3, 4, 0, 6, 7, -1), "k": 576, "inner": 1088, "n": 192, "rank": 8,
        "rates": (0.1, 0.0, 0.5, 0.05) * 2, "scales": (2.0, 0.5, 1.0, 4.0) * 2,
        "padding": (5, 130, 700, 1407), "biased": True,
    },
    "rank 200": {"tiles": (1, 0, 1), "k": 320, "inner": 640, "n": 320, "rank": 200},
    "widths in 16s": {"tiles": (1, 0), "k": 144, "inner": 336, "n": 144, "rank": 24},
    "ragged rows": {"tiles": (0,), "k": 320, "inner": 192, "n": 320, "tile_rows": 1001},
    "one tile of columns": {"tiles": (1, 0), "k": 64, "inner": 64, "n": 64, "rank": 8},
    "rank 32": {"tiles": (0, 2, -1, 1), "k": 256, "inner": 1216, "n": 256, "rank": 32,
                "rates": (0.1, 0.0, 0.2), "scales": (2.0, 1.0, 0.5), "padding": (7, 300)},
    "few rows": {"tiles": (0,), "k": 128, "inner": 4096, "n": 128, "tile_rows": 24},
    "float16": {
        "tiles": (0, 1), "k": 512, "inner": 768, "n": 512, "rank": 16, "dtype": jnp.float16,
    },
    "no adapter": {"tiles": (-1, -1), "k": 256, "inner": 512, "n": 256},
}  # fmt: skip


def _problem(activation="silu", **shape):
    common = {"dtype": jnp.bfloat16, "tile_rows": 128, "rank": 16}
    return make_mlp(activation=activation, **(common | shape))


def _compiled(make, p, implementation="mosaic_gpu"):
    """Forward and backward of one program, as in training."""
    _, a, b, _ = p.operands()
    function = jax.jit(lambda x, a, b, dy: _pulled(make(p, implementation), x, a, b, dy))
    return partial(function, p.into.x, a, b, p.outof.dys[0])


def _pulled(function, x, a, b, dy):
    y, pull = jax.vjp(function, x, a, b)
    return y, *pull(dy)


def _same_bits(one, other):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.fixture
def sums_as_in_grad_up(monkeypatch):
    """Panels and splits of `gated_grad` as `grad_up` has them: then all their sums are the same."""

    def sizes(rows, width, rank):
        chosen = choose("grad_up", Shape(rows, 0, (width, width), rank))
        ours = gated_grad_tiles(rows, width, rank)
        return replace(ours, panel=chosen.panel, splits=chosen.splits)

    jax.clear_caches()
    monkeypatch.setattr(mosaic_gpu, "gated_grad_tiles", sizes)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.scenario("D1")
@pytest.mark.usefixtures("sums_as_in_grad_up")
def test_silu_gives_the_bits_of_separate_kernels(name):
    """The kernels do XLA's instructions for silu, and add up as the separate kernels do."""
    p = _problem(**SHAPES[name])
    _same_bits(_compiled(block, p)(), _compiled(separate, p)())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("name", ["plain", "many adapters"])
@pytest.mark.scenario("D1")
def test_errs_no_more_than_xla(name, activation):
    p = _problem(activation, **SHAPES[name])
    want = mlp_truth(p, fast_truth)
    allowed = errors(run(jax.jit(separate(p, "xla")), p), want)
    ours = errors(run(jax.jit(block(p, "mosaic_gpu")), p), want)
    bad = {
        name: f"{error:.2e} instead of {allowed[name]:.2e}"
        for name, error in ours.items()
        if not error <= 1.1 * allowed[name] + 1e-4
    }
    assert not bad, bad
    other = "gelu_tanh" if activation == "silu" else "silu"
    mistaken = errors(run(jax.jit(block(p._replace(activation=other), "mosaic_gpu")), p), want)
    assert mistaken["y[0]"] > 2 * allowed["y[0]"]


@pytest.mark.scenario("B6")
def test_fifty_repetitions_give_the_same_bits():
    p = _problem(
        tiles=tuple(np.random.default_rng(0).integers(-1, 4, 16)), k=1024, inner=3584, n=1024,
        rates=(0.1, 0.0, 0.2, 0.1), scales=(1.0,) * 4, padding=(7, 300),
    )  # fmt: skip
    step = _compiled(block, p)
    first = step()
    for _ in range(50):
        _same_bits(first, step())


@pytest.mark.parametrize("rate", [0.0, 0.1])
@pytest.mark.scenario("D3")
def test_padding_rows_contribute_nothing_even_if_they_hold_nan(rate):
    padding = (0, 63, 64, 127, 200, 511)
    p = _problem(tiles=(0, 1, -1, 0), k=512, inner=768, n=512, rates=(rate, rate), padding=padding)
    rows = np.setdiff1d(np.arange(512), padding)

    def poisoned(value):
        x, dy = (v.at[jnp.asarray(padding)].set(value) for v in (p.into.x, p.outof.dys[0]))
        outof = p.outof._replace(dys=(dy,))
        return _compiled(block, p._replace(into=p.into._replace(x=x), outof=outof))()

    clean, nan = poisoned(0), poisoned(np.nan)
    _same_bits(clean[2:], nan[2:])
    _same_bits([v[rows] for v in clean[:2]], [v[rows] for v in nan[:2]])


@pytest.mark.scenario("D11")
def test_remat_keeps_the_bits():
    p = _problem(**SHAPES["plain"])
    keep = jax.checkpoint_policies.save_only_these_names("gate", "up")

    def kept(p, implementation):
        return jax.checkpoint(block(p, implementation), policy=keep)

    _same_bits(_compiled(kept, p)(), _compiled(block, p)())
