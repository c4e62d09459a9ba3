"""Tokenised files on disk, found again by content: rows, tokenizer and settings.

A cache file is whole or absent (written aside, then renamed) and carries the fingerprint of what
it holds; a damaged one is rebuilt.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lorafusion_jax.data.chat import Learn
from lorafusion_jax.data.dataset import Dataset
from lorafusion_jax.data.records import Columns, Format, Record, records_of, with_system
from lorafusion_jax.data.tables import HUB, refuse_options, rows_of
from lorafusion_jax.data.tokenize import Overlong, tokenize_dataset
from lorafusion_jax.errors import DataError

# Part of every key: raise it when the same rows would give other tokens or masks.
_VERSION = 1


def load_dataset(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    format: Format = "auto",
    columns: Columns | None = None,
    split: str = "train",
    subset: str | None = None,
    system: str | None = None,
    learn: Learn = "answers",
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Reads and tokenises a file or a data set, or takes the result from the cache.

    Args:
        path: of any kind that `lorafusion_jax.data.tables.rows_of` reads.
        tokenizer: of `transformers`, fast.
        max_length: longest sample in tokens.
        overlong: see `tokenize_dataset`.
        format: see `read_records`; also `columns`.
        columns: the data's own name of a key, by the format's.
        split: of a data set; see `rows_of`, also `subset`.
        subset: configuration of a data set.
        system: see `with_system`.
        learn: see `tokenize_dataset`; also `vocab_size`.
        vocab_size: rows of the model's embedding.
        cache_dir: folder of the cache, made if needed; None neither reads nor writes one. Only
            files are kept there.

    Raises:
        DataError: the file cannot be used.
    """
    settings = {
        "max_length": max_length,
        "overlong": overlong,
        "format": format,
        "vocab_size": vocab_size,
        "columns": dict(columns or {}),
        "system": system,
        "learn": learn,
    }
    refuse_options(str(path), split, subset)
    cached = None
    if cache_dir is not None and not str(path).startswith(HUB) and not Path(path).is_dir():
        key = _key(_file_digest(path), tokenizer_fingerprint(tokenizer), settings)
        cached = Path(cache_dir) / f"{key}.npz"
        dataset = _read(cached)
        if dataset is not None:
            return dataset
    dataset = tokenize_dataset(
        read_source(path, format, columns, split=split, subset=subset, system=system),
        tokenizer,
        max_length=max_length,
        overlong=overlong,
        vocab_size=vocab_size,
        learn=learn,
        name=str(path),
    )
    if cached is not None:
        _write(cached, dataset)
    return dataset


def read_source(
    path: str | Path,
    format: Format = "auto",
    columns: Columns | None = None,
    *,
    split: str = "train",
    subset: str | None = None,
    system: str | None = None,
) -> list[Record]:
    """Reads the rows of a file or a data set; see `load_dataset`."""
    rows = rows_of(path, split=split, subset=subset)
    records = records_of(rows, str(path), format, columns)
    return records if system is None else with_system(records, system, str(path))


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Returns a SHA-256 of all that decides a fast tokenizer's output."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Changed by the last call, and unused here.
    del state["truncation"], state["padding"]
    parts = [state, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    parts.append(sorted(tokenizer.all_special_ids))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _key(file: str, tokenizer: str, settings: dict[str, Any]) -> str:
    text = json.dumps([_VERSION, file, tokenizer, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _file_digest(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"cannot be read: {reason}", path=str(path)) from None


def _read(path: Path) -> Dataset | None:
    try:
        # Opened here, because np.load leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            truncated, dropped = (int(count) for count in arrays["counts"])
            dataset = Dataset(
                tokens=arrays["tokens"],
                supervised=arrays["supervised"],
                offsets=arrays["offsets"],
                lines=arrays["lines"],
                truncated=truncated,
                dropped=dropped,
            )
            whole = str(arrays["fingerprint"]) == dataset.fingerprint
    except FileNotFoundError:
        return None
    except Exception:  # a damaged archive raises many things, and all mean: build it again
        return None
    return dataset if whole else None


def _write(path: Path, dataset: Dataset) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".tmp-", suffix=".npz")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                tokens=dataset.tokens,
                supervised=dataset.supervised,
                offsets=dataset.offsets,
                lines=dataset.lines,
                counts=np.asarray([dataset.truncated, dataset.dropped]),
                fingerprint=np.asarray(dataset.fingerprint),
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
