"""The kernels on a GPU with little left to do, or much that is wrong: what the spec says."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.lora import mosaic_gpu, spec
from tests.kernels.oracle import Problem, errors, fast_truth, make_problem, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a CUDA device"),
]
BACKEND = mosaic_gpu if jax.default_backend() == "gpu" else spec
step = jax.jit(partial(run, BACKEND))


def problem() -> Problem:
    return make_problem(
        dtype=jnp.bfloat16, tiles=(0, 1, 0, 1), tile_rows=128, k=256, ns=(192,), rank=16
    )


def routed(p: Problem, **changes) -> Problem:
    return p._replace(routing=p.routing._replace(**changes))


@pytest.mark.scenario("D2")
def test_every_pattern_of_empty_tiles():
    """One program for all: which adapter a tile has is data."""
    p = problem()
    for pattern in itertools.product((0, 1, -1), repeat=4):
        q = routed(p, tile_adapter=jnp.asarray(pattern, jnp.int32))
        found = step(q)
        assert max(errors(found, fast_truth(q)).values()) < 0.02, pattern
        for slot in {0, 1} - {*pattern}:
            assert not np.any(found.da[0][slot]) and not np.any(found.db[0][slot]), pattern


@pytest.mark.scenario("D6")
@pytest.mark.parametrize("factor", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("scale", [1 / 64, 64.0])
def test_no_overflow_where_the_specification_has_none(factor, scale):
    p = problem()
    q = routed(p, scale=jnp.full(2, scale, jnp.float32))
    q = q._replace(x=q.x * jnp.bfloat16(factor), dys=tuple(d * jnp.bfloat16(1) for d in q.dys))
    assert max(errors(step(q), fast_truth(q)).values()) < 0.02


@pytest.mark.scenario("D6")
def test_sums_are_in_float32():
    """4,096 ones: sums in bfloat16 would stop at 256, where adding 1 changes nothing."""
    p = make_problem(
        dtype=jnp.bfloat16, tiles=(0,), tile_rows=128, k=4096, ns=(64,), rank=8, rates=(0.0,),
        scales=(1.0,),
    )  # fmt: skip
    ones = p._replace(
        x=jnp.ones_like(p.x), ws=(jnp.ones_like(p.ws[0]),), b=(jnp.zeros_like(p.b[0]),)
    )
    np.testing.assert_array_equal(np.asarray(step(ones).ys[0], np.float32), 4096)


@pytest.mark.scenario("D8")
@pytest.mark.parametrize("slot", [2, 1000, -2, -(2**31)])
def test_a_slot_that_is_not_there_changes_no_other_rows(slot):
    """Such ids are data, known on the device only: other rows keep their bits, nothing crashes."""
    p = problem()
    good = step(p)
    bad = step(routed(p, tile_adapter=p.routing.tile_adapter.at[0].set(slot)))
    for one, other in ((good.ys[0], bad.ys[0]), (good.dx, bad.dx)):
        np.testing.assert_array_equal(np.asarray(one[128:]), np.asarray(other[128:]))
