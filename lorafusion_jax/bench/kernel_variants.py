"""Compares tile sizes of the fused kernels: one kernel at a time, or whole linears side by side."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import jax

from lorafusion_jax.bench.linears import Case, make_operands, passes
from lorafusion_jax.bench.timing import kernel_times
from pallas_kernels import tables
from pallas_kernels.tuning import OPERATIONS, GemmTiles, Shape, Sizes, candidates

_PASS_OF = {"down": "fwd", "base_up": "fwd", "grad_up": "bwd", "grad_down": "bwd", "dx": "bwd"}
_SUMS = "lora_sum_segments"  # what grad_up and grad_down leave to add up


def shape_of(case: Case) -> Shape:
    """Returns the shape that the tables know a case by."""
    rank = -(-case.r // 8) * 8 if case.r <= 64 else -(-case.r // 64) * 64
    return Shape(case.tokens, case.k, case.ns, rank)


def _microseconds(op: str, times: list[tuple[str, float]]) -> float:
    """Time of an operation among a call's kernels, its ordered sums included."""
    own = sum(us for name, us in times if f"lora_{op}_" in name)
    sums = sum(us for name, us in times if _SUMS in name)
    return own + (sums if op.startswith("grad_") else 0.0)


def kernels_of(case: Case, which: str) -> list[tuple[str, float]]:
    """Returns name and microseconds of each kernel of our forward or backward pass."""
    operands, functions = make_operands(case, 0), passes("ours")
    if which == "fwd":
        return kernel_times(functions["fwd"], (operands,))
    return kernel_times(functions["bwd"], (functions["fwd"](operands)[1], operands))


def tune(
    case: Case,
    report: Callable[[str], None] = print,
    measure: Callable[[Case, str], list[tuple[str, float]]] = kernels_of,
) -> list[dict]:
    """Times the candidates of every operation on a case; returns the entries of a table.

    Args:
        case: the shape.
        report: gets a line per candidate.
        measure: gives the kernel times of a pass.
    """
    entries, shape = [], shape_of(case)
    for op in OPERATIONS:
        found: list[tuple[float, float, Sizes]] = []
        for sizes in candidates(op, shape):
            # No product absorbs what is to be timed alone.
            with tables.using(**(_products() | {op: sizes})):
                times = measure(case, _PASS_OF[op])
            us, whole = _microseconds(op, times), sum(time for _, time in times)
            report(f"  {op:<10} {us:9.2f} us of {whole:9.2f}  {sizes}")
            # A product may do the work of another kernel as well: what counts is the whole pass.
            found.append((whole if isinstance(sizes, GemmTiles) else us, us, sizes))
        _, us, best = min(found, key=lambda found: found[0])
        entries.append(tables.entry(op, shape, best, round(us, 2)))
    return entries


def write_table(entries: list[dict], path: Path) -> None:
    """Writes a table that `pallas_kernels.tables.using_table` takes; keeps its other shapes."""

    def which(entry):
        return tuple(entry[name] for name in ("op", "rows", "k", "n", "rank"))

    found = json.loads(path.read_text())["entries"] if path.exists() else []
    measured = {which(entry) for entry in entries}
    record = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "entries": [entry for entry in found if which(entry) not in measured] + entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _products(**change) -> dict[str, Sizes]:
    """Sizes of both large products with some fields changed."""
    return {
        "base_up": replace(GemmTiles("m", minor="m", width=16), **change),
        "dx": replace(GemmTiles(), **change),
    }


# What the lab book predicts something of.
_SEPARATE, _BOTH = _products(), _products(absorb=True)
VARIANTS: dict[str, dict[str, Sizes]] = {
    "separate": _SEPARATE,
    "absorbed S": {**_SEPARATE, "base_up": _BOTH["base_up"]},
    "absorbed dA": {**_SEPARATE, "dx": _BOTH["dx"]},
    "both": _BOTH,
}


def variant_calls(sets: list) -> dict[str, tuple]:
    """Function and argument sets of each variant's forward and backward pass, compiled."""
    calls = {}
    for name, sizes in VARIANTS.items():
        calls[f"ours: {name}"] = _compiled(sets, tables.using(**sizes))
    calls["ours: atomic"] = _compiled(sets, tables.atomic_gradients())
    with tables.using(**VARIANTS["both"]):
        calls["ours: both, atomic"] = _compiled(sets, tables.atomic_gradients())
    return calls


def _compiled(sets: list, choice: AbstractContextManager) -> tuple[Callable, list[tuple]]:
    function, arguments = passes("ours")["fwdbwd"], [(o,) for o in sets]
    with choice:
        jax.block_until_ready(function(*arguments[0]))
    return function, arguments
