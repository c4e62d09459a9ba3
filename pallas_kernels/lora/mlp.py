"""`fused_gated_mlp`: a gated feed-forward block whose three frozen linears carry LoRA.

    gate, up = linears of X        H = activation(gate) * up        Y = linear of H

On a Hopper GPU the activation is fused with the memory-bound passes around it; elsewhere, and where
these kernels refuse, it stands between two calls of `fused_multi_lora`, as one would write it.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels.activation import ACTIVATIONS, Activation, gated
from pallas_kernels.lora import mosaic_gpu
from pallas_kernels.lora.api import (
    Biases,
    Implementation,
    check_operands,
    check_routing,
    fused_multi_lora,
)
from pallas_kernels.lora.spec import Routing, Stacks, Weights

_FUSED = "mosaic_gpu"
_IN, _OUT = slice(0, 2), slice(2, 3)  # projections of X, and of H


class _Operands(NamedTuple):
    """What gate, up and down are made of, in this order; the routings of X and of H."""

    ws: Weights
    a: Stacks
    b: Stacks
    biases: Biases
    routings: tuple[Routing, Routing]

    def linears(self, which: slice) -> tuple[Weights, Stacks, Stacks, Biases]:
        """Weights, A, B and biases of some of the projections."""
        return self.ws[which], self.a[which], self.b[which], self.biases[which]


def _named(gate: Array, up: Array) -> tuple[Array, Array]:
    """Lets a policy of `jax.checkpoint` keep them and nothing else."""
    return checkpoint_name(gate, "gate"), checkpoint_name(up, "up")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlp(activation: Activation, x: Float[Array, "T K"], operands: _Operands):
    return _mlp_fwd(activation, x, operands)[0]


def _mlp_fwd(activation: Activation, x, operands: _Operands):
    into, outof = operands.routings
    ws, a, b, biases = operands.linears(_IN)
    (gate, up), ss = mosaic_gpu.forward(x, ws, a, b, biases, into)
    gate, up = _named(gate, up)
    (w,), (a_out,), (b_out,), (bias,) = operands.linears(_OUT)
    y, h, s = mosaic_gpu.forward_gated(gate, up, w, a_out, b_out, bias, outof, activation)
    return y, (x, gate, up, h, ss, s, operands)


def _mlp_bwd(activation: Activation, residuals, dy):
    x, gate, up, h, ss, s, operands = residuals
    into, outof = operands.routings
    ws, a, b, _ = operands.linears(_OUT)
    dh, da_out, db_out = mosaic_gpu.backward(h, ws, a, b, (s,), outof, (dy,))
    ws, a, b, _ = operands.linears(_IN)
    dx, da, db = mosaic_gpu.backward_gated(x, ws, a, b, ss, into, (gate, up, dh), activation)
    # Frozen weights, biases and routing have no gradient.
    return dx, _Operands(None, (*da, *da_out), (*db, *db_out), None, None)  # pyright: ignore


_mlp.defvjp(_mlp_fwd, _mlp_bwd)


def _separate(activation: Activation, x, operands: _Operands, implementation):
    """The same with the activation by itself."""
    into, outof = operands.routings
    ws, a, b, biases = operands.linears(_IN)
    gate, up = fused_multi_lora(x, ws, a, b, *into, biases=biases, implementation=implementation)
    gate, up = _named(gate, up)
    ws, a, b, biases = operands.linears(_OUT)
    (y,) = fused_multi_lora(
        gated(gate, up, activation), ws, a, b, *outof, biases=biases, implementation=implementation
    )
    return y


def _refuse(x: Array, operands: _Operands) -> None:
    """Raises NotImplementedError, with the reason, where the fused kernels cannot do this."""
    into, outof = operands.routings
    ws, a, *_ = operands.linears(_IN)
    mosaic_gpu.check(x, ws, a, into)
    ws, a, *_ = operands.linears(_OUT)
    h = jax.ShapeDtypeStruct((x.shape[0], ws[0].shape[0]), x.dtype)
    mosaic_gpu.check(h, ws, a, outof)


def fused_gated_mlp(
    x: Float[Array, "T K"],
    ws: tuple[Float[Array, "_ _"], ...],
    a: tuple[Float[Array, "E R _"], ...],
    b: tuple[Float[Array, "E R _"], ...],
    scale: Float[Array, " E"],
    rate: Float[Array, " E"],
    tile_adapter: Int[Array, " tiles"],
    row_key: UInt32[Array, " T"],
    sites: tuple[UInt32[Array, " 1"], UInt32[Array, " 1"]],
    *,
    activation: Activation = "silu",
    biases: tuple[Float[Array, " _"] | None, ...] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T N"]:
    """Computes a gated feed-forward block of three linears with LoRA: gate, up and down.

    Each linear is that of `fused_multi_lora`; gate and up share X and its dropout mask. Between
    them stands `activation(gate) * up`, in float32. Differentiable in x, a and b. Saved for the
    backward pass are X, gate, up, the input of down, and S of each; gate and up have these names
    (`jax.ad_checkpoint.checkpoint_name`) for policies that keep less.

    Args:
        x: input rows.
        ws: frozen weights of gate and up [K, F] and of down [F, N].
        a: down-projections of the three, slot axis first.
        b: up-projections of the three.
        scale: LoRA scale per slot.
        rate: dropout rate per slot.
        tile_adapter: slot of each tile of rows, -1 for none.
        row_key: dropout identity per row, 0 for padding.
        sites: of X and of the input of down.
        activation: "silu" or "gelu_tanh".
        biases: frozen bias of each linear, or None.
        implementation: "mosaic_gpu" for the fused kernels (H100, H200); another one of
            `fused_multi_lora` for that one on either side of the activation; None for the first of
            the fused kernels and what `fused_multi_lora` chooses that can.

    Returns:
        [T, N] in x's dtype.

    Raises:
        ValueError: shapes, dtypes or tiles do not fit together, or an unknown activation.
        ExceptionGroup: the implementation asked for refused, with its reasons.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{activation=} is unknown: expected one of {sorted(ACTIVATIONS)}")
    if not len(ws) == len(a) == len(b) == 3:
        raise ValueError(
            f"ws, a and b need gate, up and down: got {len(ws)}, {len(a)} and {len(b)}"
        )
    if not ws[0].shape[1] == ws[1].shape[1] == ws[2].shape[0]:
        shapes = [w.shape for w in ws]
        raise ValueError(f"the outputs of gate and up are not the inputs of down: {shapes}")
    into, outof = (Routing(scale, rate, tile_adapter, row_key, site) for site in sites)
    operands = _Operands(ws, a, b, (None,) * 3 if biases is None else biases, (into, outof))
    if implementation not in (None, _FUSED):
        return _separate(activation, x, operands, implementation)
    h = jax.ShapeDtypeStruct((x.shape[0], ws[2].shape[0]), x.dtype)
    check_operands(x, ws[_IN], a[_IN], b[_IN], tile_adapter)
    check_operands(h, ws[_OUT], a[_OUT], b[_OUT], tile_adapter)
    for routing in operands.routings:
        check_routing(routing, x.shape[0], a[0].shape[0])
    try:
        _refuse(x, operands)
    except NotImplementedError as reason:
        if implementation is None:
            return _separate(activation, x, operands, None)
        reason.add_note(f"implementation {_FUSED!r}")
        raise ExceptionGroup(
            "no implementation of fused_gated_mlp can run this", [reason]
        ) from None
    return _mlp(activation, x, operands)
