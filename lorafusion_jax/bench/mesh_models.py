"""Shapes of the models that meshes are measured with, and the work of training them."""

from collections.abc import Iterable
from dataclasses import replace

from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.config import ModelConfig

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}
"""Dense bfloat16 FLOP/s of a device whose kind has this in its name."""

MODELS = {
    "8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128, rope_theta=500000.0),
    "32b": ModelConfig(152064, 5120, 27648, 64, 40, 8, 128, rope_theta=1000000.0, qkv_bias=True),
    "70b": ModelConfig(128256, 8192, 28672, 80, 64, 8, 128, rope_theta=500000.0),
    "tiny": ModelConfig(61, 32, 48, 8, 4, 2, 8),
}
"""Llama 3.1 8B and 70B, Qwen 2.5 32B, and one for tests."""


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
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = (
        heads * config.head_dim
        for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    return {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }


def train_flops(config: ModelConfig, lengths: Iterable[int], r: int) -> float:
    """Returns the work of forward and backward over samples of these lengths; padding earns none.

    Four per frozen weight and token (head included, look-up not), the LoRA products, and causal
    attention, whose backward is 2.5 forwards.
    """
    lengths = list(lengths)
    tokens = sum(lengths)
    widths = linear_widths(config).values()
    heads = config.num_attention_heads * config.head_dim
    layer = 4.0 * tokens * sum(k * n for k, n in widths)
    layer += 6.0 * tokens * r * sum(k + n for k, n in widths)
    layer += 3.5 * 2.0 * heads * sum(n * n for n in lengths)
    head = 4.0 * tokens * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer + head


def peak_flops(device_kind: str) -> float | None:
    """Returns the device's dense bfloat16 peak, None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_kind), None)
