"""AdapterBank: the adapters of all jobs, stacked by slot, one leaf per projection.

A bank is a plain pytree that training passes through jit, differentiates and updates, while the
frozen rest of the model stays an argument of its own:

    bank = attach_adapters(model, paths, num_slots=4, r_max=16)
    graphdef, frozen = split_adapters(model)
    bank = write_slot(bank, 0, LoraSpec(r=8), job_seed)

    @jax.jit
    def loss(a, b, bank, frozen, ...):
        model = merge_adapters(graphdef, frozen, bank._replace(a=a, b=b))

An adapter by itself is a dict from module path to (A [r, in], B [r, out]) of its true rank. In its
slot the rows beyond its rank and the modules it does not target are exact zeros, and stay so.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree, UInt32

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.linear import LoraContext, MultiLoRALinear
from lorafusion_jax.lora.targets import LoraSpec

type Matrix = Float[Array | np.ndarray, "_r _"]  # ranks may differ between modules
type Adapter = dict[str, tuple[Matrix, Matrix]]
type Stacks = dict[str, Float[Array, "slots r_max _"]]


class AdapterBank(NamedTuple):
    """The adapters of all slots.

    Attributes:
        a: per module path, A of each slot (PEFT's lora_A.weight), float32.
        b: per module path, B of each slot (PEFT's lora_B.weight transposed), float32.
        targeted: per module path, which slots train it.
        scale: LoRA scale per slot.
        rate: dropout rate per slot.
        rank: true rank per slot, 0 for a free one.
        ranks: rank per slot in its place, of the modules where some adapter has another one.
        ratios: per slot, for the same modules, their scale over `scale`. Both are empty where no
            adapter has patterns, and cost nothing then.
    """

    a: Stacks
    b: Stacks
    targeted: dict[str, Bool[Array, " slots"]]
    scale: Float[Array, " slots"]
    rate: Float[Array, " slots"]
    rank: Int[Array, " slots"]
    ranks: dict[str, Int[Array, " slots"]] = {}  # noqa: RUF012  (never changed in place)
    ratios: dict[str, Float[Array, " slots"]] = {}  # noqa: RUF012


def attach_adapters(
    model: nnx.Module, paths: Sequence[str], num_slots: int, r_max: int
) -> AdapterBank:
    """Gives the named linears of a model empty adapter stacks, in place; removes all others.

    Args:
        model: holds a `MultiLoRALinear` at each path.
        paths: module paths, such as those of `target_paths`.
        num_slots: adapters that fit.
        r_max: largest rank that fits.

    Returns:
        The empty bank; its stacks are the model's own arrays, not copies.

    Raises:
        AdapterError: a path does not lead to a `MultiLoRALinear`.
    """
    linears = multi_linears(model)
    for path in paths:
        if path not in linears:
            raise AdapterError(f"the model has no MultiLoRALinear at {path!r}")
    shapes = {path: (linears[path].in_features, linears[path].out_features) for path in paths}
    bank = empty_bank(shapes, num_slots, r_max)
    for path, linear in linears.items():
        linear.set_stacks(bank.a.get(path), bank.b.get(path))
    return bank


def multi_linears(model: nnx.Module) -> dict[str, MultiLoRALinear]:
    """Returns the `MultiLoRALinear`s of a model by module path."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, MultiLoRALinear)
    }


def split_adapters(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State]:
    """Splits a model into its structure and everything that is not an adapter."""
    graphdef, _, frozen = nnx.split(model, nnx.LoRAParam, ...)
    return graphdef, frozen


def merge_adapters(graphdef: nnx.GraphDef, frozen: nnx.State, bank: AdapterBank) -> nnx.Module:
    """Builds the model of `split_adapters` with a bank's adapters in it."""
    leaves = {}
    for name, stacks in (("lora_a", bank.a), ("lora_b", bank.b)):
        for path, stack in stacks.items():
            if name == "lora_b" and path in bank.ratios:
                stack = stack * bank.ratios[path].astype(stack.dtype)[:, None, None]
            parts = tuple(int(part) if part.isdigit() else part for part in path.split("."))
            leaves[(*parts, name)] = nnx.LoRAParam(stack)
    return nnx.merge(graphdef, nnx.from_flat_state(leaves), frozen)


def empty_bank(shapes: Mapping[str, tuple[int, int]], num_slots: int, r_max: int) -> AdapterBank:
    """Returns a bank of free slots for modules of the given (in, out) widths."""
    return AdapterBank(
        a={path: jnp.zeros((num_slots, r_max, k), jnp.float32) for path, (k, _) in shapes.items()},
        b={path: jnp.zeros((num_slots, r_max, n), jnp.float32) for path, (_, n) in shapes.items()},
        targeted={path: jnp.zeros(num_slots, bool) for path in shapes},
        scale=jnp.zeros(num_slots, jnp.float32),
        rate=jnp.zeros(num_slots, jnp.float32),
        rank=jnp.zeros(num_slots, jnp.int32),
    )


def with_patterns(bank: AdapterBank, paths: Iterable[str]) -> AdapterBank:
    """Returns the bank with a rank and a scale ratio of their own for modules; values as before."""
    new = [path for path in paths if path not in bank.ranks]
    ones = jnp.ones_like(bank.scale)
    return bank._replace(
        ranks=bank.ranks | {path: jnp.array(bank.rank) for path in new},
        ratios=bank.ratios | {path: jnp.array(ones) for path in new},
    )


def init_adapter(shapes: Mapping[str, tuple[int, int]], spec: LoraSpec, job_seed: int) -> Adapter:
    """Initialises an adapter as PEFT does; a function of the job's seed and the module paths only.

    Args:
        shapes: (in, out) widths of the modules it targets, by path.
        spec: rank and initialisation.
        job_seed: `pallas_kernels.job_seed` of the job.

    Returns:
        A and zero B by path, the same bits whatever slot, bank or r_max they are meant for.
    """
    return {path: _init_module(spec, job_seed, path, k, n) for path, (k, n) in shapes.items()}


def _init_module(spec: LoraSpec, job_seed: int, path: str, k: int, n: int):
    # On the host: a bank has hundreds of modules, and each shape would be a compilation.
    word = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big")
    bits, r = np.random.Philox(key=(job_seed, word)), spec.rank_of(path)
    if spec.init == "gaussian":
        a = np.random.Generator(bits).standard_normal((r, k), np.float32) / r
    else:
        # Raw words, whose stream NumPy never changes: 24 bits each, uniform in [-1, 1).
        words = bits.random_raw(r * k).reshape(r, k) >> np.uint64(40)
        a = (words.astype(np.float32) * np.float32(2**-23) - 1) * np.float32(k**-0.5)
    return a.astype(np.float32), np.zeros((r, n), np.float32)


def write_slot(
    bank: AdapterBank,
    slot: int,
    spec: LoraSpec,
    job_seed: int,
    paths: Sequence[str] | None = None,
) -> AdapterBank:
    """Returns the bank with a freshly initialised adapter in a slot, whatever lay there before.

    Args:
        bank: the bank.
        slot: which slot.
        spec: the adapter.
        job_seed: `pallas_kernels.job_seed` of the job.
        paths: the modules the adapter targets (`target_paths`); None for all of the bank.

    Raises:
        AdapterError: a path is not in the bank, or the rank is above the bank's r_max.
    """
    paths = list(bank.a) if paths is None else paths
    _check_paths(bank, paths)
    shapes = {path: (bank.a[path].shape[2], bank.b[path].shape[2]) for path in paths}
    return put_slot(bank, slot, spec, init_adapter(shapes, spec, job_seed))


def put_slot(bank: AdapterBank, slot: int, spec: LoraSpec, adapter: Adapter) -> AdapterBank:
    """Returns the bank with a given adapter in a slot, whatever lay there before.

    The bank gains `ranks` and `ratios` of the modules where the adapter's patterns need them.

    Raises:
        AdapterError: a module is not in the bank, or a shape or the rank does not fit.
    """
    _check_paths(bank, adapter)
    for path, (a, b) in adapter.items():
        _, r_max, k = bank.a[path].shape
        n, r = bank.b[path].shape[2], spec.rank_of(path)
        if a.shape != (r, k) or b.shape != (r, n):
            raise AdapterError(
                f"{path}: A {list(a.shape)} and B {list(b.shape)} do not fit, expected "
                f"[{r}, {k}] and [{r}, {n}]"
            )
        if r > r_max:
            raise AdapterError(f"r={r} does not fit the bank's r_max={r_max}")
    _check_slot(bank, slot)
    bank = with_patterns(bank, spec.patterned(adapter))
    r_max = next(iter(bank.a.values())).shape[1] if bank.a else 0

    def padded(rows) -> np.ndarray:
        return np.pad(np.asarray(rows), [(0, r_max - rows.shape[0]), (0, 0)])

    a = {path: padded(a) for path, (a, _) in adapter.items()}
    b = {path: padded(b) for path, (_, b) in adapter.items()}
    absent = {
        path: np.zeros(bank.a[path].shape[1:], np.float32) for path in bank.a if path not in a
    }
    a |= absent
    b |= {path: np.zeros(bank.b[path].shape[1:], np.float32) for path in absent}
    targeted = {path: np.bool_(path in adapter) for path in bank.a}
    scalars = (np.float32(spec.scale), np.float32(spec.dropout), np.int32(spec.r))
    ranks = {path: np.int32(spec.rank_of(path)) for path in bank.ranks}
    ratios = {path: np.float32(spec.scale_of(path) / spec.scale) for path in bank.ratios}
    return _set_slot(bank, np.int32(slot), (a, b, targeted, *scalars, ranks, ratios))


@jax.jit
def _set_slot(bank: AdapterBank, slot: Int[Array, ""], one: PyTree) -> AdapterBank:
    """One program for all slots and adapters of a bank; `one` is a bank without its slot axis."""
    return AdapterBank(*jax.tree.map(lambda leaf, x: leaf.at[slot].set(x), tuple(bank), one))


def clear_slot(bank: AdapterBank, slot: int) -> AdapterBank:
    """Returns the bank with exact zeros in a slot."""
    _check_slot(bank, slot)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), tuple(bank))
    return _set_slot(bank, np.int32(slot), zeros)


