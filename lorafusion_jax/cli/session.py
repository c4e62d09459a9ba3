"""What every command that computes does first: compilation cache, device, base model."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafusion_jax.models import Base
    from lorafusion_jax.models.hf_weights import Dtype


def cache_folder() -> Path:
    """Returns the user's cache folder of this program (not created here)."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lorafusion-jax"


def start_jax() -> None:
    """Starts jax with compiled programs kept on disk, unless the user set that up otherwise.

    Not on several CPU devices: of 19 training runs on virtual meshes of 2 to 8 devices that took
    their programs from disk (jax 0.11.2), one ended in a segmentation fault as the pipeline's
    program was first called. Such meshes are for trying things out, and compile in seconds.
    """
    import jax

    several_cpus = jax.default_backend() == "cpu" and jax.device_count() > 1
    if jax.config.jax_compilation_cache_dir is None and not several_cpus:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    if jax.default_backend() == "cpu":
        _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Keeps glibc from handing the buffers of a step back to the system, where it can be told to.

    A step frees and takes hundreds of megabytes; page by page from the system again, that took
    half the time of a LoRA linear's backward pass on two cores (docs/lab_book/cpu.md).
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def device_line() -> str:
    """Describes the device in words, and says which LoRA kernels it will use."""
    import jax

    device, count = jax.devices()[0], len(jax.devices())
    kernels = "fused GPU kernels" if device.platform == "gpu" else "XLA (no fused GPU kernels)"
    return f"{device.device_kind} x{count}, LoRA by {kernels}"


def on_gpu() -> bool:
    """Says whether the default device is a GPU."""
    import jax

    return jax.default_backend() == "gpu"


def outline_base(path: str, dtype: "Dtype") -> "Base":
    """Returns a base model without its weights: shapes, names and tokenizer, in no time.

    Raises:
        ModelError: the path or the architecture cannot be used.
    """
    from functools import partial

    import jax.numpy as jnp
    from flax import nnx

    from lorafusion_jax.models import Base, Decoder, ModelConfig, load_base
    from lorafusion_jax.models.gguf_weights import read_gguf
    from lorafusion_jax.models.hf_weights import read_json
    from lorafusion_jax.models.hub import hub_id, local_model
    from lorafusion_jax.models.tokenizer import gguf_tokenizer, load_tokenizer

    hub, where = hub_id(path), local_model(path)
    if (where / "config.json").is_file():
        config = ModelConfig.from_hf(read_json(where / "config.json"))
        name = where.resolve().name if hub is None else hub.repo
        tokenizer = partial(load_tokenizer, where)
    elif where.suffix == ".gguf" and where.is_file():
        config, _, metadata = read_gguf(where)
        name, tokenizer = where.stem, partial(gguf_tokenizer, metadata, path)
    else:
        return load_base(path, dtype)  # says what is wrong with the path
    model = nnx.eval_shape(lambda: Decoder(config, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    return Base(model, config, path, name, tokenizer)
