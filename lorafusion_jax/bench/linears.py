"""The LoRA linears that the kernel benchmarks compare, as forward and backward functions."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import fused_multi_lora
from pallas_kernels.dropout import keep_mask, keep_scale


class Case(NamedTuple):
    """One shape of a (group of) LoRA linear(s).

    Attributes:
        tokens: rows.
        k: inputs.
        ns: outputs of each projection that shares the inputs.
        r: rank.
        p: dropout rate.
        adapters: slots that the rows are dealt to, in equal contiguous stretches.
    """

    tokens: int
    k: int
    ns: tuple[int, ...]
    r: int = 16
    p: float = 0.1
    adapters: int = 1


class Operands(NamedTuple):
    """Arrays of a case. `args` are those of `fused_multi_lora` after the weights."""

    x: Array
    ws: tuple[Array, ...]
    a: tuple[Array, ...]
    b: tuple[Array, ...]
    routing: tuple[Array, ...]
    dys: tuple[Array, ...]


def make_operands(case: Case, seed: int) -> Operands:
    """Returns random bfloat16 activations and weights, and float32 adapters."""
    keys = iter(jax.random.split(jax.random.key(seed), 3 + 4 * len(case.ns)))

    def normal(shape, scale=1.0, dtype=jnp.bfloat16):
        return (jax.random.normal(next(keys), shape, dtype) * scale).astype(dtype)

    e, f32 = case.adapters, jnp.float32
    tiles = case.tokens // 128
    routing = (
        jnp.full((e,), 2.0, f32),
        jnp.full((e,), case.p, f32),
        jnp.asarray(np.arange(tiles) * e // tiles, jnp.int32),
        jax.random.bits(next(keys), (case.tokens,), jnp.uint32) | jnp.uint32(1),
        jnp.full((1,), 7, jnp.uint32),
    )
    return Operands(
        normal((case.tokens, case.k)),
        tuple(normal((case.k, n), case.k**-0.5) for n in case.ns),
        tuple(normal((e, case.r, case.k), case.k**-0.5, f32) for _ in case.ns),
        tuple(normal((e, case.r, n), case.r**-0.5, f32) for n in case.ns),
        routing,
        tuple(normal((case.tokens, n)) for n in case.ns),
    )


def _rows(o: Operands, per_slot: Array) -> Array:
    return jnp.repeat(per_slot[o.routing[2]], 128)


def frozen(o: Operands) -> tuple:
    """X W: what the frozen model costs."""
    return tuple(o.x @ w for w in o.ws)


def xla_naive(o: Operands) -> tuple:
    """The formula as written in a LoRA tutorial: jax.random dropout, two products, a sum."""
    scale, rate = o.routing[:2]
    x = o.x
    if o.dys and rate.size:
        keep = jax.random.bernoulli(jax.random.key(o.routing[4][0]), 1 - rate[0], x.shape)
        x = jnp.where(keep, x / (1 - rate[0]).astype(x.dtype), jnp.zeros((), x.dtype))
    slots, e = _rows(o, jnp.arange(scale.shape[0])), scale.shape[0]
    ys = []
    for w, a, b in zip(o.ws, o.a, o.b, strict=True):
        a, b = a.astype(x.dtype), b.astype(x.dtype)
        if e == 1:
            lora = (x @ a[0].T) @ b[0]
        else:
            mine = jax.nn.one_hot(slots, e, dtype=x.dtype)
            lora = jnp.einsum("te,tr,ern->tn", mine, jnp.einsum("tk,erk,te->tr", x, a, mine), b)
        ys.append(o.x @ w + scale[0].astype(x.dtype) * lora)
    return tuple(ys)


def _flat(stack: Array, dtype) -> Array:
    return stack.reshape(-1, stack.shape[2]).astype(dtype)


def _best_parts(o: Operands):
    """Dropped input, mask factor, and the slot mask over all ranks of all slots."""
    scale, rate = o.routing[:2]
    row_rate = _rows(o, rate)
    keep = keep_mask(o.routing[3], o.routing[4], row_rate, o.x.shape[1])
    factor = jnp.where(keep, keep_scale(row_rate)[:, None], 0).astype(o.x.dtype)
    slots = _rows(o, jnp.arange(scale.shape[0]))
    mine = jax.nn.one_hot(slots, scale.shape[0], dtype=jnp.float32) * scale[slots][:, None]
    return factor, jnp.repeat(mine, o.a[0].shape[1], axis=1)


@jax.custom_vjp
def xla_best(o: Operands) -> tuple:
    """The best XLA formula: hashed mask, made again in the backward; one product of all ranks."""
    return _best_fwd(o)[0]


def _best_fwd(o: Operands):
    factor, mine = _best_parts(o)
    dropped = o.x * factor
    ss = [
        (jnp.matmul(dropped, _flat(a, o.x.dtype).T, preferred_element_type=jnp.float32) * mine)
        for a in o.a
    ]
    ss = [s.astype(o.x.dtype) for s in ss]
    ys = tuple(o.x @ w + s @ _flat(b, o.x.dtype) for w, s, b in zip(o.ws, ss, o.b, strict=True))
    return ys, (o, ss)


def _best_bwd(residuals, dys):
    o, ss = residuals
    factor, mine = _best_parts(o)
    dropped, f32 = o.x * factor, jnp.float32
    dx_lora, dx, das, dbs = 0.0, 0.0, [], []
    for w, a, b, s, dy in zip(o.ws, o.a, o.b, ss, dys, strict=True):
        ds = jnp.matmul(dy, _flat(b, dy.dtype).T, preferred_element_type=f32) * mine
        ds = ds.astype(dy.dtype)
        dbs.append(jnp.matmul(s.T, dy, preferred_element_type=f32).reshape(b.shape))
        das.append(jnp.matmul(ds.T, dropped, preferred_element_type=f32).reshape(a.shape))
        dx_lora = dx_lora + ds @ _flat(a, dy.dtype)
        dx = dx + dy @ w.T
    nothing = jax.tree.map(lambda _: None, o)
    return (nothing._replace(x=dx + factor * dx_lora, a=tuple(das), b=tuple(dbs)),)


xla_best.defvjp(_best_fwd, _best_bwd)


def ours(o: Operands) -> tuple:
    """The fused kernels."""
    return fused_multi_lora(o.x, o.ws, o.a, o.b, *o.routing, implementation="mosaic_gpu")


IMPLEMENTATIONS: dict[str, Callable[[Operands], tuple]] = {
    "frozen": frozen,
    "xla_naive": xla_naive,
    "xla_best": xla_best,
    "ours": ours,
}


def _differentiated(implementation: Callable, o: Operands):
    """Outputs and pullback with respect to what a training step differentiates."""

    def outputs(x, a, b):
        return implementation(o._replace(x=x, a=a, b=b))

    return jax.vjp(outputs, o.x, o.a, o.b)


# XLA would join the frozen products that share an input by copying their weights side by side in
# every call, and cut the results apart: slower than the products alone, so no floor.
SEPARATE_PRODUCTS = {"xla_gpu_dot_merger_threshold_mb": 0}


def passes(name: str) -> dict[str, Callable]:
    """Returns jitted `fwd` (with what backward needs), `bwd` and `fwdbwd` of an implementation.

    `bwd` takes the second result of `fwd` and the operands.
    """
    implementation = IMPLEMENTATIONS[name]
    on_gpu = jax.default_backend() == "gpu"
    jit = partial(jax.jit, compiler_options=SEPARATE_PRODUCTS if on_gpu else None)

    @jit
    def fwd(o):
        return _differentiated(implementation, o)

    @jit
    def bwd(pullback, o):
        grads = pullback(o.dys)
        return grads[0] if name == "frozen" else grads

    @jit
    def fwdbwd(o):
        ys, pullback = _differentiated(implementation, o)
        grads = pullback(o.dys)
        return (ys, grads[0]) if name == "frozen" else (ys, grads)

    return {"fwd": fwd, "bwd": bwd, "fwdbwd": fwdbwd}
