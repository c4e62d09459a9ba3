"""Where a job's adapter starts: from a PEFT folder that must be exactly what the job describes."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from lorafusion_jax.config import JobConfig
from lorafusion_jax.errors import AdapterError
from lorafusion_jax.lora.bank import Adapter
from lorafusion_jax.lora.peft_io import LoadedAdapter, load_peft
from lorafusion_jax.lora.targets import LoraSpec, named_modules


def initial_adapter(
    directory: str | Path, job: JobConfig, model: nnx.Module, targets: Sequence[str]
) -> Adapter:
    """Reads the adapter that a job goes on from.

    Args:
        directory: PEFT folder.
        job: whose `lora` section must describe the adapter.
        model: the base model; its linears must have the adapter's widths.
        targets: paths of the modules that the job trains.

    Returns:
        Float32 A and B by module path.

    Raises:
        AdapterError: the folder is not a whole, finite LoRA, or not this job's: names the key.
    """
    loaded = load_peft(directory)
    spec, where = LoraSpec.from_config(job.lora), f"jobs.{job.name}.lora"
    problems = [*_differences(spec, loaded), *_module_differences(targets, loaded.adapter)]
    if problems:
        raise AdapterError(
            f"{where}.init_from: {directory} is not the adapter that the job describes:\n  "
            + "\n  ".join(f"{where}.{key}: {text}" for key, text in problems)
            + "\n`lorafusion import` writes the section that fits"
        )
    modules = named_modules(model)
    for path, (a, b) in loaded.adapter.items():
        linear = modules[path]
        widths = getattr(linear, "in_features", None), getattr(linear, "out_features", None)
        if (a.shape[1], b.shape[1]) != widths:
            raise AdapterError(
                f"{where}.init_from: {directory}: {path} maps {a.shape[1]} to {b.shape[1]} values, "
                f"the model's linear {widths[0]} to {widths[1]}: it is another model's adapter"
            )
    return loaded.adapter


def adapter_fingerprint(adapter: Adapter) -> str:
    """Returns a SHA-256 of an adapter's modules and values."""
    digest = hashlib.sha256()
    for path, (a, b) in sorted(adapter.items()):
        digest.update(f"{path}{a.shape}{b.shape}".encode())
        for half in (a, b):
            digest.update(np.ascontiguousarray(half, np.float32).tobytes())
    return digest.hexdigest()


def _differences(spec: LoraSpec, loaded: LoadedAdapter) -> list[tuple[str, str]]:
    """Ranks and scales that differ, by key of the job's section."""
    theirs, paths = loaded.spec, list(loaded.adapter)
    rank = next((path for path in paths if spec.rank_of(path) != theirs.rank_of(path)), None)
    if rank is not None:
        patterned = bool(spec.rank_pattern or theirs.rank_pattern)
        got, expected = spec.rank_of(rank), theirs.rank_of(rank)
        at = f" at {rank}" if patterned else ""
        return [
            ("rank_pattern" if patterned else "r", f"got {got}{at}, the adapter has {expected}")
        ]
    scale = next((path for path in paths if spec.scale_of(path) != theirs.scale_of(path)), None)
    if scale is None:
        return []
    got, expected = spec.scale_of(scale), theirs.scale_of(scale)
    if spec.use_rslora != theirs.use_rslora:
        return [("use_rslora", f"got {spec.use_rslora}, the adapter has {theirs.use_rslora}")]
    patterned = bool(spec.alpha_pattern or theirs.alpha_pattern)
    alpha = f"alpha={theirs.alpha:g}"
    text = f"gives a scale of {got:g} at {scale}, the adapter has {expected:g} ({alpha})"
    return [("alpha_pattern" if patterned else "alpha", text)]


def _module_differences(targets: Sequence[str], adapter: Adapter) -> list[tuple[str, str]]:
    extra = sorted(set(adapter) - set(targets))
    missing = sorted(set(targets) - set(adapter))
    found = []
    if extra:
        text = f"leave out {extra[0]}, which the adapter has ({len(extra)} such)"
        found.append(("target_modules", text))
    if missing:
        text = f"name {missing[0]}, which the adapter does not have ({len(missing)} such)"
        found.append(("target_modules", text))
    return found