def read_slot(bank: AdapterBank, slot: int) -> Adapter:
    """Returns the adapter of a slot: the modules it targets, of its true rank."""
    _check_slot(bank, slot)
    one = jax.device_get(_get_slot(bank, np.int32(slot)))
    ranks = {path: one.ranks.get(path, one.rank) for path in one.a}
    return {
        path: (jnp.asarray(one.a[path][: ranks[path]]), jnp.asarray(one.b[path][: ranks[path]]))
        for path, targeted in one.targeted.items()
        if targeted
    }


@jax.jit
def _get_slot(bank: AdapterBank, slot: Int[Array, ""]) -> AdapterBank:
    """One program for all slots of a bank."""
    return jax.tree.map(lambda leaf: leaf[slot], bank)


def _check_slot(bank: AdapterBank, slot: int) -> None:
    if not 0 <= slot < bank.rank.shape[0]:
        raise AdapterError(f"{slot=} is not one of the bank's {bank.rank.shape[0]} slots")


def _check_paths(bank: AdapterBank, paths) -> None:
    unknown = [path for path in paths if path not in bank.a]
    if unknown:
        raise AdapterError(f"the bank has no module {unknown[0]!r} ({len(unknown)} such)")


def mask_gradients(bank: AdapterBank, a: Stacks, b: Stacks) -> tuple[Stacks, Stacks]:
    """Zeroes gradients of rank padding and of modules that a slot does not target."""

    def masked(path: str, gradient: Array) -> Array:
        rank = jnp.where(bank.targeted[path], bank.ranks.get(path, bank.rank), 0)
        rows = jnp.arange(gradient.shape[1])
        return jnp.where((rows[None, :] < rank[:, None])[:, :, None], gradient, 0)

    return (
        {path: masked(path, gradient) for path, gradient in a.items()},
        {path: masked(path, gradient) for path, gradient in b.items()},
    )


def lora_context(
    bank: AdapterBank,
    tile_adapter: Int[Array, " tiles"],
    row_key: UInt32[Array, " T"],
    *,
    train: bool,
) -> LoraContext:
    """Routes rows to a bank's slots; dropout acts in training only."""
    rate = bank.rate if train else jnp.zeros_like(bank.rate)
    return LoraContext(bank.scale, rate, tile_adapter, row_key)
