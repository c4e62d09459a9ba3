"""Problems for the fused feed-forward block, and their truth put together from that of linears."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import fused_gated_mlp, fused_multi_lora
from pallas_kernels.activation import Activation, gated, gated_gradients
from tests.kernels.oracle import Problem, make_problem, relative_error, truth


class Mlp(NamedTuple):
    """Gate and up as one problem, down as another, whose own x is not used."""

    into: Problem
    outof: Problem
    activation: Activation

    def operands(self):
        """Gate, up and down in the order of `fused_gated_mlp`: weights, A, B and biases."""
        return tuple(
            getattr(self.into, name) + getattr(self.outof, name)
            for name in ("ws", "a", "b", "biases")
        )

    def sites(self):
        """Of the block's input and of down's."""
        return self.into.routing.site, self.outof.routing.site


class Results(NamedTuple):
    """Everything that a block and its gradient give."""

    y: jax.Array
    dx: jax.Array
    da: tuple
    db: tuple


def make_mlp(*, k=48, inner=64, n=40, activation: Activation = "silu", **shape) -> Mlp:
    """Returns a random problem; see `make_problem`."""
    into = make_problem(k=k, ns=(inner, inner), **shape)
    outof = make_problem(1, k=inner, ns=(n,), **shape)
    routing = into.routing._replace(site=into.routing.site + jnp.uint32(3))
    return Mlp(into, outof._replace(routing=routing), activation)


def block(p: Mlp, implementation: str | None) -> Callable:
    """The block as a function of x, A and B; with the activation apart if not said otherwise."""
    ws, _, _, biases = p.operands()

    def run(x, a, b):
        return fused_gated_mlp(
            x, ws, a, b, *p.into.routing[:4], p.sites(), biases=biases, activation=p.activation,
            implementation=implementation,
        )  # fmt: skip

    return run


def separate(p: Mlp, implementation: str | None) -> Callable:
    """The same as two calls of `fused_multi_lora` with the activation between them."""
    ws, _, _, biases = p.operands()

    def run(x, a, b):
        gate, up = fused_multi_lora(
            x, ws[:2], a[:2], b[:2], *p.into.routing, biases=biases[:2],
            implementation=implementation,
        )  # fmt: skip
        (y,) = fused_multi_lora(
            gated(gate, up, p.activation), ws[2:], a[2:], b[2:], *p.outof.routing,
            biases=biases[2:], implementation=implementation,
        )  # fmt: skip
        return y

    return run


def run(function: Callable, p: Mlp) -> Results:
    """Runs a block forward and backward."""
    _, a, b, _ = p.operands()
    y, pull = jax.vjp(function, p.into.x, a, b)
    return Results(y, *pull(p.outof.dys[0]))


def mlp_truth(p: Mlp, of_linear: Callable = truth) -> Results:
    """Everything in float64, from operands as the kernels see them."""
    dtype = p.into.x.dtype
    with jax.enable_x64(True):

        def wide(problem: Problem) -> Problem:
            """Float64 values; A and B as rounded to the compute dtype first."""
            seen = [tuple(v.astype(dtype) for v in stack) for stack in (problem.a, problem.b)]
            problem = problem._replace(a=seen[0], b=seen[1])
            fields = jax.tree.map(lambda v: v.astype(jnp.float64), problem._replace(routing=None))
            return fields._replace(routing=problem.routing)

        into, outof = wide(p.into), wide(p.outof)
        gate, up = (jnp.asarray(v) for v in of_linear(into).ys)
        down = of_linear(outof._replace(x=gated(gate, up, p.activation)))
        dys = gated_gradients(gate, up, jnp.asarray(down.dx), p.activation)
        first = of_linear(into._replace(dys=dys))
    return Results(down.ys[0], first.dx, first.da + down.da, first.db + down.db)


def errors(actual: Results, expected: Results) -> dict[str, float]:
    """Relative error of every array, by name."""
    return {
        f"{name}[{i}]": relative_error(np.asarray(got), np.asarray(want))
        for name, gots, wants in zip(Results._fields, actual, expected, strict=True)
        for i, (got, want) in enumerate(
            zip(*((v if isinstance(v, tuple) else (v,)) for v in (gots, wants)), strict=True)
        )
    }
