"""The kernels in Mosaic's interpreter: right without a GPU, free of races and barrier mistakes.

Each test runs in its own process, because the interpreter is unusable after an exception.
"""

import os
import subprocess
import sys
import textwrap

import pytest

_PRELUDE = """
    import jax, jax.numpy as jnp, numpy as np
    from pallas_kernels import _mgpu, tables
    from pallas_kernels.tuning import GemmTiles, GradDownTiles
    from pallas_kernels.lora import mosaic_gpu, portable, spec
    from tests.kernels.oracle import errors, make_problem, relative_error, run, truth

    def check(races=True, sizes={}, backend=mosaic_gpu, **shape):
        p = make_problem(**{"dtype": jnp.bfloat16, "tile_rows": 128} | shape)
        with _mgpu.interpret(detect_races=races), tables.using(**sizes):
            ours = run(backend, p)
        want, worst = truth(p), 0.0
        reference = errors(run(spec, p), want)
        for name, error in errors(ours, want).items():
            assert error <= 1.1 * reference[name] + 1e-4, (name, error, reference[name])
        return p, ours
"""


def _run(body: str) -> subprocess.CompletedProcess:
    script = textwrap.dedent(_PRELUDE) + textwrap.dedent(body)
    # The interpreter's threads wait for each other inside XLA's pool, which NPROC sizes: two blocks
    # with three warpgroups each may stand still on a machine of few cores without it.
    environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=".", XLA_FLAGS="", NPROC="24")
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=400, env=environment
    )


def _races(result: subprocess.CompletedProcess) -> bool:
    """The interpreter goes on after a race: it prints what it saw, and the results may be right."""
    return "RACE DETECTED" in result.stdout


def _passes(body: str) -> None:
    result = _run(body)
    assert result.returncode == 0, result.stderr[-3000:]
    assert not _races(result), result.stdout[:3000]


def _is_caught(body: str) -> None:
    result = _run(body)
    assert result.returncode != 0 or _races(result)


@pytest.mark.scenario("D4")
def test_one_tile_of_one_adapter():
    _passes("check(tiles=(0,), k=64, ns=(64,), rank=8, rates=(0.25,), scales=(2.0,))")


@pytest.mark.slow
@pytest.mark.scenario("D1")
def test_adapters_padding_bias_and_grouped_projections():
    _passes("""
        check(
            tiles=(0, -1, 1, 0, 2), k=192, ns=(320, 24), rank=12, biased=True,
            rates=(0.1, 0.0, 0.2, 0.0), scales=(2.0, 0.5, 1.0, 1.0), padding=(3, 130, 300),
        )
    """)


@pytest.mark.slow
def test_other_sizes_of_the_products():
    _passes("""
        check(
            sizes=dict(base_up=GemmTiles('n', staged=1), dx=GemmTiles('m', stages=3, staged=4)),
            tiles=(0, -1, 1), k=320, ns=(320,), rank=8, rates=(0.25, 0.0), scales=(2.0, 0.5),
            padding=(3, 300),
        )
    """)


_ABSORB_CASE = """
    absorb = dict(base_up=GemmTiles('m', absorb=True), dx=GemmTiles('n', absorb=True))
    case = dict(
        tiles=(0, -1, 1), k=320, ns=(320, 64), rank=8, rates=(0.25, 0.0), scales=(2.0, 0.5),
        padding=(3, 300),
    )
"""


@pytest.mark.slow
def test_absorbed_passes_give_the_bits_of_separate_ones():
    """In one block, as the interpreter knows no flags between blocks."""
    _passes(
        _ABSORB_CASE
        + """
    _mgpu.num_sms = lambda: 1
    p, absorbed = check(sizes=absorb, **case)
    _, separate = check(sizes=dict(grad_down=GradDownTiles(splits=1)), **case)
    jax.tree.map(np.testing.assert_array_equal, absorbed, separate)
    """
    )


@pytest.mark.slow
def test_da_is_shared_out_among_blocks():
    _passes(_ABSORB_CASE + "    del absorb['base_up']; check(sizes=absorb, **case)")


@pytest.mark.slow
def test_da_is_absorbed_from_narrow_tiles_too():
    """Widths of the outputs in 16s make all tiles narrow, those of X among them."""
    _passes(_ABSORB_CASE + "    del absorb['base_up']; check(sizes=absorb, **case | {'ns': (80,)})")


