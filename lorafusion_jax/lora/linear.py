"""NNX linears that carry LoRA adapters: of many jobs at once, or of one."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt32

from pallas_kernels import fused_gated_mlp, fused_lora, fused_multi_lora, row_keys
from pallas_kernels.activation import Activation

_KERNEL_INIT = nnx.initializers.lecun_normal()


class LoraContext(NamedTuple):
    """How the rows of one forward pass are routed to adapter slots; passed down the model.

    Attributes:
        scale: LoRA scale per slot.
        rate: dropout rate per slot (zeros for evaluation and generation).
        tile_adapter: slot of each tile of rows, -1 for none.
        row_key: dropout identity per row, 0 for padding.
    """

    scale: Float[Array, " slots"]
    rate: Float[Array, " slots"]
    tile_adapter: Int[Array, " tiles"]
    row_key: UInt32[Array, " T"]


class MultiLoRALinear(nnx.Module):
    """A frozen linear with room for the adapters of many jobs, slot axis first.

    Like `nnx.Linear` (same `kernel` and `bias`, at the same path), except that rows are routed to
    adapters by the `LoraContext` of the call. Without one, or without adapters attached
    (`lorafusion_jax.lora.bank.attach_adapters`), it is the plain linear.

    Args:
        in_features: width of the input.
        out_features: width of the output.
        use_bias: whether there is a (frozen) bias.
        num_slots: adapter slots; 0 means none (`lora_a` and `lora_b` are None).
        r_max: rows of A and B per slot; adapters of smaller rank have zeros in the rest.
        dtype: dtype of the computation; None promotes the input's and the kernel's.
        param_dtype: dtype of kernel and bias. Adapters are always float32.
        kernel_init: initialiser of the kernel.
        rngs: source of the kernel's initial value.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = False,
        num_slots: int = 0,
        r_max: int = 0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: nnx.Initializer = _KERNEL_INIT,
        rngs: nnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        )
        self.bias = nnx.data(nnx.Param(jnp.zeros(out_features, param_dtype)) if use_bias else None)
        self.lora_a: nnx.LoRAParam | None = nnx.data(None)
        self.lora_b: nnx.LoRAParam | None = nnx.data(None)
        if num_slots:
            a = jnp.zeros((num_slots, r_max, in_features), jnp.float32)
            self.set_stacks(a, jnp.zeros((num_slots, r_max, out_features), jnp.float32))

    def set_stacks(
        self, a: Float[Array, "slots r_max K"] | None, b: Float[Array, "slots r_max N"] | None
    ) -> None:
        """Replaces the adapter stacks; None removes them."""
        self.lora_a = None if a is None else nnx.LoRAParam(a)
        self.lora_b = None if b is None else nnx.LoRAParam(b)

    def __call__(
        self,
        x: Float[Array, "*batch K"],
        lora: LoraContext | None = None,
        site: Int[Array, ""] | int = 0,
    ) -> Float[Array, "*batch N"]:
        """Applies the linear, and to each row the adapter that `lora` routes it to.

        Args:
            x: input, any leading shape; its rows in C order are those of `lora`.
            lora: routing of the rows, or None for the base output.
            site: which input of the model this is (8 * layer + input group), for dropout.

        Returns:
            The output, same leading shape.
        """
        (y,) = grouped_linear((self,), x.reshape(-1, x.shape[-1]), lora, site)
        return y.reshape(*x.shape[:-1], self.out_features)


