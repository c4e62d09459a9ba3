"""ModelConfig: the shape of a base model, read from a Hugging Face config.json or made by hand."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lorafusion_jax.errors import ModelError

_ARCHITECTURES = {"llama": "LlamaForCausalLM"}


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
    """The architecture of a Llama-family decoder; Hugging Face's names and defaults.

    Attributes:
        eos_token_ids: generation stops at any of them.
        rope_theta: base of the rotary frequencies.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ModelError(
                f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim {self.head_dim} is odd: rotary embedding needs pairs")

    @classmethod
    def from_hf(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """Reads the contents of a config.json, in the spelling of transformers 4 or 5.

        Args:
            values: the parsed JSON object.

        Returns:
            The config with Hugging Face's defaults filled in.

        Raises:
            ModelError: the architecture, activation or rope type is not supported, or a size is
                missing or impossible; the message names it.
        """
        _check_supported(values)
        sizes = {name: _size(values, name) for name in _NEEDED}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if values.get("head_dim") is None and hidden % heads:
            raise ModelError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads} "
                "and head_dim is not given"
            )
        theta, scaling = _rope(values)
        return cls(
            **sizes,
            num_key_value_heads=_size(values, "num_key_value_heads", heads),
            head_dim=_size(values, "head_dim", hidden // heads),
            rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=_size(values, "max_position_embeddings", 2048),
            tie_word_embeddings=bool(_or(values, "tie_word_embeddings", False)),
            attention_bias=bool(_or(values, "attention_bias", False)),
            mlp_bias=bool(_or(values, "mlp_bias", False)),
            bos_token_id=values.get("bos_token_id"),
            eos_token_ids=token_ids(values.get("eos_token_id")),
        )

    def rope_frequencies(self) -> np.ndarray:
        """Returns the angle per position of each rotary pair, f32 [head_dim / 2].

        The llama3 rule is the one published with Llama 3.1.
        """
        exponents = np.arange(0, self.head_dim, 2, dtype=np.float64) / self.head_dim
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


_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """Returns one id, a list of ids or nothing as a tuple."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else tuple(value)


def _or(values: Mapping[str, Any], key: str, default):
    """A null means the default, as in transformers."""
    value = values.get(key)
    return default if value is None else value


def _size(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = _or(values, key, default)
    if value is None:
        raise ModelError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {key} is {value!r}: expected a positive whole number")
    return value


def _check_supported(values: Mapping[str, Any]) -> None:
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    if model_type not in _ARCHITECTURES:
        raise ModelError(
            f"config.json: model_type {model_type!r} (architectures {architectures}) is not "
            f"supported: expected one of {sorted(_ARCHITECTURES)}"
        )
    expected = _ARCHITECTURES[model_type]
    if architectures and expected not in architectures:
        raise ModelError(f"config.json: architectures {architectures}: expected {expected!r}")
    if (activation := _or(values, "hidden_act", "silu")) != "silu":
        raise ModelError(f"config.json: hidden_act {activation!r}: only 'silu' is supported")
    if quantization := values.get("quantization_config"):
        method = quantization.get("quant_method", quantization)
        raise ModelError(
            f"config.json: the weights are quantized ({method}): use the unquantized model"
        )


def _rope(values: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: `rope_parameters` of transformers 5, else the two older keys."""
    parameters = _or(values, "rope_parameters", values.get("rope_scaling")) or {}
    if not isinstance(parameters, Mapping):
        raise ModelError(f"config.json: rope parameters are {parameters!r}: expected an object")
    theta = _number(parameters, "rope_theta", _number(values, "rope_theta", 10000.0))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(parameters, "factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            _number(parameters, "factor"),
            _number(parameters, "low_freq_factor"),
            _number(parameters, "high_freq_factor"),
            int(_number(parameters, "original_max_position_embeddings")),
        )
    raise ModelError(
        f"config.json: rope type {kind!r} is not supported: expected 'default', 'linear' or "
        "'llama3'"
    )


def _number(values: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = _or(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ModelError(f"config.json: {key} is {value!r}: expected a positive number")
    return float(value)


def _llama3_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)