@pytest.mark.slow
@pytest.mark.parametrize("op", ["base_up", "dx"])
def test_slots_that_are_not_drained_between_pass_and_products_are_caught(op):
    """The interpreter sees shared memory only: too early a read of S takes a GPU to show."""
    _is_caught(
        _ABSORB_CASE
        + f"""
    _mgpu.num_sms = lambda: 1
    _mgpu.Ring.drain = lambda self, steps: None
    check(sizes={{{op!r}: absorb[{op!r}]}}, **case)
    """
    )


@pytest.mark.slow
def test_portable_products():
    _passes("""
        check(
            backend=portable, tiles=(0, -1, 1), k=128, ns=(64, 128), rank=8, rates=(0.25, 0.0),
            scales=(2.0, 0.5), padding=(3, 300), biased=True,
        )
    """)


@pytest.mark.slow
def test_three_projections_of_rank_200():
    _passes("check(races=False, tiles=(1, 0), k=64, ns=(64, 64, 64), rank=200)")


@pytest.mark.slow
def test_widths_that_are_multiples_of_16():
    _passes("check(tiles=(1, 0), k=144, ns=(80, 272), rank=24, padding=(5,), biased=True)")


@pytest.mark.slow
def test_float16_and_rows_that_fill_no_granule():
    _passes("check(tiles=(0,), tile_rows=77, k=64, ns=(64,), rank=8, dtype=jnp.float16)")


@pytest.mark.slow
def test_rank_above_64_and_few_rows_split_over_columns():
    _passes("check(races=False, tiles=(1,), k=1024, ns=(64,), rank=72)")


@pytest.mark.slow
@pytest.mark.scenario("D3")
def test_nan_in_padding_rows_goes_nowhere():
    _passes("""
        p, clean = check(tiles=(0, 1), k=64, ns=(64,), rank=8, padding=(0, 64, 200))
        rows = jnp.asarray([0, 64, 200])
        nan = p._replace(
            x=p.x.at[rows].set(jnp.nan), dys=tuple(dy.at[rows].set(jnp.nan) for dy in p.dys)
        )
        with _mgpu.interpret():
            poisoned = run(mosaic_gpu, nan)
        for one, other in zip((*clean.ss, *clean.da, *clean.db),
                              (*poisoned.ss, *poisoned.da, *poisoned.db), strict=True):
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    """)


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["take", "fill"])
@pytest.mark.scenario("D4")
def test_a_missing_wait_is_caught(broken):
    """A ring whose consumers, or whose producer, do not wait must not pass."""
    remove = {
        "take": """
            def take(self, step):
                return tuple(buffer.at[self.slot(step)] for buffer in self.buffers)
            _mgpu.Ring.take = take
        """,
        "fill": """
            def fill(self, step, sources):
                slot = self.slot(step)
                for source, buffer in zip(sources, self.buffers, strict=True):
                    _mgpu.copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])
            _mgpu.Ring.fill = fill
        """,
    }[broken]
    _is_caught(
        textwrap.dedent(remove)
        + "\ncheck(tiles=(0,), k=512, ns=(64,), rank=8, rates=(0.1,), scales=(1.0,))"
    )


_GATED = """
    from pallas_kernels.activation import gated

    def check_gated(activation="silu", races=True, nan=(), **shape):
        p = make_problem(**{"dtype": jnp.bfloat16, "tile_rows": 128} | shape)
        gate = p.x.at[jnp.asarray(nan, jnp.int32)].set(jnp.nan)
        up = make_problem(1, **{"dtype": jnp.bfloat16, "tile_rows": 128} | shape).x
        with _mgpu.interpret(detect_races=races):
            y, h, s = mosaic_gpu.forward_gated(
                gate, up, p.ws[0], p.a[0], p.b[0], p.biases[0], p.routing, activation
            )
            (want_y,), (want_s,) = mosaic_gpu.forward(h, p.ws, p.a, p.b, p.biases, p.routing)
        live = np.setdiff1d(np.arange(len(h)), nan)
        assert relative_error(h[live], gated(gate, up, activation)[live]) < 1e-4
        assert np.isnan(np.asarray(h, np.float32)[list(nan)]).all()
        np.testing.assert_array_equal(s, want_s)
        np.testing.assert_array_equal(y[live], want_y[live])
        assert np.isfinite(np.asarray(s, np.float32)).all()
"""


