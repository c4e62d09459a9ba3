"""Every kernel, as shipped, gets through Mosaic's compiler for an H100 on a machine without one."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _mgpu, tables
from pallas_kernels.lora import mosaic_gpu
from pallas_kernels.tuning import GemmTiles
from tests.kernels import shipped
from tests.kernels.shipped import S, arguments, both

PROGRAMS = shipped.programs()
QUICK = (
    "single",
    "grouped, rank 24",
    "few rows",
    "ragged rows",
    "widths in 16s",
    "candidates 1",
    "mlp, gelu",
    "norm",
    "portable 10.0, rank 200",
)
PORTABLE = ("lora_portable_base_up", "lora_portable_dx")
ABSORBED = {"lora_down": "lora_base_up_with_s", "lora_grad_down": "lora_dx_with_da"}
KERNELS = ("lora_down", "lora_base_up", "lora_grad_up", "lora_grad_down", "lora_dx")


def _lower(function, operands, capability=_mgpu.HOPPER):
    with shipped.lowering_for(capability):
        traced = jax.jit(lambda *a: function(*a)).trace(*operands)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in PROGRAMS],
)
@pytest.mark.scenario("D10")
def test_lowers_for_hopper(name):
    capability, function, operands = PROGRAMS[name]
    text = _lower(function, operands, capability)
    kernels = PORTABLE if "portable" in name else ("norm_grad",) if "norm" in name else KERNELS
    fused = ("lora_gated_down", "lora_gated_grad")[: 1 if "rank " in name else 2]  # over 32 ranks
    for kernel in (*kernels, *(fused if "mlp" in name else ())):
        assert kernel in text or ABSORBED.get(kernel, kernel) in text


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 520}, "in=520"),
        ({"ns": (264,)}, r"out\[0\]=264"),
        ({"rank": 257}, "rank 257"),
    ],
)
def test_says_what_it_cannot_do(change, reason):
    case = {"rows": 256, "k": 256, "ns": (256,), "rank": 16, "slots": 1} | change
    with pytest.raises(NotImplementedError, match=reason):
        _lower(both, arguments(**case))


@pytest.mark.scenario("D9")
def test_needs_hopper_and_half_precision_and_tiles_of_128():
    operands = arguments(256, 256, (256,), 16, 1)
    with pytest.raises(NotImplementedError, match=r"compute capability"):
        jax.eval_shape(lambda *a: both(*a), *operands)
    with pytest.raises(NotImplementedError, match="float32"):
        _lower(both, jax.tree.map(lambda v: S(v.shape, jnp.float32), operands))
    tiles = operands[5]._replace(tile_adapter=S((4,), jnp.int32))
    with pytest.raises(NotImplementedError, match="tiles of 64 rows"):
        _lower(both, (*operands[:5], tiles, operands[6]))


@pytest.mark.parametrize(
    ("group", "rank", "sizes"), [(3, 200, [1, 1, 1]), (3, 128, [2, 1]), (3, 16, [3]), (1, 256, [1])]
)
def test_down_takes_groups_above_256_ranks_apart(group, rank, sizes):
    assert [len(range(group)[part]) for part in mosaic_gpu._parts(group, rank, 256)] == sizes


@pytest.mark.slow
def test_under_vmap_s_is_not_absorbed():
    """Blocks of different calls would share flags, and not all of them run at the same time."""
    case = tuple(
        jax.tree.map(lambda v: S((3, *v.shape), v.dtype), operand)
        for operand in arguments(256, 128, (128,), 16, 1)
    )
    with tables.using(base_up=GemmTiles("m", absorb=True), dx=GemmTiles(absorb=True)):
        text = _lower(jax.vmap(both), case)
    assert "lora_down" in text and "with_s" not in text and "with_da" in text


def test_equal_calls_share_one_kernel():
    """Layers of one shape cost one lowering; other tile sizes get a kernel of their own."""
    operands = arguments(rows=256, k=256, ns=(256,), rank=16, slots=1)

    def twice(x, *rest):
        return both(x, *rest), both(2 * x, *rest)

    def with_other_sizes(*args):
        first = both(*args)
        with tables.using(base_up=GemmTiles("n", minor="n", width=8)):
            return first, both(*args)

    once, shared, apart = (
        _lower(function, operands).count("mosaic_gpu_v2")
        for function in (both, twice, with_other_sizes)
    )
    assert 0 < once == shared < apart
