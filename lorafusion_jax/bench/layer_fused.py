"""Times the kernels that do an element-wise pass and a LoRA pass at once, each alone.

A row's `ms` counts the kernels that read or write an activation of the model, but for the large
products; what is left out is the same on both sides. `gated_grad` counts what follows from it as
well: dA, unless a product absorbs it, and the sums of the parts of dS and dB.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from lorafusion_jax.bench.profile import class_of
from lorafusion_jax.bench.timing import kernel_times
from lorafusion_jax.models.fused import norm_gradient
from pallas_kernels.activation import gated, gated_gradients
from pallas_kernels.lora import mosaic_gpu
from pallas_kernels.lora.spec import Routing
from pallas_kernels.norm_grad import norm_grad

if TYPE_CHECKING:
    from lorafusion_jax.bench.layer import Bench

_COUNTED_US = 4.0  # shorter kernels are tables and casts, the same on both sides


class _Pair(NamedTuple):
    """A fused kernel and what it stands for: functions of the same arguments.

    Attributes:
        fused: with one kernel for both passes.
        apart: with one for each.
        arguments: of both.
        moved: bytes that must be read and written.
    """

    fused: Callable
    apart: Callable
    arguments: tuple
    moved: int


def _routing(bench: "Bench") -> Routing:
    """All adapters take turns, each with the same rows."""
    options = bench.options
    tiles, ones = bench.tokens // options.tile, jnp.ones(options.adapters, jnp.float32)
    slots = jnp.arange(tiles, dtype=jnp.int32) * options.adapters // tiles
    keys = jnp.arange(1, bench.tokens + 1, dtype=jnp.uint32)
    return Routing(2 * ones, options.p * ones, slots, keys, jnp.full((1,), 3, jnp.uint32))


def _stack(bench: "Bench", columns: int):
    return bench.normal(bench.options.adapters, bench.options.r, columns, scale=0.02)


def _gated_down(bench: "Bench") -> _Pair:
    hidden, inner = bench.config.hidden_size, bench.config.intermediate_size
    gate, up = (bench.normal(bench.tokens, inner) for _ in range(2))
    w, activation = bench.normal(inner, hidden, scale=inner**-0.5), bench.config.activation

    def fused(gate, up, w, a, b, routing):
        return mosaic_gpu.forward_gated(gate, up, w, a, b, None, routing, activation)

    def apart(gate, up, w, a, b, routing):
        h: jax.Array = gated(gate, up, activation)  # pyright: ignore[reportAssignmentType]
        ys, ss = mosaic_gpu.forward(h, (w,), (a,), (b,), (None,), routing)
        return ys[0], h, ss[0]

    arguments = (gate, up, w, _stack(bench, inner), _stack(bench, hidden), _routing(bench))
    return _Pair(fused, apart, arguments, 3 * gate.nbytes)


def _gated_grad(bench: "Bench") -> _Pair:
    hidden, inner = bench.config.hidden_size, bench.config.intermediate_size
    gate, up, dh = (bench.normal(bench.tokens, inner) for _ in range(3))
    x, activation = bench.normal(bench.tokens, hidden), bench.config.activation
    ws = tuple(bench.normal(hidden, inner, scale=hidden**-0.5) for _ in range(2))
    a = tuple(_stack(bench, hidden) for _ in range(2))
    b = tuple(_stack(bench, inner) for _ in range(2))
    ss = tuple(bench.normal(bench.tokens, bench.options.r) for _ in range(2))

    def fused(x, ws, a, b, ss, routing, given):
        return mosaic_gpu.backward_gated(x, ws, a, b, ss, routing, given, activation)

    def apart(x, ws, a, b, ss, routing, given):
        gate, up, dh = given
        dys = gated_gradients(gate, up, dh, activation)
        return mosaic_gpu.backward(x, ws, a, b, ss, routing, dys)

    arguments = (x, ws, a, b, ss, _routing(bench), (gate, up, dh))
    return _Pair(fused, apart, arguments, 5 * gate.nbytes)


def _norm_grad(bench: "Bench") -> _Pair:
    hidden = bench.config.hidden_size
    x, dy, beside = (bench.normal(bench.tokens, hidden) for _ in range(3))
    weight, inverse = jnp.ones(hidden, x.dtype), jnp.ones((bench.tokens, 1), jnp.float32)

    def fused(x, dy, beside, weight, inverse):
        del inverse  # the kernel makes it while it has the row
        return norm_grad(x, dy, beside, weight, bench.config.rms_norm_eps)

    def apart(x, dy, beside, weight, inverse):
        return beside + norm_gradient(x, weight, inverse, dy)

    return _Pair(fused, apart, (x, dy, beside, weight, inverse), 4 * x.nbytes)


_PAIRS: dict[str, Callable[["Bench"], _Pair]] = {
    "gated_down": _gated_down,
    "gated_grad": _gated_grad,
    "norm_grad": _norm_grad,
}


def _passes(times: list[tuple[str, float]]) -> dict[str, float]:
    """Microseconds of each memory-bound pass by kernel name; no products, no small kernels."""
    passes: dict[str, float] = {}
    for name, us in times:
        if class_of(name) in ("lora", "elementwise", "copy") and us >= _COUNTED_US:
            passes[name] = passes.get(name, 0.0) + us
    return passes


def fused_rows(bench: "Bench") -> list[dict]:
    """Two rows per fused kernel, `<name>` and `<name>_apart`; prints what each consists of."""
    rows = []
    for name, make in _PAIRS.items():
        pair, found = make(bench), {}
        for impl, function in ((f"{name}_apart", pair.apart), (name, pair.fused)):
            found[impl] = _passes(kernel_times(jax.jit(function), pair.arguments))
        floor = sum(found[f"{name}_apart"].values()) / 1e3
        for impl, passes in found.items():
            us = sum(passes.values())
            share = pair.moved / max(us, 1e-9) / 1e6
            row = bench.row(impl, us / 1e3, floor, part="fused", us=round(us, 2), tb_per_s=share)
            # These count the work of a whole layer.
            rows.append({k: v for k, v in row.items() if k not in ("tokens_per_s", "mfu")})
            kernels = "  ".join(f"{kernel[:40]} {value:.1f}" for kernel, value in passes.items())
            print(f"fused      {impl:<18} {us:8.1f} us {us / 1e3 / floor:7.3f}  {share:.2f} TB/s")
            print(f"             {kernels}", flush=True)
    return rows
