"""A base model with an adapter merged into its weights, as a Hugging Face directory.

Each weight becomes W + scale * B A, computed in float32 and rounded once to the dtype that is
stored. Tensors are read, merged and written shard by shard: memory holds one shard. All other
tensors are copied as they are, and so are the tokenizer's files.
"""

import fnmatch
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lorafusion_jax.errors import AdapterError, ModelError
from lorafusion_jax.lora.bank import Adapter
from lorafusion_jax.lora.safetensors_io import write_safetensors
from lorafusion_jax.lora.targets import LoraSpec
from lorafusion_jax.models.gguf_weights import read_gguf
from lorafusion_jax.models.hf_config import hf_config
from lorafusion_jax.models.hf_weights import Dtype, read_json, read_tensors
from lorafusion_jax.models.hub import local_model
from lorafusion_jax.models.tokenizer import gguf_tokenizer
from lorafusion_jax.models.weights import LazyTensor

_DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
)


def save_merged(
    directory: str | Path,
    model: str | Path,
    adapter: Adapter,
    spec: LoraSpec,
    *,
    dtype: Dtype | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes a model with an adapter merged into it.

    Args:
        directory: new or empty.
        model: the base: Hugging Face directory, GGUF file or hub id.
        adapter: (A [r, in], B [r, out]) by module path.
        spec: its scales.
        dtype: of the stored weights; None keeps that of the base's (bfloat16 for a GGUF file, whose
            own is a quantized one).
        max_shard_bytes: largest file of weights; a single tensor is never split.

    Returns:
        The directory.

    Raises:
        AdapterError: the directory holds files, or the adapter does not fit the model.
        ModelError: the base cannot be read, or not be described in Hugging Face's format.
    """
    directory = Path(directory).resolve()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise AdapterError(f"{directory} is not empty: choose a new or empty folder")
    source = local_model(model)
    gguf = source.suffix == ".gguf"
    if gguf:
        parsed, tensors, metadata = read_gguf(source)
        config, dtype = hf_config(parsed), dtype or "bfloat16"
        tokenizer = gguf_tokenizer(metadata, str(source))
    else:
        config, tensors, tokenizer = read_json(source / "config.json"), read_tensors(source), None
    tensors = {n: t for n, t in tensors.items() if not n.endswith("rotary_emb.inv_freq")}
    _check_fits(source, tensors, adapter)
    if dtype is not None:
        config = _with_dtype(config, dtype)
    fresh = directory.parent / f".{directory.name}.new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        wanted = None if dtype is None else _DTYPES[dtype]
        _write_weights(fresh, _shards(tensors, wanted, max_shard_bytes), adapter, spec, wanted)
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        else:
            for path in _files_to_copy(source):
                shutil.copyfile(path, fresh / path.name)
        if directory.exists():
            directory.rmdir()
        fresh.rename(directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def _check_fits(source: Path, tensors: Mapping[str, LazyTensor], adapter: Adapter) -> None:
    for path, (a, b) in adapter.items():
        tensor = tensors.get(f"{path}.weight")
        if tensor is None:
            raise AdapterError(f"{source}: the model has no {path}.weight to merge into")
        if tensor.shape != (b.shape[1], a.shape[1]):
            raise AdapterError(
                f"{source}: {path}.weight is {list(tensor.shape)}, the adapter is for "
                f"{[b.shape[1], a.shape[1]]}"
            )


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Under whichever of its two names the file has it."""
    return config | {"torch_dtype" if "torch_dtype" in config else "dtype": dtype}


def _shards(
    tensors: Mapping[str, LazyTensor], dtype: np.dtype | None, max_bytes: int
) -> list[dict[str, LazyTensor]]:
    """The tensors in the base's order, cut where a file would get too large."""
    shards: list[dict[str, LazyTensor]] = []
    room = -1
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape)) * (dtype or tensor.dtype).itemsize
        if size > room:
            shards.append({})
            room = max(max_bytes, size)
        shards[-1][name] = tensor
        room -= size
    return shards


def _write_weights(
    directory: Path,
    shards: list[dict[str, LazyTensor]],
    adapter: Adapter,
    spec: LoraSpec,
    dtype: np.dtype | None,
) -> None:
    weight_map, total = {}, 0
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        name = "model.safetensors" if len(shards) == 1 else name
        values = dict(_merged(shard, adapter, spec, dtype))
        write_safetensors(directory / name, values, {"format": "pt"})
        weight_map |= dict.fromkeys(values, name)
        total += sum(value.nbytes for value in values.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2) + "\n"
        (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _merged(
    shard: Mapping[str, LazyTensor], adapter: Adapter, spec: LoraSpec, dtype: np.dtype | None
) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in shard.items():
        value = tensor.read()
        stored = dtype or value.dtype
        path = name.removesuffix(".weight")
        with np.errstate(over="ignore", invalid="ignore"):
            if path in adapter:
                a, b = (np.asarray(x, np.float32) for x in adapter[path])
                value = value.astype(np.float32) + np.float32(spec.scale_of(path)) * (b.T @ a)
            rounded = value.astype(stored)
        if path in adapter and not np.isfinite(rounded).all():
            raise ModelError(f"{name}: merged values do not fit {stored}: choose another --dtype")
        yield name, rounded


def _files_to_copy(source: Path) -> list[Path]:
    return [
        path
        for path in sorted(source.iterdir())
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, rule) for rule in _COPIED)
    ]
