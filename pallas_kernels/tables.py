"""Chooses tile sizes: what a caller set, a measured table, or a heuristic, in that order.

A table is a JSON file of measured sizes, made by `lorafusion bench kernels --tune`. Shapes match by
bucket: rows, inputs and outputs to the next power of two. A damaged table costs one warning.
"""

import contextlib
import contextvars
import functools
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.tuning import OPERATIONS, GradDownTiles, GradUpTiles, Shape, Sizes

_SHIPPED = Path(__file__).parent / "tuned"
# Devices of compute capability 9.0 without a table of their own are served by that of the H100.
_TABLE_OF = {"h100": "h100.json", "h200": "h200.json"}
_DEFAULT_TABLE = "h100.json"
_forced: contextvars.ContextVar[dict[str, Sizes] | None] = contextvars.ContextVar(
    "sizes", default=None
)
_atomic: contextvars.ContextVar[bool] = contextvars.ContextVar("atomic", default=False)
_own_table: contextvars.ContextVar[Path | None] = contextvars.ContextVar("table", default=None)

type Key = tuple[str, int, int, int, int]


def _bucket(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def key_of(op: str, shape: Shape) -> Key:
    """Returns the bucket of an operation and shape."""
    return op, _bucket(shape.rows), _bucket(shape.k), _bucket(sum(shape.widths)), shape.rank


def entry(op: str, shape: Shape, sizes: Sizes, us: float) -> dict:
    """Returns a table's entry: the best sizes for a shape, and their time in microseconds."""
    fields = {name: getattr(sizes, name) for name in sizes.__dataclass_fields__}
    where = {"op": op, "rows": shape.rows, "k": shape.k, "n": sum(shape.widths)}
    return {**where, "rank": shape.rank, "us": us, "sizes": fields}


@functools.cache
def read_table(path: Path) -> dict[Key, Sizes]:
    """Reads a table; an unreadable one, or one with impossible sizes, is empty and warned of."""
    try:
        table = {}
        for row in json.loads(path.read_text())["entries"]:
            shape = Shape(row["rows"], row["k"], (row["n"],), row["rank"])
            table[key_of(row["op"], shape)] = OPERATIONS[row["op"]][0](**row["sizes"])
        return table
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path}: not a table of tile sizes ({type(error).__name__}: {error}); heuristics are "
            "used. Write a new one with: lorafusion bench kernels --tune",
            stacklevel=2,
        )
        return {}


def _shipped_table() -> Path:
    kind = jax.devices()[0].device_kind.lower() if jax.default_backend() == "gpu" else ""
    names = [name for device, name in _TABLE_OF.items() if device in kind]
    path = _SHIPPED / (names[0] if names else _DEFAULT_TABLE)
    return path if path.exists() else _SHIPPED / _DEFAULT_TABLE


def choose(op: str, shape: Shape) -> Any:
    """Returns the tile sizes of an operation for a shape, of the operation's own class."""
    forced = _forced.get() or {}
    if op in forced:
        return forced[op]
    table = read_table(_own_table.get() or _shipped_table())
    sizes = table.get(key_of(op, shape)) or OPERATIONS[op][1](shape)
    if _atomic.get() and isinstance(sizes, GradUpTiles | GradDownTiles):
        return replace(sizes, atomic=True)
    return sizes


def chosen() -> str:
    """Describes what `choose` goes by here, for those who keep programs that it has shaped."""
    table = _own_table.get() or _shipped_table()
    text = table.read_text() if table.is_file() else ""
    return f"{_forced.get()} {_atomic.get()} {table.name} {text}"


@contextlib.contextmanager
def _setting(variable: contextvars.ContextVar, value) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def using(**sizes: Sizes) -> contextlib.AbstractContextManager[None]:
    """Fixes the sizes of some operations, by name, in what is traced inside."""
    for op, value in sizes.items():
        if op not in OPERATIONS or not isinstance(value, OPERATIONS[op][0]):
            raise ValueError(f"{op}={value!r}: expected one of {sorted(OPERATIONS)} and its sizes")
    return _setting(_forced, {**(_forced.get() or {}), **sizes})


def using_table(path: str | Path) -> contextlib.AbstractContextManager[None]:
    """Takes sizes from a table of one's own, in what is traced inside."""
    return _setting(_own_table, Path(path))


def atomic_gradients() -> contextlib.AbstractContextManager[None]:
    """Adds up dA and dB by atomic additions in what is traced inside: faster, not repeatable."""
    return _setting(_atomic, True)
