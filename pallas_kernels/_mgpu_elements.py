"""Element-wise functions on registers that Mosaic GPU lacks, as instructions of the machine."""

import jax
from jax import lax
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir

from pallas_kernels._mgpu import interpreting

# 1 / (1 + exp(-x)) as XLA's compiler writes it for a GPU, so that both give the same bits: exp is
# that of CUDA's mathematical library, a power of two times one from the special function unit.
_SIGMOID = """{
.reg .f32 %a, %b, %c;
.reg .b32 %m;
fma.rn.f32 %a, $1, 0fBBBB989D, 0f3F000000;
cvt.sat.f32.f32 %a, %a;
mov.f32 %b, 0f4B400001;
fma.rm.f32 %a, %a, 0f437C0000, %b;
add.rn.f32 %b, %a, 0fCB40007F;
neg.f32 %b, %b;
fma.rn.f32 %b, $1, 0fBFB8AA3B, %b;
fma.rn.f32 %b, $1, 0fB2A57060, %b;
mov.b32 %m, %a;
shl.b32 %m, %m, 23;
mov.b32 %c, %m;
ex2.approx.ftz.f32 %b, %b;
mul.rn.f32 %b, %b, %c;
add.rn.f32 %b, %b, 0f3F800000;
rcp.approx.f32 $0, %b;
}"""


def sigmoid(value: jax.Array, layout) -> jax.Array:
    """Returns 1 / (1 + exp(-value)) of a float32 value in the layout given, in XLA's bits."""
    if interpreting():
        return 1 / (1 + lax.exp(-value))

    def of_element(element):
        return mosaic_utils.inline_ptx(_SIGMOID, element, result_types=ir.F32Type.get())

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(value.shape, value.dtype, layout=layout),
    )
    def run(_, value):
        return value._pointwise(FragmentedArray._lift_fast_instr(of_element))

    return run(value)  # pyright: ignore[reportCallIssue]


_PRODUCT_SUM = """{
.reg .f32 %a, %b;
mul.rn.f32 %a, $1, $2;
mul.rn.f32 %b, $3, $4;
add.rn.f32 $0, %a, %b;
}"""


def product_sum(a: jax.Array, b: jax.Array, c: jax.Array, d: jax.Array, layout) -> jax.Array:
    """Returns a b + c d with each product rounded, as XLA does it; for float32 in one layout."""
    if interpreting():
        return a * b + c * d

    def of_elements(*elements):
        return mosaic_utils.inline_ptx(_PRODUCT_SUM, *elements, result_types=ir.F32Type.get())

    @plgpu.inline_mgpu(
        arg_types=(layout,) * 4,
        return_type=plgpu.ShapeDtypeStruct(a.shape, a.dtype, layout=layout),
    )
    def run(_, a, b, c, d):
        return a._pointwise(FragmentedArray._lift_fast_instr(of_elements), b, c, d)

    return run(a, b, c, d)  # pyright: ignore[reportCallIssue]
