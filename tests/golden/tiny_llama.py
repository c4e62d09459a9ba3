"""Tiny Llama models whose weights are a pure function of their name, so that none are committed.

Shared by the script that makes the golden logits (with torch) and the tests that check them
(without). Only numpy's bit generator is used, whose stream is fixed across versions.
"""

import hashlib

import numpy as np

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_ODD = {"hidden_size": 30, "intermediate_size": 45, "num_attention_heads": 3, "vocab_size": 59}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
_BIASED = {"head_dim": 10, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}

CONFIGS = {
    "tied": _LLAMA,
    "untied_odd": _LLAMA | _ODD | {"num_key_value_heads": 3, "tie_word_embeddings": False},
    "llama3_rope": _LLAMA | {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False},
    "linear_rope_biased": _LLAMA | _BIASED | {"rope_parameters": _LINEAR_ROPE},
}
SAMPLE_LENGTHS = (13, 7)


def weights(name):
    """Returns the tensors of a model by Hugging Face's names, f32 [out, in], bf16-exact."""
    return {key: tensor(name, key, shape) for key, shape in shapes(CONFIGS[name]).items()}


def shapes(config):
    """Returns the shape of every tensor of a Llama model, written down by hand."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim", hidden // config["num_attention_heads"])
    q, kv = (config[f"num_{kind}_heads"] * head_dim for kind in ("attention", "key_value"))
    linears = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    found = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = (hidden,)
        for linear, shape in linears.items():
            found[f"{layer}.{linear}.weight"] = shape
            kind = "attention_bias" if linear.startswith("self_attn") else "mlp_bias"
            if config.get(kind):
                found[f"{layer}.{linear}.bias"] = shape[:1]
    return found


def samples(name):
    """Returns the token ids of the samples of a model."""
    vocab_size = CONFIGS[name]["vocab_size"]
    return [
        (uniform(f"{name}:tokens:{length}", length) * vocab_size).astype(np.int32)
        for length in SAMPLE_LENGTHS
    ]


def tensor(name, key, shape):
    """Returns a tensor of a model, f32 and bf16-exact: norms about 1, the rest about 0."""
    centred = uniform(f"{name}:{key}", int(np.prod(shape))).reshape(shape) - 0.5
    if "norm" in key:
        values = 1 + centred
    elif key.endswith("bias"):
        values = centred
    else:
        values = centred * np.sqrt(12.0 / shape[-1])
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def uniform(identity, count):
    """Returns numbers from 0 to 1 that are a function of a text."""
    seed = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "little")
    raw = np.random.PCG64(seed).random_raw(count)
    return (raw >> np.uint64(40)).astype(np.float64) / 2.0**24
