"""A tiny Llama of fixed random weights as a Hugging Face directory, the same bytes everywhere."""

import json
from pathlib import Path

import numpy as np

from lorafusion_jax.lora.safetensors_io import write_safetensors

VOCAB = 97
_HIDDEN, _INNER, _LAYERS, _HEADS, _KV_HEADS, _HEAD_DIM = 32, 48, 2, 4, 2, 8

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KV_HEADS,
    "head_dim": _HEAD_DIM,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}

_LINEARS = {
    "self_attn.q_proj": (_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.k_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.v_proj": (_KV_HEADS * _HEAD_DIM, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HEADS * _HEAD_DIM),
    "mlp.gate_proj": (_INNER, _HIDDEN),
    "mlp.up_proj": (_INNER, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INNER),
}


def write_tiny_llama(directory: Path) -> Path:
    """Writes config.json and model.safetensors."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    write_safetensors(directory / "model.safetensors", _weights(), {"format": "pt"})
    return directory


def _weights() -> dict[str, np.ndarray]:
    # RandomState's stream is frozen for ever; Generator's is not.
    normal = np.random.RandomState(0).standard_normal
    weights = {"model.embed_tokens.weight": 0.5 * normal((VOCAB, _HIDDEN))}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        for name, (out, width) in _LINEARS.items():
            weights[f"{prefix}{name}.weight"] = normal((out, width)) / width**0.5
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}{norm}.weight"] = 1 + 0.1 * normal(_HIDDEN)
    weights["model.norm.weight"] = 1 + 0.1 * normal(_HIDDEN)
    weights["lm_head.weight"] = normal((VOCAB, _HIDDEN)) / _HIDDEN**0.5
    return {name: weight.astype(np.float32) for name, weight in weights.items()}
