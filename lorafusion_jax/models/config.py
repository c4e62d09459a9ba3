"""ModelConfig: the shape of a base model, read from a Hugging Face config.json or made by hand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lorafusion_jax.errors import ModelError
from pallas_kernels.activation import Activation


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for longer contexts.

    Attributes:
        kind: "linear" divides all frequencies by `factor`; "llama3" divides those of long
            wavelength and blends the ones in between; "factors" divides each by its own factor.
        factor: what frequencies are divided by ("linear", "llama3").
        low_freq_factor: wavelengths above original length / this are divided ("llama3").
        high_freq_factor: wavelengths below original length / this stay ("llama3").
        original_max_position_embeddings: context length before scaling ("llama3").
        factors: one divisor per frequency ("factors"; GGUF files store llama3 scaling so).
    """

    kind: Literal["linear", "llama3", "factors"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    factors: tuple[float, ...] = ()


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a decoder; Hugging Face's names and Llama's defaults.

    What families differ in is a feature here, so that the decoder never asks for a family's name.

    Attributes:
        model_type: Hugging Face's name of the family.
        eos_token_ids: generation stops at any of them.
        rope_theta: base of the rotary frequencies.
        attention_bias: q, k, v and o have biases.
        qkv_bias: q, k and v have biases (Qwen 2).
        qk_norm: every head of q and k is normalized before the rotation (Qwen 3, Gemma 3).
        norm_offset: what is added to the weights of all norms (1 for Gemma).
        post_norms: attention and feed-forward block are normalized before they are added (Gemma);
            the norm before the feed-forward block then has a name of its own.
        activation: of the gate; gelu_tanh is the approximation by tanh.
        embedding_scale: what embedded tokens are multiplied by.
        attention_scale: factor of the attention scores, None for 1 / sqrt(head_dim).
        attention_softcap: scores become cap * tanh(scores / cap); None for no cap.
        logit_softcap: the same of the logits.
        sliding_window: tokens that a token of a sliding layer sees at most, itself included.
        sliding_layers: whether each layer has the sliding window; empty for none.
        local_rope_theta: base of the rotary frequencies of the sliding layers, which are not
            scaled; None where they are like those of the other layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    local_rope_theta: float | None = None

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ModelError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")
        if self.sliding_layers and len(self.sliding_layers) != self.num_hidden_layers:
            raise ModelError(
                f"{len(self.sliding_layers)} layers are said to slide or not, expected one entry "
                f"for each of {self.num_hidden_layers}"
            )
        if any(self.sliding_layers) != (self.sliding_window is not None):
            raise ModelError(
                f"sliding_window {self.sliding_window} and sliding layers {self.sliding_layers}: "
                "expected both or neither"
            )

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a config.json, in the spelling of transformers 4 or 5.

        Args:
            values: the parsed JSON object.

        Returns:
            The config with Hugging Face's defaults of its family filled in.

        Raises:
            ModelError: the architecture, a key or its value is not supported, or a size is
                missing or impossible; the message names it.
        """
        from lorafusion_jax.models.hf_config import parse_hf_config

        return parse_hf_config(values)

    def layer_window(self, layer: int) -> int | None:
        """Returns how many tokens a token sees in a layer at most, None for all."""
        return self.sliding_window if self.is_sliding(layer) else None

    def is_sliding(self, layer: int) -> bool:
        """Says whether a layer has the sliding window."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]

    @property
    def mixed_layers(self) -> bool:
        """Whether some layers slide and others do not."""
        return len(set(self.sliding_layers)) > 1

    def rope_frequencies(self, *, local: bool = False) -> np.ndarray:
        """Returns the angle per position of each rotary pair, f32 [head_dim / 2].

        The llama3 rule is the one published with Llama 3.1.

        Args:
            local: of the sliding layers, where they have a base of their own.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
        if local and self.local_rope_theta is not None:
            return (self.local_rope_theta**-exponents).astype(np.float32)
        frequencies = self.rope_theta**-exponents
        match self.rope_scaling:
            case None:
                pass
            case RopeScaling(kind="linear", factor=factor):
                frequencies = frequencies / factor
            case RopeScaling(kind="factors", factors=factors):
                frequencies = frequencies / np.asarray(factors, np.float64)
            case RopeScaling(kind="llama3") as scaling:
                frequencies = _llama3_frequencies(frequencies, scaling)
        return frequencies.astype(np.float32)


def token_ids(values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Returns one id, a list of ids or nothing as a tuple.

    Raises:
        ModelError: it is something else.
    """
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list | tuple) else [value]
    if any(not isinstance(one, int) or isinstance(one, bool) for one in ids):
        raise ModelError(f"{key} is {value!r}: expected a whole number or a list of them")
    return tuple(ids)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)
