"""Model shapes of the benchmarks, and the floating-point work of training them."""

from collections.abc import Iterable
from dataclasses import replace

from lorafusion_jax.errors import ConfigError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.train.memory import linear_widths

H100_PEAK = 989e12
"""Dense bfloat16 FLOP/s of one H100."""

MODELS = {
    "llama-3.1-8b": ModelConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, rope_theta=500000.0,
        max_position_embeddings=131072, tie_word_embeddings=False,
    ),
    "smollm2-135m": ModelConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, rope_theta=100000.0,
        max_position_embeddings=8192, tie_word_embeddings=True,
    ),
    "tiny": ModelConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=8192, tie_word_embeddings=True,
    ),
}  # fmt: skip


def model_shape(name: str, layers: int | None = None) -> ModelConfig:
    """Returns the shape of a model by name, with fewer layers if so asked.

    Raises:
        ConfigError: there is no such model here.
    """
    if name not in MODELS:
        raise ConfigError(f"--model {name}: expected one of {', '.join(MODELS)}")
    config = MODELS[name]
    return config if layers is None else replace(config, num_hidden_layers=layers)


def layer_flops(config: ModelConfig, lengths: Iterable[int], r: int) -> float:
    """Returns the work of one layer, forward and backward, over samples of these lengths.

    Four per frozen weight and token (forward and dX), the LoRA products (S, S B, dS, dS A, dA, dB),
    and causal attention, whose backward pass is 2.5 forward passes.
    """
    lengths = list(lengths)
    tokens = sum(lengths)
    widths = linear_widths(config)
    frozen = 4.0 * tokens * sum(k * n for k, n in widths)
    lora = 12.0 * tokens * r * sum(k + n for k, n in widths) / 2
    heads = config.num_attention_heads * config.head_dim
    attention = 3.5 * 2.0 * heads * sum(n * n for n in lengths)
    return frozen + lora + attention


def step_flops(config: ModelConfig, lengths: Iterable[int], r: int) -> float:
    """Returns the work of all layers and of the head, forward and backward; padding earns none."""
    lengths = list(lengths)
    head = 4.0 * sum(lengths) * config.vocab_size * config.hidden_size
    return config.num_hidden_layers * layer_flops(config, lengths, r) + head
