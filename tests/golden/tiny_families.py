"""Tiny models of every family with odd sizes; weights are a pure function of the model's name.

Shared by the script that makes the golden logits (with torch) and the tests that check them. The
settings are such that each feature changes the logits: windows are shorter than the samples, soft
caps bite, rotary bases are far apart.
"""

import numpy as np

from tests.golden.tiny_llama import tensor, uniform

_ODD = {
    "hidden_size": 40,
    "intermediate_size": 45,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 10,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
}
_SILU = _ODD | {"hidden_act": "silu"}
# transformers wants a multiple of the heads here; head_dim is still another than hidden / heads.
_GEMMA = _ODD | {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 7,
    "sliding_window": 4,
    "tie_word_embeddings": True,
}

CONFIGS = {
    "qwen2": _SILU | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "qwen2_windows": _SILU
    | {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "num_hidden_layers": 3,
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": _SILU | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "mistral": _SILU
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4},
    "gemma2": _GEMMA
    | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3_text": _GEMMA
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
        },
    },
}
SAMPLE_LENGTHS = (9, 3)


def weights(name, config=None):
    """Returns the tensors of a model by Hugging Face's names, f32 [out, in], bf16-exact.

    The sizes may be those of another config than the one of this name.
    """
    config = config or CONFIGS[name]
    gemma = config["model_type"].startswith("gemma")
    found = {key: tensor(name, key, shape) for key, shape in shapes(config).items()}
    # Gemma's norms multiply by 1 + weight.
    return {k: v - 1 if gemma and "norm" in k else v for k, v in found.items()}


def shapes(config):
    """Returns the shape of every tensor of a model, written down by hand."""
    family, hidden, inner = config["model_type"], config["hidden_size"], config["intermediate_size"]
    q, kv = (
        config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value")
    )
    found = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    norms = ["input_layernorm", "post_attention_layernorm"]
    if family.startswith("gemma"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        found |= {f"{layer}.{norm}.weight": (hidden,) for norm in norms}
        if family in ("qwen3", "gemma3_text"):
            found |= {f"{layer}.self_attn.{x}_norm.weight": (config["head_dim"],) for x in "qk"}
        for name, shape in {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }.items():
            found[f"{layer}.{name}.weight"] = shape
            if family == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj"):
                found[f"{layer}.{name}.bias"] = shape[:1]
    return found | {"model.norm.weight": (hidden,)}


def samples(name):
    """Returns the token ids of the samples of a model."""
    vocab_size = CONFIGS[name]["vocab_size"]
    return [
        (uniform(f"{name}:tokens:{length}", length) * vocab_size).astype(np.int32)
        for length in SAMPLE_LENGTHS
    ]
