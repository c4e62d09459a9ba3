"""The only module that touches Pallas Mosaic GPU: its primitives, a ring of SMEM slots, a launcher.

Mosaic GPU changes often. Kernels import the names below, so that a change of its interface is
mended here (and in `_mgpu_elements`). A "thread" of Mosaic GPU is a warpgroup (128 CUDA threads);
every kernel of ours runs two compute warpgroups (0 and 1) and one that only moves memory (2).
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.mosaic.gpu.fragmented_array import FragmentedArray
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas.mosaic_gpu import SMEM as SMEM
from jax.experimental.pallas.mosaic_gpu import Barrier as Barrier
from jax.experimental.pallas.mosaic_gpu import Layout as Layout
from jax.experimental.pallas.mosaic_gpu import WGMMAAccumulatorRef as ACC
from jax.experimental.pallas.mosaic_gpu import barrier_arrive as barrier_arrive
from jax.experimental.pallas.mosaic_gpu import barrier_wait as barrier_wait
from jax.experimental.pallas.mosaic_gpu import broadcasted_iota as broadcasted_iota
from jax.experimental.pallas.mosaic_gpu import commit_smem as commit_smem
from jax.experimental.pallas.mosaic_gpu import copy_gmem_to_smem as copy_gmem_to_smem
from jax.experimental.pallas.mosaic_gpu import copy_smem_to_gmem as copy_smem_to_gmem
from jax.experimental.pallas.mosaic_gpu import layout_cast as layout_cast
from jax.experimental.pallas.mosaic_gpu import load as load
from jax.experimental.pallas.mosaic_gpu import planar_snake as planar_snake
from jax.experimental.pallas.mosaic_gpu import semaphore_signal as _semaphore_signal
from jax.experimental.pallas.mosaic_gpu import semaphore_wait as _semaphore_wait
from jax.experimental.pallas.mosaic_gpu import set_max_registers as set_max_registers
from jax.experimental.pallas.mosaic_gpu import wait_smem_to_gmem as wait_smem_to_gmem
from jax.experimental.pallas.mosaic_gpu import wgmma as wgmma
from jax.experimental.pallas.mosaic_gpu import wgmma_wait as wgmma_wait
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

MEMORY_WARPGROUP = 2
HOPPER = (9, 0)
MMA_ACCUMULATOR = Layout.MMA_ACC(jnp.bfloat16)  # register layout of `mma`; the same for float16
SMEM_BYTES = 232_448  # what one block may use on sm_90
_MEMORY_REGISTERS, _COMPUTE_REGISTERS = 40, 232
_H100_SMS = 132
_ARRAY = object()  # where the arrays go among static arguments
_interpreting = contextvars.ContextVar("interpreting", default=False)
_lowering: contextvars.ContextVar[tuple[int, int] | None] = contextvars.ContextVar(
    "lowering", default=None
)
_tile_columns = contextvars.ContextVar("tile_columns", default=64)


@contextlib.contextmanager
def interpret(detect_races: bool = False):
    """Runs kernels traced inside on the CPU, in Mosaic GPU's interpreter."""
    token = _interpreting.set(True)
    try:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=detect_races)):
            yield
    finally:
        _interpreting.reset(token)


def interpreting() -> bool:
    """Whether kernels traced now are interpreted."""
    return _interpreting.get()


@contextlib.contextmanager
def lower_for(capability: tuple[int, int]):
    """Traces kernels inside for a GPU of this compute capability, on a machine without one."""
    token = _lowering.set(capability)
    try:
        yield
    finally:
        _lowering.reset(token)


def capability() -> tuple[int, int] | None:
    """Compute capability that kernels traced now run on; that of Hopper if interpreted."""
    if _lowering.get() is not None:
        return _lowering.get()
    if interpreting():
        return HOPPER
    if jax.default_backend() != "gpu":
        return None
    major, _, minor = getattr(jax.devices()[0], "compute_capability", "").partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def targets_hopper() -> bool:
    """Whether kernels traced now run on compute capability 9.0, or are interpreted as if."""
    return capability() == HOPPER


def num_sms() -> int:
    """Number of multiprocessors to spread a persistent kernel over."""
    if interpreting():
        return 2
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else _H100_SMS


@contextlib.contextmanager
def tiles_of(columns: int):
    """Gives the buffers of kernels traced inside tiles of 16, 32 or 64 columns.

    TMA copies whole tiles only, so arrays of other widths than multiples of 64 need narrower ones.
    """
    token = _tile_columns.set(columns)
    try:
        yield
    finally:
        _tile_columns.reset(token)


