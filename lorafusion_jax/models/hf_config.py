"""config.json of Hugging Face, in the spelling of transformers 4 or 5, family by family.

Strict: a key that is neither understood for its family nor known to change nothing is refused by
name, unless its value asks for nothing (null, false, 0, empty).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models.config import ModelConfig, RopeScaling, token_ids

type Values = Mapping[str, Any]


@dataclass(frozen=True)
class _Family:
    """What is particular to a family.

    Attributes:
        architecture: name of its causal language model in transformers.
        features: fields of ModelConfig beyond the sizes that all families have.
        keys: keys of config.json that are read beside the common ones.
        defaults: transformers' values of keys that are not given, where not Llama's.
        activation: the one supported value of hidden_act or hidden_activation.
    """

    architecture: str
    features: Callable[[Values], dict[str, Any]]
    keys: frozenset[str] = frozenset()
    defaults: Values = field(default_factory=dict)
    activation: str = "silu"


def parse_hf_config(values: Values) -> ModelConfig:
    """Reads the contents of a config.json; see `ModelConfig.from_hf`."""
    family = _family(values)
    _refuse_unknown_keys(values, family)
    # Only a key that is missing has the family's default: null may mean "none of it".
    values = {**family.defaults, **values}
    for key in ("hidden_act", "hidden_activation"):
        if (given := _or(values, key, family.activation)) != family.activation:
            raise ModelError(
                f"config.json: {key} {given!r}: only {family.activation!r} is supported"
            )
    sizes = {name: _size(values, name) for name in _SIZES}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    if values.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads} "
            "and head_dim is not given"
        )
    features = {"rope": _rope, **family.features(values)}
    theta, scaling = features.pop("rope")(values)
    return ModelConfig(
        **sizes,
        model_type=values["model_type"],
        num_key_value_heads=_size(values, "num_key_value_heads", heads),
        head_dim=_size(values, "head_dim", hidden // heads),
        rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=_size(values, "max_position_embeddings", 2048),
        tie_word_embeddings=bool(_or(values, "tie_word_embeddings", False)),
        bos_token_id=next(iter(token_ids(values, "bos_token_id")), None),
        eos_token_ids=token_ids(values, "eos_token_id"),
        **features,
    )


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Returns a config.json for a model that came without one.

    Raises:
        ModelError: the model has a feature that is not written.
    """
    if config.model_type not in ("llama", "qwen2", "qwen3"):
        raise ModelError(f"config.json of model_type {config.model_type!r} cannot be written")
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind != "linear":
        raise ModelError(
            f"rope scaling {scaling.kind!r} of the file cannot be said in config.json: use the "
            "model's Hugging Face directory"
        )
    values = {
        "architectures": [FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in _SIZES},
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"rope_type": "linear", "factor": scaling.factor},
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids),
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }
    values = {
        key: value
        for key, value in values.items()
        if not (value is None or value is False or value == [])  # a token id may be 0
    }
    if parse_hf_config(values) != config:
        raise ModelError(f"this {config.model_type} cannot be described by a config.json")
    return values


def _llama(values: Values) -> dict[str, Any]:
    return {
        "attention_bias": bool(_or(values, "attention_bias", False)),
        "mlp_bias": bool(_or(values, "mlp_bias", False)),
    }


def _mistral(values: Values) -> dict[str, Any]:
    window = _window(values)
    sliding = () if window is None else (True,) * _size(values, "num_hidden_layers")
    return {"sliding_window": window, "sliding_layers": sliding}


def _qwen2(values: Values) -> dict[str, Any]:
    return {"qkv_bias": True, **_qwen_windows(values)}


def _qwen3(values: Values) -> dict[str, Any]:
    bias = bool(_or(values, "attention_bias", False))
    return {"qk_norm": True, "attention_bias": bias, **_qwen_windows(values)}


def _qwen_windows(values: Values) -> dict[str, Any]:
    """The layers from `max_window_layers` on slide, if `use_sliding_window` says so."""
    window = _window(values) if values.get("use_sliding_window") else None
    first = _or(values, "max_window_layers", 28)
    if not _is_count(first):
        raise ModelError(f"config.json: max_window_layers is {first!r}: expected a whole number")
    default = [window is not None and i >= first for i in range(_size(values, "num_hidden_layers"))]
    return _windows(values, window, default)


def _gemma2(values: Values) -> dict[str, Any]:
    default = [i % 2 == 0 for i in range(_size(values, "num_hidden_layers"))]
    return _gemma(values, default)


