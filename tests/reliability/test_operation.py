"""Magnitudes, wrong calls, devices that are not there: the fused operation in unfriendly hands."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import fused_multi_lora
from pallas_kernels.lora import spec
from tests.kernels.oracle import errors, make_problem, run, truth

# As users call it: without the checks of shapes and dtypes that tests add to every function.
bare = inspect.unwrap(fused_multi_lora)
fused = partial(bare, implementation="xla")


@pytest.mark.scenario("D6")
@settings(max_examples=25)
@given(
    st.floats(-4, 4), st.floats(-2, 2), st.sampled_from([1 / 64, 1 / 8, 1.0, 8.0, 64.0]), st.data()
)
def test_no_magnitude_costs_accuracy(x_power, weight_power, scale, data):
    dtype = data.draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    p = make_problem(scales=(scale, 1.0), dtype=dtype)
    p = p._replace(
        x=(p.x * 10.0**x_power).astype(dtype),
        a=tuple(v * 10.0**weight_power for v in p.a),
        b=tuple(v * 10.0**-weight_power for v in p.b),
    )
    limit = 2e-6 if dtype == jnp.float32 else 2e-2
    found = errors(run(spec, p), truth(p))
    assert max(found.values()) < limit, found


@pytest.mark.scenario("D6")
def test_sums_are_accumulated_in_float32():
    """Large terms that cancel: in bfloat16 the small one would be lost."""
    k = 256
    x = np.full((8, k), 256.0, np.float32)
    x[:, 1::2] = -256.0
    x[:, 0] += 2.0  # representable, and all that is left of the sum
    p = make_problem(tiles=(-1,), k=k, ns=(8,), dtype=jnp.bfloat16)
    p = p._replace(x=jnp.asarray(x, jnp.bfloat16), ws=(jnp.ones((k, 8), jnp.bfloat16),))
    np.testing.assert_array_equal(np.asarray(run(spec, p).ys[0], np.float32), 2.0)
    total = jnp.bfloat16(0)
    for value in p.x[0, ::-1]:  # the twin
        total = (total + value).astype(jnp.bfloat16)
    assert total != 2 or jnp.cumsum(p.x[0].astype(jnp.bfloat16))[-1] == 2


def calls():
    p = make_problem(ns=(40, 24))
    args = dict(
        zip(
            ("x", "ws", "a", "b", "scale", "rate", "tile_adapter", "row_key", "site"),
            (p.x, p.ws, p.a, p.b, *p.routing),
            strict=True,
        )
    )
    first = lambda key, change: (change(args[key][0]), *args[key][1:])  # noqa: E731
    return args, {
        "rows that fill no tile": ({"x": p.x[:-1], "row_key": p.routing.row_key[:-1]}, "tiles"),
        "dtype of w": ({"ws": first("ws", lambda w: w.astype(jnp.bfloat16))}, r"ws\[0\]\.dtype"),
        "rows of w": ({"ws": first("ws", lambda w: w[:-1])}, r"ws\[0\]\.shape"),
        "columns of a": ({"a": first("a", lambda a: a[..., :-1])}, r"a\[0\]"),
        "columns of b": ({"b": first("b", lambda b: b[..., :-1])}, r"b\[0\]"),
        "ranks that differ": ({"a": first("a", lambda a: a[:, :-1])}, "slots or rank"),
        "slots that differ": ({"b": first("b", lambda b: b[:-1])}, "slots or rank"),
        "projections missing": ({"a": p.a[:1]}, "one entry per projection"),
        "scale of other slots": ({"scale": p.routing.scale[:1]}, "scale"),
        "rate of other slots": ({"rate": jnp.zeros(5)}, "rate"),
        "keys of other rows": ({"row_key": p.routing.row_key[:-1]}, "row_key"),
        "signed keys": ({"row_key": p.routing.row_key.astype(jnp.int32)}, "row_key"),
        "ids that are no integers": (
            {"tile_adapter": p.routing.tile_adapter.astype(jnp.float32)},
            "tile_adapter",
        ),
        "two sites": ({"site": jnp.zeros(2, jnp.uint32)}, "site"),
        "unknown implementation": ({"implementation": "cuda"}, "implementation"),
    }


@pytest.mark.scenario("D8")
@pytest.mark.parametrize("name", calls()[1])
def test_wrong_calls_name_the_argument_when_traced(name):
    args, wrong = calls()
    change, words = wrong[name]
    call = {"implementation": "xla", **args, **change}
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: bare(**call))
    jax.eval_shape(lambda: bare(**{**args, "implementation": "xla"}))


@pytest.mark.scenario("D8")
@pytest.mark.parametrize("slot", [2, 1000, -2, -(2**31)])
def test_a_slot_that_is_not_there_reads_no_other_memory(slot):
    """Such ids are data, known on the device only: other rows keep their bits, nothing crashes."""
    p = make_problem()
    wrong = p._replace(
        routing=p.routing._replace(tile_adapter=p.routing.tile_adapter.at[0].set(slot))
    )
    good, bad = run(spec, p), run(spec, wrong)
    np.testing.assert_array_equal(good.ys[0][8:], bad.ys[0][8:])
    np.testing.assert_array_equal(good.dx[8:], bad.dx[8:])


@pytest.mark.scenario("D9")
def test_without_a_gpu_the_default_is_xla_and_the_kernels_say_why():
    p = make_problem()
    args = (p.x, p.ws, p.a, p.b, *p.routing)
    np.testing.assert_array_equal(bare(*args)[0], fused(*args)[0])
    with pytest.raises(ExceptionGroup) as refused:
        bare(*args, implementation="mosaic_gpu")
    assert all(isinstance(e, NotImplementedError) for e in refused.value.exceptions)