def grouped_linear(
    linears: Sequence[MultiLoRALinear],
    x: Float[Array, "T K"],
    lora: LoraContext | None = None,
    site: Int[Array, ""] | int = 0,
) -> tuple[Float[Array, "T _"], ...]:
    """Applies linears that share their input; those with adapters go through one fused op.

    Args:
        linears: for example the query, key and value projections.
        x: the shared input.
        lora: routing of the rows, or None for the base outputs.
        site: which input of the model this is (8 * layer + input group), for dropout.

    Returns:
        One output per linear.
    """
    operands = [_operands(linear, x) for linear in linears]
    stacks = [_stacks(linear) if lora is not None else None for linear in linears]
    adapted = [i for i, stack in enumerate(stacks) if stack is not None]
    fused = iter(())
    if lora is not None and adapted:
        fused = iter(
            fused_multi_lora(
                operands[adapted[0]][0],
                tuple(operands[i][1] for i in adapted),
                tuple(stack[0] for stack in stacks if stack is not None),
                tuple(stack[1] for stack in stacks if stack is not None),
                lora.scale,
                lora.rate,
                lora.tile_adapter,
                lora.row_key,
                jnp.asarray(site, jnp.uint32).reshape(1),
                biases=tuple(operands[i][2] for i in adapted),
            )
        )
    return tuple(
        _plain(*operand) if stack is None else next(fused)
        for operand, stack in zip(operands, stacks, strict=True)
    )


def can_join(linears: Sequence[MultiLoRALinear]) -> bool:
    """Whether linears can go through one op together with what stands between them.

    Those that carry no adapters, or compute in different dtypes, are called one by one.
    """
    dtypes = {(linear.dtype, linear.kernel[...].dtype) for linear in linears}
    adapted = all(_stacks(linear) is not None for linear in linears)
    return fused_gated_mlp is not None and adapted and len(dtypes) == 1


def joined_mlp(
    linears: Sequence[MultiLoRALinear],
    x: Float[Array, "T K"],
    lora: LoraContext,
    sites: tuple[Int[Array, ""] | int, Int[Array, ""] | int],
    activation: Activation,
) -> Float[Array, "T N"]:
    """Applies a gated feed-forward block as one op; gate and up are named for remat policies.

    Args:
        linears: gate, up and down, for which `can_join` holds.
        x: input of gate and up.
        lora: routing of the rows.
        sites: of x and of the input of down, for dropout.
        activation: of gate.

    Returns:
        The output of down.
    """
    operands = [_operands(linear, x) for linear in linears]
    stacks = [stack for linear in linears if (stack := _stacks(linear)) is not None]
    into, outof = (jnp.asarray(site, jnp.uint32).reshape(1) for site in sites)
    return fused_gated_mlp(
        operands[0][0],
        tuple(kernel for _, kernel, _ in operands),
        tuple(a for a, _ in stacks),
        tuple(b for _, b in stacks),
        *lora,
        (into, outof),
        activation=activation,
        biases=tuple(bias for *_, bias in operands),
    )


def _stacks(linear: MultiLoRALinear) -> tuple[Array, Array] | None:
    if linear.lora_a is None or linear.lora_b is None:
        return None
    return linear.lora_a[...], linear.lora_b[...]


