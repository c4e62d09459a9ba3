"""Adapters in PEFT's format: a folder of adapter_config.json and adapter_model.safetensors.

Our A is PEFT's lora_A.weight; our B is its lora_B.weight transposed. What is written loads in PEFT,
vLLM and SGLang; it is a function of the adapter's values and words only, byte for byte. What is
read must be a plain LoRA of linears, whole and finite; anything else is refused by name.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import ml_dtypes
import numpy as np
from flax import nnx

from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.bank import Adapter
from lorafusion_jax.lora.peft_config import config_text, read_config
from lorafusion_jax.lora.safetensors_io import read_safetensors, write_safetensors
from lorafusion_jax.lora.targets import LoraSpec, named_modules, selects, target_paths

type Dtype = Literal["float32", "bfloat16"]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


class LoadedAdapter(NamedTuple):
    """An adapter read from a PEFT folder.

    Attributes:
        adapter: float32 (A [r, in], B [r, out]) by module path.
        spec: rank, scale, dropout and targets.
        base_model_name_or_path: what it was trained on, as the folder says.
        dtype: dtype it was stored in.
    """

    adapter: Adapter
    spec: LoraSpec
    base_model_name_or_path: str | None
    dtype: str


def save_peft(
    directory: str | Path,
    adapter: Adapter,
    spec: LoraSpec,
    base_model_name_or_path: str | None,
    dtype: Dtype = "float32",
) -> Path:
    """Writes a PEFT folder, replacing an older one as a whole.

    Args:
        directory: new, empty, or an older adapter's folder.
        adapter: (A [r, in], B [r, out]) by module path.
        spec: what the adapter is.
        base_model_name_or_path: what PEFT and the servers shall load it on.
        dtype: of the stored weights. PEFT keeps float32; servers cast to the base's dtype.

    Returns:
        The folder.

    Raises:
        AdapterError: the adapter is empty, not finite or not of the ranks of `spec`, or the folder
            holds other files.
    """
    directory = Path(directory).resolve()
    tensors = _tensors(adapter, spec, _DTYPES[dtype])
    config = config_text(spec, base_model_name_or_path, adapter)
    _refuse_foreign_files(directory)
    fresh = directory.parent / f".{directory.name}.new-{os.getpid()}"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        write_safetensors(fresh / WEIGHTS, tensors, {"format": "pt"})
        _write_durably(fresh / CONFIG, config)
        _replace_directory(fresh, directory)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return directory


def load_peft(directory: str | Path, model: nnx.Module | None = None) -> LoadedAdapter:
    """Reads a PEFT folder.

    Args:
        directory: holds adapter_config.json and adapter_model.safetensors.
        model: the model it is meant for; if given, its targeted modules and their widths must be
            exactly those of the adapter.

    Raises:
        AdapterError: the folder is not a whole, finite, plain LoRA adapter; the message names the
            file and the key or tensor.
    """
    directory = Path(directory)
    _check_files(directory)
    spec, base = read_config(directory / CONFIG)
    tensors, _ = read_safetensors(directory / WEIGHTS)
    adapter = _adapter(directory / WEIGHTS, tensors, spec)
    if model is not None:
        _check_model(directory, adapter, spec, model)
    stored = {str(tensor.dtype) for tensor in tensors.values()}
    if len(stored) > 1:
        raise AdapterError(f"{directory / WEIGHTS}: mixed dtypes {sorted(stored)}")
    return LoadedAdapter(adapter, spec, base, stored.pop())


def _tensors(adapter: Adapter, spec: LoraSpec, dtype: np.dtype) -> dict[str, np.ndarray]:
    if not adapter:
        raise AdapterError("the adapter has no modules: nothing to save")
    tensors = {}
    for path, (a, b) in adapter.items():
        rank = spec.rank_of(path)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[0] == rank:
            raise AdapterError(
                f"{path}: A {list(a.shape)} and B {list(b.shape)}, expected {rank} rows of each"
            )
        for name, value in (("lora_A", np.asarray(a)), ("lora_B", np.asarray(b).T)):
            value = value.astype(dtype)
            if not np.isfinite(value).all():
                raise AdapterError(f"{path}: {name} holds NaN or infinity and is not saved")
            tensors[f"{_PREFIX}{path}.{name}.weight"] = value
    return tensors


def _write_durably(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _refuse_foreign_files(directory: Path) -> None:
    """Replacing the folder deletes what is in it, so only adapters may be."""
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"{directory} is a file, expected a folder")
    others = sorted({p.name for p in directory.glob("*")} - {CONFIG, WEIGHTS})
    if others:
        raise AdapterError(
            f"{directory} holds other files, such as {others[0]!r}: choose a new or empty folder"
        )


def _replace_directory(fresh: Path, directory: Path) -> None:
    """Puts `fresh` in place; a reader sees the old folder, none for an instant, or the new one."""
    old = directory.parent / f".{directory.name}.old-{os.getpid()}"
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
    parent = os.open(directory.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _check_files(directory: Path) -> None:
    if not (directory / CONFIG).is_file():
        deeper = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG}"))
        hint = f"; there is one in its sub-folder {deeper[0]!r}" if deeper else ""
        raise AdapterError(f"{directory}: no {CONFIG}{hint}")
    if not (directory / WEIGHTS).is_file():
        pickled = (directory / "adapter_model.bin").exists()
        hint = ": adapter_model.bin is a pickle and is never read, convert it" if pickled else ""
        raise AdapterError(f"{directory}: no {WEIGHTS}{hint}")


def _adapter(path: Path, tensors: Mapping[str, np.ndarray], spec: LoraSpec) -> Adapter:
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, half = _parse_name(path, name)
        if not np.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name!r} holds NaN or infinity")
        axis, rank = 0 if half == "lora_A" else 1, spec.rank_of(module)
        if tensor.ndim != 2 or tensor.shape[axis] != rank:
            raise AdapterError(
                f"{path}: {name!r} is {list(tensor.shape)}, expected axis {axis} to be r={rank}"
            )
        halves.setdefault(module, {})[half] = tensor.astype(np.float32)
    if not halves:
        raise AdapterError(f"{path}: no tensors")
    for module, found in halves.items():
        if len(found) != 2:
            missing = "lora_B" if "lora_A" in found else "lora_A"
            raise AdapterError(f"{path}: {module} has no {missing}.weight")
        if not selects(spec, module):
            raise AdapterError(f"{path}: {module} is not among the config's target_modules")
    return {
        module: (found["lora_A"], np.ascontiguousarray(found["lora_B"].T))
        for module, found in sorted(halves.items())
    }


_FOREIGN = (
    ("lora_magnitude_vector", "DoRA"),
    ("lora_embedding_", "a LoRA of an embedding"),
    ("lora_B.bias", "a LoRA bias"),
)


def _parse_name(path: Path, name: str) -> tuple[str, str]:
    """Splits a tensor's name into module path and "lora_A" or "lora_B"."""
    for half in ("lora_A", "lora_B"):
        if name.startswith(_PREFIX) and name.endswith(f".{half}.weight"):
            return name.removeprefix(_PREFIX).removesuffix(f".{half}.weight"), half
    what = next((what for part, what in _FOREIGN if part in name), "not a LoRA weight")
    raise AdapterError(
        f"{path}: {name!r} is {what}, expected {_PREFIX}<module>.lora_A.weight or .lora_B.weight"
    )


def _check_model(directory: Path, adapter: Adapter, spec: LoraSpec, model: nnx.Module) -> None:
    modules = named_modules(model)
    unknown = [path for path in adapter if path not in modules]
    if unknown:
        raise AdapterError(f"{directory}: the model has no module {unknown[0]!r}")
    missing = sorted(set(target_paths(model, spec)) - set(adapter))
    if missing:
        raise AdapterError(
            f"{directory}: target_modules also names {missing[0]!r} of the model, for which there "
            f"are no weights ({len(missing)} such)"
        )
    for path, (a, b) in adapter.items():
        linear = modules[path]
        expected = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
        if (a.shape[1], b.shape[1]) != expected:
            raise AdapterError(
                f"{directory}: {path} maps {a.shape[1]} to {b.shape[1]} values, the model's linear "
                f"{expected[0]} to {expected[1]}"
            )
