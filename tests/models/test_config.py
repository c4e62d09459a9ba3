"""Spellings of config.json, rotary frequencies, and refusals by name."""

import json

import numpy as np
import pytest

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models.config import ModelConfig, RopeScaling
from lorafusion_jax.models.hf_config import FAMILIES
from tests.golden import tiny_llama

LLAMA3 = tiny_llama.CONFIGS["llama3_rope"]


def old_spelling(config: dict) -> dict:
    """As transformers 4 writes it: theta and scaling apart, torch_dtype."""
    rope = dict(config["rope_parameters"])
    old = {key: value for key, value in config.items() if key != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": "bfloat16"}
    return old | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


@pytest.mark.parametrize("name", list(tiny_llama.CONFIGS))
def test_both_spellings_mean_the_same(name):
    new = tiny_llama.CONFIGS[name]
    assert ModelConfig.from_hf(old_spelling(new)) == ModelConfig.from_hf(new)


def test_oldest_spelling_of_the_rope_type():
    old = old_spelling(LLAMA3)
    old["rope_scaling"] = {"type": "linear", "factor": 2}
    assert ModelConfig.from_hf(old).rope_scaling == RopeScaling("linear", 2.0)


def test_missing_values_are_hugging_faces_defaults():
    needed = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    config = ModelConfig.from_hf({k: LLAMA3[k] for k in (*needed, "num_attention_heads")})
    assert config.num_key_value_heads == config.num_attention_heads == 4
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (8, 10000.0, 1e-6)
    assert not config.tie_word_embeddings and config.rope_scaling is None


@pytest.mark.parametrize("given, ids", [(None, ()), (2, (2,)), ([2, 7], (2, 7))])
def test_end_tokens(given, ids):
    assert ModelConfig.from_hf(LLAMA3 | {"eos_token_id": given}).eos_token_ids == ids


def test_llama3_frequencies_against_the_published_rule():
    """Long waves are divided, short ones kept, the ones between blended."""
    config = ModelConfig.from_hf(LLAMA3 | {"head_dim": 32})
    plain = 100.0 ** -(np.arange(0, 32, 2) / 32)
    expected = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        if wavelength > 32 / 1.0:
            expected.append(frequency / 8)
        elif wavelength < 32 / 4.0:
            expected.append(frequency)
        else:
            expected.append((1 - smooth) * frequency / 8 + smooth * frequency)
    kinds = np.array(expected) / plain
    assert (kinds == 1).any() and np.isclose(kinds, 1 / 8).any() and len(set(kinds)) > 3
    np.testing.assert_allclose(config.rope_frequencies(), expected, rtol=1e-6)


def rope(**parameters) -> dict:
    return {"rope_parameters": {"rope_theta": 1e4, **parameters}}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}, ["phi3", *FAMILIES]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"architectures": ["LlamaForTokenClassification"]}, ["LlamaForTokenClassification"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantized", "gptq"]),
        (rope(rope_type="yarn", factor=2.0), ["yarn", "llama3"]),
        (rope(rope_type="dynamic", factor=2.0), ["dynamic"]),
        (rope(rope_type="linear"), ["factor"]),
        (rope(rope_type="llama3", factor=8.0), ["low_freq_factor"]),
        ({"rope_parameters": 7}, ["rope parameters", "7"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
        ({"vocab_size": "many"}, ["vocab_size", "'many'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_attention_heads": 5}, ["num_attention_heads", "5", "head_dim"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3"]),
        ({"head_dim": 7}, ["head_dim", "7", "odd"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps", "'tiny'"]),
    ],
)
def test_refusals_name_what_they_refuse(change, words):
    config = json.loads(json.dumps(LLAMA3 | change))
    with pytest.raises(ModelError) as refusal:
        ModelConfig.from_hf(config)
    for word in words:
        assert word in str(refusal.value)
