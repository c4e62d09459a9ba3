"""What every command that computes does first: compilation cache, device, base model."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Returns the user's cache folder of this program (not created here)."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "lorafusion-jax"


def start_jax() -> None:
    """Starts jax with compiled programs kept on disk, unless the user set that up otherwise."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.devices()


def device_line() -> str:
    """Describes the device in words, and says which LoRA kernels it will use."""
    import jax

    device, count = jax.devices()[0], len(jax.devices())
    kernels = "fused GPU kernels" if device.platform == "gpu" else "XLA (no fused GPU kernels)"
    return f"{device.device_kind} x{count}, LoRA by {kernels}"