def tile_columns() -> int:
    """Columns of the tiles of kernels traced now, see `tiles_of`."""
    return _tile_columns.get()


def traced_once[F: Callable[..., Any]](operation: F) -> F:
    """Lets calls with equal shapes and sizes share one trace, which is lowered once per program.

    Lowering a kernel takes about half a second. Without this, each layer structure and each of
    forward, backward and evaluation would lower every one of its kernels anew.

    Args:
        operation: takes arrays in any pytrees, and static arguments that are hashable leaves.
    """

    def run(static, arrays):
        _, treedef, rest = static
        arrays = iter(arrays)
        leaves = [next(arrays) if leaf is _ARRAY else leaf for leaf in rest]
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        return operation(*args, **kwargs)

    run.__name__ = operation.__name__
    traced = jax.jit(run, static_argnums=0)

    @functools.wraps(operation)
    def once(*args, **kwargs):
        if interpreting():  # its mode is not part of the key
            return operation(*args, **kwargs)
        leaves, treedef = jax.tree.flatten((args, kwargs))
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]
        rest = tuple(_ARRAY if isinstance(x, jax.Array | np.ndarray) else x for x in leaves)
        target = (capability(), num_sms(), tile_columns())
        return traced((target, treedef, rest), arrays)

    return once  # pyright: ignore[reportReturnType]


