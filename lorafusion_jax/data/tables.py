"""Rows of CSV, TSV and Parquet files, of saved data sets and of the Hugging Face Hub.

CSV needs nothing; Parquet needs pyarrow, and data sets need `datasets`: both come with
`pip install 'lorafusion-jax[data]'` and are imported when they are first used.
"""

import csv
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from lorafusion_jax.data.records import MAX_LINE_BYTES, json_rows
from lorafusion_jax.errors import DataError

HUB = "hf://"
_ONLY_SPLIT = "train"  # what data without splits are
_DELIMITERS = {".csv": ",", ".tsv": "\t"}


def rows_of(
    path: str | Path, *, split: str = "train", subset: str | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields (line or row number, content) of each row of any kind of data.

    Args:
        path: JSONL, CSV, TSV or Parquet file by its suffix, a folder saved by `datasets`, or
            hf://OWNER/NAME.
        split: of a data set; files have none, and take none but the default.
        subset: configuration of a data set of the Hub.

    Raises:
        DataError: it cannot be read; names the package that is missing, the line or the row.
    """
    text = str(path)
    refuse_options(text, split, subset)
    if text.startswith(HUB):
        return _hub_rows(text, split, subset)
    suffix = Path(path).suffix.casefold()
    if Path(path).is_dir():
        return _folder_rows(text, split)
    if suffix in _DELIMITERS:
        return _csv_rows(text, _DELIMITERS[suffix])
    return _parquet_rows(text) if suffix == ".parquet" else json_rows(path)


def refuse_options(path: str, split: str, subset: str | None) -> None:
    """Refuses a split or subset where there can be none: other rows would be read than were meant.

    Raises:
        DataError: the path is a file, or a folder with a subset.
    """
    if path.startswith(HUB):
        return
    folder = Path(path).is_dir()
    if subset is not None:
        message = f"got subset {subset!r}, which only data sets of the Hub ({HUB}...) have: remove"
        raise DataError(f"{message} data.subset", path=path)
    if split != _ONLY_SPLIT and not folder:
        message = f"got split {split!r}, but a file has no splits: remove data.split, or give the"
        raise DataError(f"{message} file that holds these rows", path=path)


def _csv_rows(path: str, delimiter: str) -> Iterator[tuple[int, dict[str, str]]]:
    limit, line = csv.field_size_limit(MAX_LINE_BYTES), 1
    try:
        with open(path, "rb") as file:
            reader = csv.reader(_text_lines(file, path), delimiter=delimiter, strict=True)
            names = next(reader, None)
            _check_header(names, path)
            line = reader.line_num + 1  # of the next row, which may have several lines
            for cells in reader:
                if cells:
                    if len(cells) != len(names or ()):
                        message = f"{len(cells)} cells, expected {len(names or ())} as in line 1"
                        raise DataError(message, path=path, line=line)
                    yield line, dict(zip(names or (), cells, strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", path=path, line=line) from None
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path=path) from None
    finally:
        csv.field_size_limit(limit)


def _check_header(names: list[str] | None, path: str) -> None:
    if not names:
        raise DataError("has no first line with the names of the columns", path=path)
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"column {twice[:60]!r} is given twice", path=path, line=1)


def _text_lines(file: BinaryIO, path: str) -> Iterator[str]:
    for number, raw in enumerate(file, start=1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            message = f"byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8"
            raise DataError(message, path=path, line=number, column=error.start + 1) from None
        if "\0" in text:
            raise DataError("holds a NUL character", path=path, line=number)
        yield text


def _parquet_rows(path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    parquet = _optional("pyarrow.parquet", "pyarrow", path)
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path=path) from None
    except ValueError as error:  # pyarrow's own errors are ValueErrors
        reason = str(error).splitlines()[0]
        raise DataError(f"not Parquet: {reason}", path=path, line=number or None) from None


def _folder_rows(path: str, split: str) -> Iterator[tuple[int, Any]]:
    datasets = _optional("datasets", "datasets", path)
    try:
        loaded = datasets.load_from_disk(path)
    except Exception as error:  # the library raises whatever its parts raise
        message = f"is no folder that `datasets` saved: {_reason(error)}"
        raise DataError(message, path=path) from None
    if isinstance(loaded, dict):
        if split not in loaded:
            there = ", ".join(map(str, loaded))
            raise DataError(f"has no split {split!r}, there are: {there}", path=path)
        loaded = loaded[split]
    elif split not in (_ONLY_SPLIT, str(loaded.split)):
        message = f"holds one data set without splits, got split {split!r}: remove data.split"
        raise DataError(message, path=path)
    return enumerate(loaded, start=1)


def _hub_rows(path: str, split: str, subset: str | None) -> Iterator[tuple[int, Any]]:
    datasets = _optional("datasets", "datasets", path)
    try:
        loaded = datasets.load_dataset(path.removeprefix(HUB), subset, split=split)
    except Exception as error:
        message = f"cannot be loaded (split {split!r}, subset {subset!r}): {_reason(error)}"
        raise DataError(message, path=path) from None
    return enumerate(loaded, start=1)


def _optional(module: str, package: str, path: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError:
        message = f"needs the package {package}: pip install 'lorafusion-jax[data]'"
        raise DataError(message, path=path) from None


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