def _gemma3(values: Values) -> dict[str, Any]:
    old = _or(values, "_sliding_window_pattern", 6)
    pattern = _size(values, "sliding_window_pattern", old)
    default = [(i + 1) % pattern != 0 for i in range(_size(values, "num_hidden_layers"))]
    return {
        **_gemma(values, default),
        "qk_norm": True,
        "rope": _gemma3_rope,
        "local_rope_theta": _gemma3_local_theta(values),
    }


def _gemma(values: Values, sliding: list[bool]) -> dict[str, Any]:
    return {
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": "gelu_tanh",
        "embedding_scale": _size(values, "hidden_size") ** 0.5,
        "attention_scale": _number(values, "query_pre_attn_scalar") ** -0.5,
        "attention_softcap": _optional(values, "attn_logit_softcapping"),
        "logit_softcap": _optional(values, "final_logit_softcapping"),
        "attention_bias": bool(_or(values, "attention_bias", False)),
        **_windows(values, _window(values), sliding),
    }


_WINDOWS = frozenset({"sliding_window", "layer_types"})
_QWEN = _WINDOWS | {"use_sliding_window", "max_window_layers"}
_GEMMA = _WINDOWS | {
    "attention_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "hidden_activation",
    "query_pre_attn_scalar",
}
_GEMMA_DEFAULTS = {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
FAMILIES: Mapping[str, _Family] = {
    "llama": _Family("LlamaForCausalLM", _llama, frozenset({"attention_bias", "mlp_bias"})),
    "mistral": _Family(
        "MistralForCausalLM",
        _mistral,
        frozenset({"sliding_window"}),
        {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "qwen2": _Family(
        "Qwen2ForCausalLM",
        _qwen2,
        _QWEN,
        {"sliding_window": 4096, "num_key_value_heads": 32, "max_position_embeddings": 32768},
    ),
    "qwen3": _Family(
        "Qwen3ForCausalLM",
        _qwen3,
        _QWEN | {"attention_bias"},
        {
            "sliding_window": 4096,
            "head_dim": 128,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
        },
    ),
    "gemma2": _Family(
        "Gemma2ForCausalLM",
        _gemma2,
        _GEMMA | {"sliding_window_size"},  # an older name that transformers does not read either
        {
            **_GEMMA_DEFAULTS,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "max_position_embeddings": 8192,
        },
        "gelu_pytorch_tanh",
    ),
    "gemma3_text": _Family(
        "Gemma3ForCausalLM",
        _gemma3,
        _GEMMA | {"rope_local_base_freq", "sliding_window_pattern", "_sliding_window_pattern"},
        {**_GEMMA_DEFAULTS, "max_position_embeddings": 131072},
        "gelu_pytorch_tanh",
    ),
}

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_READ = frozenset(_SIZES) | {
    "architectures", "bos_token_id", "eos_token_id", "head_dim", "hidden_act",
    "max_position_embeddings", "model_type", "num_key_value_heads", "quantization_config",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "tie_word_embeddings",
}  # fmt: skip
# Notes of tools, and settings of training from scratch, of generation or of other model classes.
_HARMLESS = frozenset({
    "auto_map", "cache_implementation", "chunk_size_feed_forward", "do_sample", "dtype",
    "finetuning_task", "id2label", "initializer_range", "is_llama_config",
    "keys_to_ignore_at_inference", "label2id", "max_length", "max_new_tokens", "model_name",
    "name_or_path", "num_return_sequences", "pad_token_id", "pretraining_tp", "problem_type",
    "repetition_penalty", "return_dict", "task_specific_params", "temperature",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers.js_config",
    "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
})  # fmt: skip
_ROPE_KEYS = frozenset({
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings",
})  # fmt: skip


def _family(values: Values) -> _Family:
    """The family of a config.json, or a refusal that lists all there are."""
    model_type = values.get("model_type")
    architectures = values.get("architectures") or []
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelError(
            f"config.json: model_type {model_type!r} (architectures {architectures}) is not "
            f"supported: expected one of {', '.join(FAMILIES)}"
        )
    known = architectures if isinstance(architectures, list) else [architectures]
    if architectures and family.architecture not in known:
        raise ModelError(
            f"config.json: architectures {architectures}: expected {family.architecture!r}"
        )
    if quantization := values.get("quantization_config"):
        method = quantization
        if isinstance(quantization, Mapping):
            method = quantization.get("quant_method", quantization)
        raise ModelError(
            f"config.json: the weights are quantized ({method}): use the unquantized model"
        )
    return family


def _refuse_unknown_keys(values: Values, family: _Family) -> None:
    known = _READ | _HARMLESS | family.keys
    for key, value in values.items():
        # A factor of 1 is what a model without the setting has.
        if key in known or not value or (key == "partial_rotary_factor" and value == 1):
            continue
        if not key.startswith("_"):
            raise ModelError(
                f"config.json: {key}={value!r} is not understood for model_type "
                f"{values['model_type']!r} and might change what the model computes: remove the "
                "key if it is only a note"
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _or(values: Values, key: str, default):
    """A null means the default, as in transformers."""
    value = values.get(key)
    return default if value is None else value


def _size(values: Values, key: str, default: int | None = None) -> int:
    value = _or(values, key, default)
    if value is None:
        raise ModelError(f"config.json: {key} is missing")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ModelError(f"config.json: {key} is {value!r}: expected a positive whole number")
    return value


def _number(values: Values, key: str, default: float | None = None) -> float:
    value = _or(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"config.json: {key} is {value!r}: expected a positive number")
    return float(value)


def _optional(values: Values, key: str) -> float | None:
    return None if values.get(key) is None else _number(values, key)


def _window(values: Values) -> int | None:
    return None if values.get("sliding_window") is None else _size(values, "sliding_window")


def _windows(values: Values, window: int | None, default: list[bool]) -> dict[str, Any]:
    """Which layers slide: `layer_types`, or the family's old rule."""
    types = values.get("layer_types")
    if types is None:
        sliding = default
    else:
        if not isinstance(types, list | tuple):
            raise ModelError(f"config.json: layer_types is {types!r}: expected a list")
        for kind in types:
            if kind not in ("sliding_attention", "full_attention"):
                raise ModelError(
                    f"config.json: layer_types has {kind!r}: expected 'sliding_attention' or "
                    "'full_attention'"
                )
        sliding = [kind == "sliding_attention" for kind in types]
    if not any(sliding):
        return {}
    return {"sliding_window": window, "sliding_layers": tuple(sliding)}


def _rope(values: Values) -> tuple[float, RopeScaling | None]:
    """Theta and scaling: `rope_parameters` of transformers 5, else the two older keys."""
    parameters = _or(values, "rope_parameters", values.get("rope_scaling")) or {}
    return _rope_from(parameters, _number(values, "rope_theta", 10000.0))


def _gemma3_rope(values: Values) -> tuple[float, RopeScaling | None]:
    """Of the layers without a window; transformers 5 has parameters by kind of layer."""
    parameters = values.get("rope_parameters")
    if parameters is None:
        parameters = values.get("rope_scaling") or {}
    elif isinstance(parameters, Mapping):
        for key, value in parameters.items():
            if key not in ("full_attention", "sliding_attention"):
                raise ModelError(
                    f"config.json: rope_parameters has {key}={value!r}: expected parameters by "
                    "kind of layer, 'full_attention' and 'sliding_attention'"
                )
        parameters = parameters.get("full_attention") or {}
    return _rope_from(parameters, _number(values, "rope_theta", 1e6))


def _gemma3_local_theta(values: Values) -> float:
    parameters = values.get("rope_parameters")
    local = parameters.get("sliding_attention") if isinstance(parameters, Mapping) else None
    theta, scaling = _rope_from(local or {}, _number(values, "rope_local_base_freq", 1e4))
    if scaling is not None:
        raise ModelError(
            f"config.json: rope type {scaling.kind!r} of sliding_attention is not supported: "
            "expected 'default'"
        )
    return theta


def _rope_from(parameters: Any, theta: float) -> tuple[float, RopeScaling | None]:
    if not isinstance(parameters, Mapping):
        raise ModelError(f"config.json: rope parameters are {parameters!r}: expected an object")
    theta = _number(parameters, "rope_theta", theta)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(
            f"config.json: rope type {kind!r} is not supported: expected 'default', 'linear' or "
            "'llama3'"
        )
    for key, value in parameters.items():
        if key in _ROPE_KEYS or not value or (key == "partial_rotary_factor" and value == 1):
            continue
        raise ModelError(f"config.json: rope parameter {key}={value!r} is not understood")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(parameters, "factor"))
    low, high = (_number(parameters, f"{which}_freq_factor") for which in ("low", "high"))
    if not low < high:
        raise ModelError(
            f"config.json: low_freq_factor is {low}: expected less than high_freq_factor {high}"
        )
    return theta, RopeScaling(
        "llama3",
        _number(parameters, "factor"),
        low,
        high,
        int(_number(parameters, "original_max_position_embeddings")),
    )
