"""config.json of every family: old and new spellings, real ones' keys, refusals by name."""

import pytest

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models.config import ModelConfig
from lorafusion_jax.models.hf_config import FAMILIES, hf_config
from tests.golden import tiny_families

CONFIGS = tiny_families.CONFIGS
GEMMA3 = CONFIGS["gemma3_text"]


def old_spelling(values: dict) -> dict:
    """As transformers 4 writes it: theta and scaling apart, a pattern instead of a list."""
    rope = dict(values["rope_parameters"])
    old = {key: value for key, value in values.items() if key != "rope_parameters"}
    old |= {"torch_dtype": "bfloat16", "attention_dropout": 0.0, "use_cache": True}
    if "full_attention" not in rope:
        return old | {"rope_theta": rope["rope_theta"], "rope_scaling": None}
    local, whole = rope["sliding_attention"], dict(rope["full_attention"])
    old |= {"rope_local_base_freq": local["rope_theta"], "rope_theta": whole.pop("rope_theta")}
    del old["layer_types"]
    return old | {"rope_scaling": whole, "sliding_window_pattern": 2}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_both_spellings_mean_the_same(name):
    new = ModelConfig.from_hf(CONFIGS[name])
    assert ModelConfig.from_hf(old_spelling(CONFIGS[name])) == new
    assert new.model_type == CONFIGS[name]["model_type"]


def without(values: dict, *keys: str) -> dict:
    return {key: value for key, value in values.items() if key not in keys}


def test_missing_keys_are_the_familys_defaults():
    gemma = without(
        CONFIGS["gemma2"],
        "head_dim", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping",
        "sliding_window", "tie_word_embeddings", "rope_parameters", "hidden_activation",
    )  # fmt: skip
    config = ModelConfig.from_hf(gemma)
    assert (config.head_dim, config.attention_scale) == (256, 1 / 16)
    assert (config.attention_softcap, config.logit_softcap) == (50, 30)
    assert (config.sliding_window, config.tie_word_embeddings) == (4096, True)
    assert config.sliding_layers == (True, False, True) and config.rope_theta == 1e4
    gemma3 = ModelConfig.from_hf(without(GEMMA3, "rope_parameters", "layer_types"))
    assert (gemma3.rope_theta, gemma3.local_rope_theta) == (1e6, 1e4)
    deep = ModelConfig.from_hf(without(GEMMA3, "layer_types") | {"num_hidden_layers": 7})
    assert deep.sliding_layers == (True,) * 5 + (False, True)
    assert ModelConfig.from_hf(without(CONFIGS["qwen3"], "head_dim")).head_dim == 128
    assert (
        ModelConfig.from_hf(without(CONFIGS["mistral"], "sliding_window")).layer_window(0) == 4096
    )


def test_null_is_none_of_it():
    config = ModelConfig.from_hf(CONFIGS["gemma2"] | {"attn_logit_softcapping": None})
    assert config.attention_softcap is None and config.logit_softcap == 2
    config = ModelConfig.from_hf(CONFIGS["mistral"] | {"sliding_window": None})
    assert config.layer_window(0) is None and not config.sliding_layers


def test_a_window_that_is_switched_off_is_none():
    """Qwen's files name a window that they do not use."""
    given = CONFIGS["qwen2"] | {"sliding_window": 3, "max_window_layers": 0}
    off = ModelConfig.from_hf(given | {"use_sliding_window": False})
    assert off == ModelConfig.from_hf(CONFIGS["qwen2"])
    on = ModelConfig.from_hf(given | {"use_sliding_window": True})
    assert on.sliding_layers == (True, True) and not on.mixed_layers


REAL = {
    "SmolLM2": ("llama", {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1,
                          "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}}),
    "Qwen2.5": ("qwen2", {"use_mrope": False, "max_window_layers": 28, "sliding_window": 32768,
                          "use_sliding_window": False, "attention_dropout": 0.0}),
    "gemma-2": ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
                           "sliding_window_size": 4096, "_name_or_path": "x"}),
    "gemma-3": ("gemma3_text", {"_sliding_window_pattern": 6, "use_bidirectional_attention": False,
                                "attn_logit_softcapping": None, "dtype": "bfloat16"}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REAL))
def test_keys_of_real_models_are_read(name):
    family, keys = REAL[name]
    values = CONFIGS.get(family, CONFIGS["qwen2"]) | {"model_type": family, "architectures": None}
    assert ModelConfig.from_hf(values | keys) == ModelConfig.from_hf(values)


@pytest.mark.parametrize(
    "family, change, words",
    [
        ("gemma3_text", {"model_type": "gemma3"}, ["gemma3", *FAMILIES]),
        ("qwen3", {"model_type": "qwen3_moe"}, ["qwen3_moe", "qwen3"]),
        ("qwen3", {"architectures": ["Qwen3ForSequenceClassification"]}, ["Qwen3ForCausalLM"]),
        ("qwen3", {"architectures": 1.5}, ["architectures 1.5", "Qwen3ForCausalLM"]),
        ("gemma2", {"hidden_activation": "gelu"}, ["hidden_activation", "gelu_pytorch_tanh"]),
        ("gemma2", {"hidden_act": "silu"}, ["hidden_act", "silu"]),
        ("gemma3_text", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("qwen2", {"attention_dropout": 0.1}, ["attention_dropout", "0.1"]),
        ("mistral", {"layer_types": ["full_attention"] * 2}, ["layer_types", "mistral"]),
        ("mistral", {"query_pre_attn_scalar": 3}, ["query_pre_attn_scalar", "mistral"]),
        ("qwen2", {"layer_types": ["chunked_attention"] * 2}, ["layer_types", "chunked"]),
        ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}, ["2 layers", "3"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, ["sliding_window", "None"]),
        ("gemma2", {"sliding_window": 0}, ["sliding_window", "0"]),
        ("gemma2", {"attn_logit_softcapping": -1.0}, ["attn_logit_softcapping", "-1.0"]),
        ("qwen2", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        (
            "qwen2",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor", "0.5"],
        ),
        ("qwen2", {"rope_parameters": GEMMA3["rope_parameters"]}, ["full_attention"]),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            ["sliding_attention", "linear"],
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}},
            ["rope_parameters", "rope_type", "full_attention"],
        ),
        ("qwen2", {"layer_types": 3}, ["layer_types", "3", "a list"]),
        ("qwen2", {"max_window_layers": "x"}, ["max_window_layers", "'x'"]),
        ("qwen2", {"quantization_config": "x"}, ["quantized", "x"]),
        ("qwen2", {"eos_token_id": [2, "x"]}, ["eos_token_id", "'x'"]),
        ("qwen2", {"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                }
            },
            ["low_freq_factor", "high_freq_factor", "4.0"],
        ),
        ("llama", {"num_local_experts": 8}, ["num_local_experts", "llama"]),
    ],
)
def test_refusals_name_what_they_refuse(family, change, words):
    values = CONFIGS.get(family) or without(CONFIGS["qwen2"], "architectures")
    with pytest.raises(ModelError) as refusal:
        ModelConfig.from_hf(values | {"model_type": family} | change)
    for word in words:
        assert word in str(refusal.value)


def test_a_config_that_is_written_keeps_a_token_id_of_0():
    config = ModelConfig(97, 24, 48, 2, 3, 1, 8, bos_token_id=0, eos_token_ids=(0,))
    written = hf_config(config)
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, [0])
    assert ModelConfig.from_hf(written) == config