class LoRALinear(nnx.Module):
    """An `nnx.Linear` with one adapter, for training loops that know nothing of this package.

    It keeps the linear's `kernel` and `bias` at the same path and adds `lora_a` and `lora_b`:

        optimizer = nnx.Optimizer(model, optax.adamw(1e-4), wrt=nnx.LoRAParam)
        gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)

    Kernel and bias are frozen: their gradient is zero even where it is asked for. Dropout follows
    `model.train()` and `model.eval()` as in `nnx.Dropout`. Its masks come from the module's own
    stream of random keys, or are a function of `row_key` where the caller gives one.

    Args:
        base: the linear to adapt.
        a: initial A, [r, in] (PEFT's lora_A.weight).
        b: initial B, [r, out] (PEFT's lora_B.weight transposed).
        scale: what the adapter's output is multiplied by.
        dropout: rate on the adapter's input; 0 or in [1/512, 1).
        site: tells the masks of modules apart that are called with the same `row_key`.
        rngs: source of the dropout keys; needed if `dropout` > 0.
    """

    def __init__(
        self,
        base: nnx.Linear,
        a: Float[Array | np.ndarray, "r K"],
        b: Float[Array | np.ndarray, "r N"],
        *,
        scale: int | float = 1,
        dropout: int | float = 0,
        site: int = 0,
        rngs: nnx.Rngs | None = None,
    ):
        if dropout and rngs is None:
            raise ValueError(f"{dropout=} needs rngs, such as nnx.Rngs(dropout=0)")
        self.in_features = base.in_features
        self.out_features = base.out_features
        self.dtype = base.dtype
        self.kernel = base.kernel
        self.bias = nnx.data(base.bias)
        self.lora_a = nnx.LoRAParam(jnp.asarray(a))
        self.lora_b = nnx.LoRAParam(jnp.asarray(b))
        self.scale = float(scale)
        self.dropout = float(dropout)
        self.site = site
        self.deterministic = False
        self.rngs = nnx.data(rngs["dropout"].fork() if dropout and rngs is not None else None)

    def __call__(
        self,
        x: Float[Array, "*batch K"],
        *,
        row_key: UInt32[Array, "*batch"] | None = None,
    ) -> Float[Array, "*batch N"]:
        """Applies the linear and its adapter.

        Args:
            x: input, any leading shape.
            row_key: dropout identity of each row (`pallas_kernels.row_keys`), for masks that do not
                depend on how often the module was called; 0 marks padding rows.

        Returns:
            The output, same leading shape.
        """
        rate = 0.0 if self.deterministic else self.dropout
        if rate and row_key is None:
            row_key = self._next_row_keys(x.shape[:-1])
        x, kernel, bias = _operands(self, x)
        return fused_lora(
            x,
            kernel,
            self.lora_a[...],
            self.lora_b[...],
            self.scale,
            rate=rate,
            row_key=row_key,
            site=self.site,
            bias=bias,
        )

    def set_view(self, deterministic: bool | None = None) -> None:
        """Lets `nnx.view(model, deterministic=...)` switch dropout."""
        if deterministic is not None:
            self.deterministic = deterministic

    def _next_row_keys(self, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
        """New keys for all rows, from the module's stream."""
        assert self.rngs is not None  # the constructor asks for it where the rate is above 0
        seed = jax.random.bits(self.rngs(), dtype=jnp.uint32)
        row = jnp.arange(math.prod(shape))
        zero = jnp.zeros_like(row)
        return row_keys(jnp.full(row.shape, seed), zero, zero, row).reshape(shape)


def _operands(linear: MultiLoRALinear | LoRALinear, x: Array) -> tuple[Array, Array, Array | None]:
    """Input, kernel and bias in the dtype of the computation; no copy where they have it."""
    kernel = linear.kernel[...]
    dtype = linear.dtype or jnp.promote_types(x.dtype, kernel.dtype)
    bias = None if linear.bias is None else linear.bias[...].astype(dtype)
    return x.astype(dtype), kernel.astype(dtype), bias


@jax.custom_vjp
def _plain(x: Array, kernel: Array, bias: Array | None) -> Array:
    """The base output, rounded as the fused op rounds it."""
    acc = jnp.promote_types(x.dtype, jnp.float32)
    y = jnp.matmul(x, kernel, preferred_element_type=acc)
    return (y if bias is None else y + bias.astype(acc)).astype(x.dtype)


def _plain_forward(x, kernel, bias):
    # Who keeps residuals as arrays, as the rings of a mesh do, keeps all that is named here.
    values = tuple(None if operand is None else operand.value for operand in (x, kernel, bias))
    return _plain(*values), (values[0] if kernel.perturbed else None, *values[1:])


def _plain_backward(residuals, dy):
    # jax's own rule would widen dy and the kernel to float32: a copy, and products at half speed.
    x, kernel, bias = residuals
    acc = jnp.promote_types(dy.dtype, jnp.float32)
    dx = jnp.matmul(dy, kernel.T, preferred_element_type=acc).astype(dy.dtype)
    dkernel = None
    if x is not None:
        dkernel = jnp.matmul(x.T, dy, preferred_element_type=acc).astype(kernel.dtype)
    dbias = None if bias is None else dy.astype(acc).sum(axis=0).astype(bias.dtype)
    return dx, dkernel, dbias


_plain.defvjp(_plain_forward, _plain_backward, symbolic_zeros=True)
