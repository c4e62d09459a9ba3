"""Shapes of the models that meshes are measured with, and the peak of their devices."""

from dataclasses import replace

from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.train import memory

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s of a device whose kind has this in its name."""

MODELS = {
    "8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500000.0),
    "32b": ModelConfig(152064, 5120, 27648, 64, 40, 8, 128, rope_theta=1000000.0, qkv_bias=True),
    "70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, rope_theta=500000.0),
    "tiny": ModelConfig(61, 32, 48, 8, 4, 2, 8),
}
"""Llama 3.1 8B and 70B, Qwen 2.5 32B, and one for tests."""


_PATHS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def model_shape(name: str, layers: int | None) -> ModelConfig:
    """Returns a shape, with another number of layers if asked.

    Raises:
        ConfigError: there is no such model.
    """
    if name not in MODELS:
        raise ConfigError(f"--model {name}: expected one of {', '.join(MODELS)}")
    return replace(MODELS[name], num_hidden_layers=layers or MODELS[name].num_hidden_layers)


def linear_widths(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns (in, out) of every linear of a layer, by its path inside the layer."""
    return dict(zip(_PATHS, memory.linear_widths(config), strict=True))


def peak_flops(device_kind: str) -> float | None:
    """Returns the device's dense bfloat16 peak, None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
