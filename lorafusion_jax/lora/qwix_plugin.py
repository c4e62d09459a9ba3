"""`FusedLoraProvider`: the fused op inside models that Qwix adapts, NNX or Linen.

    provider = lf.FusedLoraProvider(module_path=".*_proj", rank=16, alpha=32)
    model = qwix.apply_lora_to_model(model, provider, *example_inputs, rngs=nnx.Rngs(0))

Needs `pip install "lorafusion-jax[qwix]"`. Two helpers of Qwix that are not public find the weight
of a product and the rule of a module, hence the narrow version range of that extra.
"""

import math
import string
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt32

from pallas_kernels import fused_lora, row_keys

try:
    import qwix
    from qwix._src.utils import flax_util
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'FusedLoraProvider needs Qwix: pip install "lorafusion-jax[qwix]"', name=error.name
    ) from error

# PEFT's initial A, uniform in +-1/sqrt(fan in); Qwix's own is 2.4 times as large.
_PEFT_A = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _Matmul(NamedTuple):
    """A product seen as X [T, K] times W [K, N].

    Attributes:
        x: rows.
        w: the weight, reshaped without moving its elements.
        shape: of the output before `order` is applied.
        order: axes of the output.
    """

    x: Float[Array, "T K"]
    w: Float[Array, "K N"]
    shape: tuple[int, ...]
    order: tuple[int, ...]


class FusedLoraProvider(qwix.LoraProvider):
    """Qwix's LoRA provider with the fused op in place of base product, two thin ones and a sum.

    Parameters, their names, their layout and checkpoints are Qwix's (`<weight>_lora_a` and
    `<weight>_lora_b`). Three things differ. A starts with PEFT's distribution unless
    `lora_a_initializer` says otherwise. The base weight is frozen: its gradient is zero even where
    it is asked for. Dropout masks are drawn by this package's rule from Qwix's `dropout` stream.

    Products go to the fused op where both factors have the same float dtype, the weight is not
    quantised, its contracting axes come first, no axis is a batch axis, and neither a precision, an
    output dtype nor an output sharding is asked for. All others, convolutions included, take Qwix's
    own path.

    Args:
        rules: `qwix.LoraRule`s; or give the fields of one as keywords.
        disable_jit: as in Qwix.
        **kwargs: fields of one `qwix.LoraRule`, such as module_path, rank, alpha, dropout.
    """

    def __init__(
        self,
        rules: Sequence[qwix.QuantizationRule] | None = None,
        *,
        disable_jit: bool = False,
        **kwargs: Any,
    ):
        if rules is None:
            kwargs.setdefault("lora_a_initializer", _PEFT_A)
        super().__init__(rules, disable_jit=disable_jit, **kwargs)

    def dot_general(
        self,
        lhs: Any,
        rhs: Any,
        dimension_numbers: Any,
        precision=None,
        preferred_element_type=None,
        out_sharding=None,
    ):
        """Takes the place of `jax.lax.dot_general` in the model."""
        options = (precision, preferred_element_type, out_sharding)
        matmul = None
        if all(option is None for option in options) and _is_plain(lhs, rhs):
            matmul = _from_dot_general(lhs, rhs, dimension_numbers)
        y = None if matmul is None else self._fused("dot_general", rhs, matmul)
        return super().dot_general(lhs, rhs, dimension_numbers, *options) if y is None else y

    def einsum(self, einsum_str: str, *operands: Any, **kwargs: Any):
        """Takes the place of `jax.numpy.einsum` in the model."""
        matmul = None
        if (
            len(operands) == 2
            and all(value is None for value in kwargs.values())
            and _is_plain(*operands)
        ):
            matmul = _from_einsum(einsum_str, *operands)
        y = None if matmul is None else self._fused("einsum", operands[1], matmul)
        return super().einsum(einsum_str, *operands, **kwargs) if y is None else y

    def _fused(self, op: str, weight: Array, matmul: _Matmul) -> Array | None:
        """Returns the adapted product, or None where Qwix has to do it."""
        rule, _ = self._get_current_rule_and_op_id(op, only_rule=True)
        if not isinstance(rule, qwix.LoraRule) or rule.weight_qtype or rule.act_qtype:
            return None
        factors = _factors_of(weight)
        if factors is None:  # no weight, or the first call, in which Qwix creates the factors
            return None
        a, b = factors
        y = fused_lora(
            matmul.x,
            matmul.w,
            a.reshape(matmul.w.shape[0], rule.rank).T,
            b.reshape(rule.rank, matmul.w.shape[1]),
            rule.alpha / rule.rank,
            rate=rule.dropout,
            row_key=_new_row_keys(matmul.x.shape[0]) if rule.dropout else None,
        )
        return y.reshape(matmul.shape).transpose(matmul.order)


