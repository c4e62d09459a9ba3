"""The programs that ship, as functions and abstract arguments, to be compiled for a GPU."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mosaic_utils

from pallas_kernels import _mgpu, fused_gated_mlp, tables
from pallas_kernels.lora import mosaic_gpu, portable
from pallas_kernels.lora.spec import Routing
from pallas_kernels.norm_grad import norm_grad
from pallas_kernels.tuning import Shape, candidates

S = jax.ShapeDtypeStruct
CASES = {  # rows, in, outs, rank, slots
    "single": (8192, 4096, (4096,), 16, 1),
    "rank 64, 8 adapters": (8192, 4096, (14336,), 64, 8),
    "grouped": (8192, 4096, (4096, 1024, 1024), 16, 4),
    "grouped, rank 24": (1024, 576, (576, 192, 192), 24, 2),
    "grouped, rank 64": (8192, 4096, (14336, 14336), 64, 2),
    "widths in 16s": (256, 144, (80, 336), 24, 2),
    "rank 200": (2048, 320, (640,), 200, 2),
    "grouped, rank 128": (2048, 4096, (4096, 4096), 128, 2),
    "grouped, rank 200": (384, 320, (640, 64, 64), 200, 2),
    "few rows": (8, 8, (8,), 1, 1),
    "ragged rows": (1001, 256, (192,), 16, 1),
}

MLPS = {  # rows, in, inner, rank, slots
    "mlp": (8192, 4096, 14336, 16, 1),
    "mlp, rank 64, 8 adapters": (2048, 4096, 14336, 64, 8),
    "mlp, 32 ranks": (8192, 4096, 14336, 32, 1),
    "mlp, 32 ranks, 8 adapters": (1024, 512, 1216, 32, 8),
    "mlp, rank 200": (384, 320, 640, 200, 2),
    "mlp, widths in 16s": (1000, 144, 336, 24, 1),
}

NORMS = {"norm": (8192, 4096), "norm, widest": (1000, 8192), "norm, 768": (8, 768)}

# Cases in which a temporary of an activation's size would show.
MODEL_SIZED = ("single", "grouped", "grouped, rank 64", "rank 64, 8 adapters")


def arguments(rows, k, ns, rank, slots, dtype=jnp.bfloat16):
    """Abstract operands of a forward and a backward pass."""
    f32, tiles = jnp.float32, max(1, rows // 128) if rows % 128 == 0 else 1
    routing = Routing(
        S((slots,), f32), S((slots,), f32), S((tiles,), jnp.int32), S((rows,), jnp.uint32),
        S((1,), jnp.uint32),
    )  # fmt: skip
    return (
        S((rows, k), dtype),
        tuple(S((k, n), dtype) for n in ns),
        tuple(S((slots, rank, k), f32) for _ in ns),
        tuple(S((slots, rank, n), f32) for n in ns),
        tuple(S((rows, rank), dtype) for _ in ns),
        routing,
        tuple(S((rows, n), dtype) for n in ns),
    )


def both(x, ws, a, b, ss, routing, dys):
    """Forward and backward, with a bias."""
    biases = tuple(jnp.zeros(w.shape[1], x.dtype) for w in ws)
    return (
        mosaic_gpu.forward(x, ws, a, b, biases, routing),
        mosaic_gpu.backward(x, ws, a, b, ss, routing, dys),
    )


def mlp_arguments(rows, k, inner, rank, slots, dtype=jnp.bfloat16):
    """Abstract operands of a feed-forward block, and the gradient of its output."""
    x, ws, a, b, _, routing, _ = arguments(rows, k, (inner, inner), rank, slots, dtype)
    _, w, a_out, b_out, *_ = arguments(rows, inner, (k,), rank, slots, dtype)
    return x, ws + w, a + a_out, b + b_out, routing, x


def mlp(x, ws, a, b, routing, dy, *, activation="silu"):
    """Forward and backward of a feed-forward block by the fused kernels."""
    biases = tuple(jnp.zeros(w.shape[1], x.dtype) for w in ws)

    def block(x, a, b):
        return fused_gated_mlp(
            x, ws, a, b, *routing[:4], (routing.site, routing.site + jnp.uint32(1)),
            biases=biases, activation=activation, implementation="mosaic_gpu",
        )  # fmt: skip

    y, pull = jax.vjp(block, x, a, b)
    return y, pull(dy)


def norm_arguments(rows, k, dtype=jnp.bfloat16):
    """Abstract operands of a norm's gradient."""
    return (*(S((rows, k), dtype) for _ in range(3)), S((k,), dtype))


def with_atomics(*arguments):
    """The same with atomic sums for dA and dB."""
    with tables.atomic_gradients():
        return both(*arguments)


def _with_sizes(sizes):
    def program(*arguments):
        with tables.using(**sizes):
            return both(*arguments)

    return program


def portable_both(x, ws, a, b, ss, routing, dys):
    """Forward and backward of the portable kernels."""
    biases = tuple(jnp.zeros(w.shape[1], x.dtype) for w in ws)
    return (
        portable.forward(x, ws, a, b, biases, routing),
        portable.backward(x, ws, a, b, ss, routing, dys),
    )


@contextlib.contextmanager
def lowering_for(capability: tuple[int, int]):
    """Makes Mosaic, and our dispatch, compile for a GPU that is not here."""
    inferred = mosaic_utils._infer_arch
    other = capability != _mgpu.HOPPER
    if other:
        jax.clear_caches()  # they know nothing of the capability
    mosaic_utils._infer_arch = lambda: capability
    try:
        with _mgpu.lower_for(capability):
            yield
    finally:
        mosaic_utils._infer_arch = inferred
        if other:
            jax.clear_caches()


def programs() -> dict[str, tuple]:
    """Compute capability, function and arguments of every program, by name."""
    hopper = _mgpu.HOPPER
    found = {name: (hopper, both, arguments(*case)) for name, case in CASES.items()}
    found |= {name: (hopper, mlp, mlp_arguments(*case)) for name, case in MLPS.items()}
    found |= {
        name: (hopper, partial(norm_grad, eps=1e-5), norm_arguments(*case))
        for name, case in NORMS.items()
    }
    gelu = partial(mlp, activation="gelu_tanh")
    found["mlp, gelu"] = (hopper, gelu, mlp_arguments(1024, 512, 1024, 16, 2))
    found["float16"] = (hopper, both, arguments(256, 512, (256,), 16, 2, dtype=jnp.float16))
    found["atomic"] = (hopper, with_atomics, arguments(*CASES["grouped, rank 24"]))
    case = (1024, 512, (512,), 16, 2)
    shape = Shape(1024, 512, (512,), 16)
    forward, backward = candidates("base_up", shape), candidates("dx", shape)
    for index, dx in enumerate(backward):
        program = _with_sizes({"base_up": forward[index], "dx": dx})
        found[f"candidates {index}"] = (hopper, program, arguments(*case))
    for capability in portable.CAPABILITIES:
        name = "portable {}.{}".format(*capability)
        found[name] = (capability, portable_both, arguments(1024, 512, (512, 192), 16, 2))
        found[f"{name}, rank 200"] = (capability, portable_both, arguments(128, 256, (64,), 200, 2))
    return found
