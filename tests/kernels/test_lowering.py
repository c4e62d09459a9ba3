"""Every kernel, as shipped, gets through Mosaic's compiler for an H100 on a machine without one."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import _mgpu
from pallas_kernels.lora import mosaic_gpu
from pallas_kernels.lora.spec import Routing

S = jax.ShapeDtypeStruct
CASES = {
    "single": (8192, 4096, (4096,), 16, 1),
    "rank 64, 8 adapters": (8192, 4096, (14336,), 64, 8),
    "grouped": (8192, 4096, (4096, 1024, 1024), 16, 4),
    "grouped, rank 24": (1024, 576, (576, 192, 192), 24, 2),
    "grouped, rank 64": (8192, 4096, (14336, 14336), 64, 2),
    "rank 200": (2048, 320, (640,), 200, 2),
    "grouped, rank 128": (2048, 4096, (4096, 4096), 128, 2),
    "few rows": (8, 8, (8,), 1, 1),
    "ragged rows": (1000, 256, (192,), 16, 1),
}


def _arguments(rows, k, ns, rank, slots):
    f32, tiles = jnp.float32, max(1, rows // 128) if rows % 128 == 0 else 1
    routing = Routing(
        S((slots,), f32), S((slots,), f32), S((tiles,), jnp.int32), S((rows,), jnp.uint32),
        S((1,), jnp.uint32),
    )  # fmt: skip
    return (
        S((rows, k), jnp.bfloat16),
        tuple(S((k, n), jnp.bfloat16) for n in ns),
        tuple(S((slots, rank, k), f32) for _ in ns),
        tuple(S((slots, rank, n), f32) for n in ns),
        tuple(S((rows, rank), jnp.bfloat16) for _ in ns),
        routing,
        tuple(S((rows, n), jnp.bfloat16) for n in ns),
    )


def _both(x, ws, a, b, ss, routing, dys):
    biases = tuple(jnp.zeros(w.shape[1], x.dtype) for w in ws)
    return (
        mosaic_gpu.forward(x, ws, a, b, biases, routing),
        mosaic_gpu.backward(x, ws, a, b, ss, routing, dys),
    )


def _lower(*arguments):
    with _mgpu.lower_for_hopper():
        traced = jax.jit(lambda *a: _both(*a)).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


QUICK = ("single", "grouped, rank 24", "rank 200", "few rows")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
@pytest.mark.scenario("D10")
def test_lowers_for_hopper(case):
    text = _lower(*_arguments(*case))
    kernels = ("lora_down", "lora_base_up", "lora_grad_up", "lora_grad_down", "lora_dx")
    assert all(name in text for name in kernels)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"k": 520}, "in=520"),
        ({"ns": (264,)}, r"out\[0\]=264"),
        ({"rank": 257}, "320 ranks"),
        ({"rank": 72, "ns": (64, 64, 64)}, "384 ranks"),
        ({"rows": 4}, "4 rows"),
    ],
)
def test_says_what_it_cannot_do(change, reason):
    case = {"rows": 256, "k": 256, "ns": (256,), "rank": 16, "slots": 1} | change
    with pytest.raises(NotImplementedError, match=reason):
        _lower(*_arguments(**case))


@pytest.mark.scenario("D9")
def test_needs_hopper_and_half_precision_and_tiles_of_128():
    arguments = _arguments(256, 256, (256,), 16, 1)
    with pytest.raises(NotImplementedError, match=r"compute capability 9\.0"):
        jax.eval_shape(lambda *a: _both(*a), *arguments)
    with pytest.raises(NotImplementedError, match="float32"):
        _lower(*jax.tree.map(lambda v: S(v.shape, jnp.float32), arguments))
    tiles = arguments[5]._replace(tile_adapter=S((4,), jnp.int32))
    with pytest.raises(NotImplementedError, match="tiles of 64 rows"):
        _lower(*arguments[:5], tiles, arguments[6])