def _is_plain(lhs: Any, rhs: Any) -> bool:
    """Whether both are arrays of one float dtype, so that the weight is not quantised."""
    return (
        isinstance(lhs, jax.Array)
        and isinstance(rhs, jax.Array)
        and lhs.dtype == rhs.dtype
        and jnp.issubdtype(lhs.dtype, jnp.floating)
    )


def _factors_of(weight: Array) -> tuple[Array, Array] | None:
    """Returns A and B of a parameter of the module that is being called."""
    name = flax_util.find_param(weight)
    if name is None:
        return None
    module = flax_util.get_current_module()
    if isinstance(module, nnx.Module):
        found = [getattr(module, f"{name}_lora_{which}", None) for which in "ab"]
    else:
        found = [module.get_variable("params", f"{name}_lora_{which}") for which in "ab"]
    a, b = map(flax_util.unbox, found)
    return None if a is None or b is None else (a, b)


def _new_row_keys(rows: int) -> UInt32[Array, " rows"]:
    """Returns dropout identities from the model's `dropout` stream."""
    seed = jax.random.bits(flax_util.make_rng("dropout"), dtype=jnp.uint32)
    row = jnp.arange(rows)
    zero = jnp.zeros_like(row)
    return row_keys(jnp.full(row.shape, seed), zero, zero, row)


def _from_dot_general(lhs: Array, rhs: Array, dimension_numbers: Any) -> _Matmul | None:
    (lhs_contract, rhs_contract), (lhs_batch, _) = dimension_numbers
    if lhs_batch:
        return None
    return _matmul(lhs, rhs, tuple(lhs_contract), tuple(rhs_contract))


def _from_einsum(subscripts: str, lhs: Array, rhs: Array) -> _Matmul | None:
    """Reads `left,right->out`; None for what is not one product without batch axes."""
    text = subscripts.replace(" ", "")
    free = iter(sorted(set(string.ascii_letters) - set(text)))
    leading = "".join(next(free) for _ in range(lhs.ndim - len(text.split(",")[0]) + 3))
    inputs, arrow, out = text.replace("...", leading).partition("->")
    left, _, right = inputs.partition(",")
    if not arrow or len(left) != lhs.ndim or len(right) != rhs.ndim:
        return None
    shared = [c for c in right if c in left]
    order = [c for c in left + right if c not in shared]
    if sorted(order) != sorted(out) or len(set(left)) < len(left) or len(set(right)) < len(right):
        return None
    contract = tuple(left.index(c) for c in shared), tuple(right.index(c) for c in shared)
    return _matmul(lhs, rhs, *contract, tuple(order.index(c) for c in out))


def _matmul(
    lhs: Array,
    rhs: Array,
    lhs_contract: tuple[int, ...],
    rhs_contract: tuple[int, ...],
    order: tuple[int, ...] | None = None,
) -> _Matmul | None:
    """Flattens a product; None where the weight would have to be transposed, which copies it."""
    count = len(rhs_contract)
    if not count or rhs_contract != tuple(range(count)) or rhs.ndim == count:
        return None
    x = jnp.moveaxis(lhs, lhs_contract, range(lhs.ndim - count, lhs.ndim))
    depth = math.prod(rhs.shape[:count])
    shape = x.shape[: x.ndim - count] + rhs.shape[count:]
    order = tuple(range(len(shape))) if order is None else order
    return _Matmul(x.reshape(-1, depth), rhs.reshape(depth, -1), shape, order)