def swizzled(minor: int, dtype) -> tuple:
    """The tiling and swizzle that TMA and wgmma share, for a buffer of `minor` columns."""
    bits = jnp.dtype(dtype).itemsize * 8
    swizzle = plgpu.find_swizzle(math.gcd(minor, tile_columns()) * bits)
    return (
        plgpu.TilingTransform((8, swizzle * 8 // bits)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(swizzle),  # pyright: ignore[reportAbstractUsage]
    )


def tiles_buffer(stages: int, rows: int, columns: int, dtype):
    """A ring of `stages` tiles in SMEM, in the layout of TMA and wgmma."""
    return SMEM((stages, rows, columns), dtype, transforms=swizzled(columns, dtype))


def load_columns(vector_ref, first_column, shape: tuple[int, int]) -> jax.Array:
    """Loads a vector over the columns of the wgmma layout and spreads it over the rows."""
    vector = load(
        vector_ref.at[pl.ds(first_column, shape[1])],
        layout=Layout.WGMMA.reduce(0),
        optimized=False,
    )
    return lax.broadcast_in_dim(vector, shape, (1,))


class Window:
    """A part of another buffer, as a buffer of a ring: `at[slot]` gives what `part(slot)` gives."""

    def __init__(self, part: Callable):
        self._part = part

    @property
    def at(self) -> "Window":
        """The window itself."""
        return self

    def __getitem__(self, slot):
        return self._part(slot)


def have_flags() -> bool:
    """Whether blocks can wait for each other: not in the interpreter, unless there is only one."""
    return not interpreting() or num_sms() == 1


class Flags:
    """Counters in memory by which blocks tell each other that data is there.

    XLA zeroes them before each launch, so nothing is left of an earlier one. Data may be written by
    plain stores and read by TMA. The order from one to the other: each thread's stores, its proxy
    fence, barrier of its warpgroup, release by one thread; acquire by one thread of the reader,
    barrier of its warpgroup, proxy fence, TMA.
    """

    def __init__(self, count: int):
        if not interpreting():  # the interpreter has none
            self._semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((count,)))

    def raise_(self, index) -> None:
        """Counts a flag up by one, after all that this warpgroup stored."""
        if not interpreting():
            _fence_proxies()
            _semaphore_signal(self._semaphores.at[index], memory_scope="gpu")

    def wait(self, index, count: int) -> None:
        """Waits until a flag was raised so many times."""
        if not interpreting():
            _semaphore_wait(self._semaphores.at[index], count, decrement=False, memory_scope="gpu")
            _fence_proxies()


def _fence_proxies() -> None:
    """Orders this thread's plain accesses to memory and those by TMA."""

    @plgpu.inline_mgpu()
    def fence(_):
        mosaic_utils.inline_ptx("fence.proxy.async;", has_side_effects=True)

    fence()  # pyright: ignore[reportCallIssue]


class Ring:
    """SMEM slots that the memory warpgroup fills and the compute warpgroups empty, in step order.

    Both sides count steps alike, across all tiles of a block. Rules that Mosaic's barriers impose:
    who ever waits on a barrier must see all its completions, and none may be left unobserved at the
    end (`drain`).
    """

    def __init__(self, buffers: Sequence, full, empty, stages: int):
        self.buffers, self.full, self.empty, self.stages = tuple(buffers), full, empty, stages

    @staticmethod
    def barriers(stages: int, copies: int, consumers: int) -> tuple:
        """Types of the full and empty barriers, for scratch allocation."""
        return tuple(Barrier(num_arrivals=n, num_barriers=stages) for n in (copies, consumers))

    def slot(self, step):
        """The slot of a step."""
        return lax.rem(step, jnp.int32(self.stages))

    def fill(self, step, sources: Sequence) -> None:
        """Starts copies of a step's sources, one per buffer, into its slot once it is free."""
        slot = self.slot(step)

        @pl.when(step >= self.stages)
        def _():
            barrier_wait(self.empty.at[slot])

        for source, buffer in zip(sources, self.buffers, strict=True):
            copy_gmem_to_smem(source, buffer.at[slot], self.full.at[slot])

    def take(self, step) -> tuple:
        """Waits for a step's slot and returns its buffers."""
        slot = self.slot(step)
        barrier_wait(self.full.at[slot])
        return tuple(buffer.at[slot] for buffer in self.buffers)

    def release(self, step) -> None:
        """Gives a step's slot back to the memory warpgroup."""
        barrier_arrive(self.empty.at[self.slot(step)])

    def drain(self, steps) -> None:
        """Observes the completions that no later fill waited for; `steps` were filled in all."""

        @pl.loop(jnp.maximum(steps - self.stages, 0), steps)
        def _(step):
            barrier_wait(self.empty.at[self.slot(step)])


def warp_specialize(
    memory: Callable[[], None],
    compute: Callable[[jax.Array], None],
    registers: tuple[int, int] = (_MEMORY_REGISTERS, _COMPUTE_REGISTERS),
) -> None:
    """Runs `memory` in the memory warpgroup and `compute(index)` in the other two.

    Args:
        memory: moves data.
        compute: gets the number of its warpgroup.
        registers: per thread of `memory` and of `compute`, multiples of 8; one of the former and
            two of the latter add up to at most 512.
    """
    warpgroup = lax.axis_index("wg")

    @pl.when(warpgroup == MEMORY_WARPGROUP)
    def _():
        set_max_registers(registers[0], action="decrease")
        memory()

    @pl.when(warpgroup < MEMORY_WARPGROUP)
    def _():
        set_max_registers(registers[1], action="increase")
        compute(warpgroup)


def keep_pairs(value: jax.Array, kept: jax.Array, layout) -> jax.Array:
    """Zeroes elements of a [rows, 64] value of 16 bits, by pairs as they lie in registers.

    Args:
        value: in the layout given.
        kept: [rows, 16] of uint32 in the same layout: the top bit of byte b of column c says
            whether column 16 b + c is kept.
        layout: of both, of pairs of columns in tiles of 8.
    """

    @plgpu.inline_mgpu(
        arg_types=(layout, layout),
        return_type=plgpu.ShapeDtypeStruct(value.shape, value.dtype, layout=layout),
    )
    def keep(_, value, kept):
        word = ir.IntegerType.get_signless(32)
        registers = np.empty_like(value.registers)
        for index, pair in np.ndenumerate(value.registers):
            columns = index[1]  # which 8 of the 64
            lanes = kept.registers[(index[0], columns % 2, *index[2:])]
            first, second = (
                vector.extract(lanes, [], ir.DenseI64ArrayAttr.get([lane])) for lane in range(2)
            )
            byte = columns // 2
            # Each nibble copies the sign of a byte: of the first lane to the low half, and so on.
            signs = 0x11 * (8 | byte) + 0x1100 * (8 | 4 | byte)
            mask = mosaic_utils.prmt(first, second, mosaic_utils.c(signs, word))
            registers[index] = mosaic_utils.bitcast(
                arith.andi(mosaic_utils.bitcast(pair, word), mask), pair.type
            )
        return FragmentedArray(_registers=registers, _layout=value.layout, _is_signed=None)

    return keep(value, kept)  # pyright: ignore[reportCallIssue]


def accumulate(shape: tuple[int, int], steps: Callable, start=None) -> jax.Array:
    """Runs `steps(accumulator)` on a float32 accumulator in registers and returns its value.

    Args:
        shape: rows and columns of this warpgroup's accumulator.
        steps: issues the matrix products, and waits for them.
        start: initial value; zeros if None.
    """
    if start is None or interpreting():  # the interpreter has no preloaded accumulators

        def zero_based(accumulator):
            steps(accumulator)
            return accumulator[...]

        value = pl.run_scoped(zero_based, ACC(shape, jnp.float32))
        return value if start is None else start + value
    return pl.run_state(steps)(ACC.init(start))  # pyright: ignore[reportReturnType]


def join(warpgroup, part: jax.Array, buffer, arrived, finish: Callable) -> None:
    """Adds up what two warpgroups have: the first one runs `finish(sum)`.

    Args:
        warpgroup: index of this one.
        part: what it has, an accumulator's value.
        buffer: of its shape, float32, in SMEM.
        arrived: a barrier that the other one arrives at.
        finish: takes the sum.
    """

    @pl.when(warpgroup == 1)
    def _():
        buffer[...] = part
        barrier_arrive(arrived)

    @pl.when(warpgroup == 0)
    def _():
        barrier_wait(arrived)
        finish(part + load(buffer, layout=Layout.WGMMA))


def accumulate_all(shapes: Sequence[tuple[int, int]], steps: Callable) -> list[jax.Array]:
    """Runs `steps(*accumulators)` on zeroed float32 accumulators; returns what it returns."""
    return pl.run_scoped(steps, *(ACC(shape, jnp.float32) for shape in shapes))


def launch(
    body: Callable[..., None],
    *,
    out_type,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    scratch: tuple,
    name: str,
) -> Callable:
    """Returns a function that runs `body(*inputs, *outputs, *scratch)` on a grid of blocks."""

    def with_scratch(*refs):
        pl.run_scoped(lambda *allocated: body(*refs, *allocated), *scratch, collective_axes="wg")

    return plgpu.kernel(
        with_scratch,
        out_type=out_type,
        grid=grid,
        grid_names=grid_names,
        num_threads=3,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )


def zeros(shape: tuple[int, int]) -> jax.Array:
    """Returns zeros in the register layout that `mma` accumulates in."""
    return layout_cast(jnp.zeros(shape, jnp.float32), MMA_ACCUMULATOR)


def mma(accumulator: jax.Array, left_ref, right_ref) -> jax.Array:
    """Adds a product of two matrices in memory, by instructions that all tensor cores have."""
    dtype = left_ref.dtype
    left = load(left_ref, layout=Layout.MMA_LHS(dtype))
    right = load(right_ref, layout=Layout.MMA_RHS(dtype))
    if interpreting():  # the interpreter lacks the instruction
        return accumulator + jnp.matmul(left, right, preferred_element_type=jnp.float32)
    return plgpu.mma(accumulator, left, right)


def load_mma_columns(vector_ref, first_column, shape: tuple[int, int]) -> jax.Array:
    """Loads a vector over the columns of `mma`'s layout and spreads it over the rows."""
    vector = load(
        vector_ref.at[pl.ds(first_column, shape[1])],
        layout=MMA_ACCUMULATOR.reduce(0),
        optimized=False,
    )
    return lax.broadcast_in_dim(vector, shape, (1,))


def pipeline(step: Callable, *, steps: int, stages: int, inputs: Sequence[tuple], carry):
    """Runs `step(index, *tiles, carry)` over tiles that are copied to SMEM ahead of it.

    Args:
        step: returns the next carry.
        steps: how many.
        stages: tiles in flight.
        inputs: for each a ref in memory, the shape of its tiles, and the tile of a step.
        carry: what the first step gets.
    """
    specs = [
        plgpu.BlockSpec(shape, tile, transforms=swizzled(shape[-1], ref.dtype))
        for ref, shape, tile in inputs
    ]

    def body(index, *rest):
        return step(index, *rest)

    run = plgpu.emit_pipeline(
        body, grid=(steps,), in_specs=specs, max_concurrent_steps=stages, init_carry=carry
    )
    return run(*(ref for ref, _, _ in inputs))


def accumulators(shapes: Sequence[tuple[int, ...]]) -> list:
    """Returns zeroed float32 arrays in memory that a kernel may add to, as operands for it."""
    return [jax.new_ref(jnp.zeros(shape, jnp.float32)) for shape in shapes]


def frozen(refs: Sequence) -> list[jax.Array]:
    """Returns what accumulators hold, after the kernel that added to them."""
    return [jax.freeze(ref) for ref in refs]


def launch_simple(
    body: Callable[..., None],
    *,
    out_type,
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    name: str,
) -> Callable:
    """Returns a function that runs `body(*inputs, *outputs)` on blocks of one warpgroup each."""
    return plgpu.kernel(body, out_type=out_type, grid=grid, grid_names=grid_names, kernel_name=name)
