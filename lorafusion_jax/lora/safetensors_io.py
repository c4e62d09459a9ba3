"""A strict reader and a byte-stable writer of safetensors files that hold floats.

The format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets},
"__metadata__": {str: str}}, then the data. Files come from strangers, so nothing in the header is
believed before it is checked: sizes are bounded before they are allocated, the tensors must tile
the data without overlap or hole, and whatever is wrong is an `AdapterError` that names it.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from lorafusion_jax.errors import AdapterError

MAX_HEADER_BYTES = 2 << 20  # 10,000 tensors; parsing can take twenty times as much memory
_METADATA = "__metadata__"
_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class _Entry(NamedTuple):
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_safetensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Writes tensors in the order of their names and flushes them to the disk.

    The bytes are a function of names, dtypes, shapes and values only.
    """
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
    end = 0
    for name in sorted(tensors):
        begin, end = end, end + tensors[name].nbytes
        dtype, shape = _NAMES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            # tobytes() is C order whatever the strides: a transposed view must not be written raw.
            file.write(tensors[name].tobytes())
        file.flush()
        os.fsync(file.fileno())


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads all tensors of a file, and its metadata.

    Raises:
        AdapterError: the file is not exactly what the format says.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        header, data_start = _read_header(path, file, size)
        metadata = _metadata(path, header.pop(_METADATA, {}))
        entries = {name: _entry(path, name, value) for name, value in header.items()}
        _check_tiling(path, entries, size - data_start)
        tensors = {}
        for name, entry in entries.items():
            file.seek(data_start + entry.begin)
            data = file.read(entry.end - entry.begin)
            if len(data) != entry.end - entry.begin:
                _refuse(path, f"{name!r}: the file ended while it was read")
            tensors[name] = np.frombuffer(data, entry.dtype).reshape(entry.shape)
    return tensors, metadata


def parse_json(path: Path, text: bytes) -> dict[str, Any]:
    """Parses a JSON object from a stranger: no duplicate keys, NaN or bad UTF-8.

    Raises:
        AdapterError: the text is anything else.
    """
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not valid JSON: {error or 'nested too deeply'}")
    if not isinstance(value, dict):
        _refuse(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def _refuse(path: Path, message: str) -> NoReturn:
    raise AdapterError(f"{path}: {message}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key!r}")
        result[key] = value
    return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _read_header(path: Path, file, size: int) -> tuple[dict[str, Any], int]:
    if size < 8:
        _refuse(path, f"{size} bytes are too few for a safetensors file")
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        _refuse(path, f"header of {length} bytes in a file of {size}: cut off, or not safetensors")
    if length > MAX_HEADER_BYTES:
        _refuse(path, f"header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
    text = file.read(length)
    if not text.startswith(b"{"):
        _refuse(path, "the header does not start with '{': not a safetensors file")
    return parse_json(path, text), 8 + length


def _metadata(path: Path, value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        _refuse(path, f"{_METADATA} must map strings to strings")
    return value


def _entry(path: Path, name: str, value: Any) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        _refuse(path, f"{name!r} must have dtype, shape and data_offsets, nothing else")
    if not isinstance(value["dtype"], str) or value["dtype"] not in _DTYPES:
        _refuse(path, f"{name!r} has dtype {value['dtype']!r}, expected one of {list(_DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not (_are_sizes(shape) and len(shape) <= 8 and _are_sizes(offsets) and len(offsets) == 2):
        _refuse(path, f"{name!r} has an impossible shape or data_offsets")
    dtype = _DTYPES[value["dtype"]]
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        _refuse(path, f"{name!r}: {value['dtype']}{shape} does not take {end - begin} bytes")
    return _Entry(dtype, tuple(shape), begin, end)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_tiling(path: Path, entries: Mapping[str, _Entry], data_size: int) -> None:
    """The tensors lie one after the other and fill the data."""
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a hole"
            _refuse(path, f"{name!r} starts at byte {entry.begin} of the data and {what}")
        at = entry.end
    if at != data_size:
        what = "is cut off" if at > data_size else "has bytes that belong to no tensor"
        _refuse(path, f"tensors take {at} bytes, the file has {data_size}: it {what}")