@pytest.mark.scenario("D4")
def test_gated_input_gives_the_bits_of_separate_kernels():
    _passes(
        _GATED + "    check_gated(tiles=(0,), k=64, ns=(64,), rank=8, rates=(0.25,), scales=(2.0,))"
    )


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_input_of_several_adapters_with_nan_in_padding(activation):
    _passes(
        _GATED
        + f"""
    check_gated(
        {activation!r}, tiles=(0, -1, 1), k=320, ns=(64,), rank=12, padding=(3, 300), nan=(3, 300),
        rates=(0.25, 0.0), biased=True,
    )
    """
    )


@pytest.mark.slow
def test_gated_input_of_few_rows_and_narrow_tiles():
    _passes(
        _GATED
        + """
    check_gated(tiles=(1,), k=1040, ns=(80,), rank=72, tile_rows=77, races=False)
    """
    )


@pytest.mark.slow
def test_h_that_is_overwritten_before_it_has_left_is_caught():
    _is_caught(
        _GATED
        + """
    _mgpu.wait_smem_to_gmem = lambda *args, **kwargs: None
    check_gated(tiles=(0,), k=2048, ns=(64,), rank=8, rates=(0.25,), scales=(2.0,))
    """
    )


_GATED_GRAD = """
    from pallas_kernels.activation import gated_gradients
    from pallas_kernels.lora.gated_grad import gated_grad
    from pallas_kernels.lora.grad_up import grad_up
    from pallas_kernels.segments import prepare
    from pallas_kernels.tuning import GatedGradTiles, GradUpTiles

    def check_grad(activation="silu", panel=128, splits=2, races=True, nan=(), **shape):
        shape = {"dtype": jnp.bfloat16, "tile_rows": 128, "k": 64} | shape
        p, other = make_problem(**shape), make_problem(1, **shape)
        (dh, up), gate = p.dys, other.dys[0].at[jnp.asarray(nan, jnp.int32)].set(jnp.nan)
        rows, tiles = gate.shape[0], p.routing.tile_adapter
        has = np.repeat(np.asarray(tiles) >= 0, rows // len(tiles))
        live = has & (np.asarray(p.routing.row_key) != 0)
        b = tuple(v.astype(dh.dtype) for v in p.b)
        ss = tuple(v[:, : b[0].shape[1]] * live[:, None].astype(v.dtype) for v in other.dys)
        with _mgpu.interpret(detect_races=races):
            table, sizes = prepare(*p.routing), (panel, 3, splits)
            dys, ds, db = gated_grad(
                gate, up, dh, b, ss, table, activation, GatedGradTiles(*sizes)
            )
            want_ds, want_db = grad_up(dys, b, ss, table, GradUpTiles(*sizes))
        finite = np.setdiff1d(np.arange(rows), nan)
        for got, want in zip(dys, gated_gradients(gate, up, dh, activation), strict=True):
            assert relative_error(got[finite], want[finite]) < 1e-4
        assert np.isnan(np.asarray(dys[0], np.float32)[list(nan)]).all()
        for i in range(2):  # the interpreter adds up in other orders
            assert relative_error(db[i], want_db[i]) < 1e-6
            assert relative_error(ds[i].sum(0)[live], want_ds[i].sum(0)[live]) < 1e-6
            assert not np.asarray(ds[i].sum(0))[has & ~live].any()
"""


@pytest.mark.slow
@pytest.mark.scenario("D4")
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gradients_of_a_gate_and_of_its_adapters(activation):
    _passes(
        _GATED_GRAD
        + f"""
    check_grad(
        {activation!r}, tiles=(0, -1, 1, 0), ns=(320, 320), rank=8, padding=(3, 300), nan=(3, 300)
    )
    """
    )


@pytest.mark.slow
def test_gradients_of_a_gate_without_adapters_and_of_one_adapter():
    _passes(
        _GATED_GRAD
        + """
    check_grad(tiles=(-1, -1, 1), ns=(64, 64), rank=24, splits=3)
    check_grad(tiles=(0, -1), ns=(64, 64), rank=8, rates=(0.1,), scales=(2.0,), splits=1)
    """
    )


@pytest.mark.slow
def test_gradients_that_are_overwritten_before_they_have_left_are_caught():
    _is_caught(
        _GATED_GRAD
        + """
    _mgpu.wait_smem_to_gmem = lambda *args, **kwargs: None
    check_grad(tiles=(0, 0, 0), ns=(128, 128), rank=8, splits=1)
    """
    )
