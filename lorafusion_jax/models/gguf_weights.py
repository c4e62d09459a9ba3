"""GGUF files: configuration, tensors and tokenizer metadata of Llama, Qwen 2 and Qwen 3 models.

For Llama (and Mistral, whose files say "llama") GGUF's converter permutes the rows of q and k from
Hugging Face's rotary layout (halves of a head) to the original one (neighbouring pairs); reading
turns that back. Quantized tensors come out as float32.
"""

from collections.abc import Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorafusion_jax.errors import ModelError
from lorafusion_jax.models.config import ModelConfig, RopeScaling
from lorafusion_jax.models.weights import LazyTensor

_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_ROPE_FACTORS = "rope_freqs.weight"
_PERMUTED = {"llama": True, "qwen2": False, "qwen3": False}
# Of these the weights could be read, but not the tokenizer.
_UNREAD_TOKENIZER = ("gemma2", "gemma3")


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, LazyTensor], dict[str, Any]]:
    """Reads a GGUF file; tensors are read and dequantized one at a time, later.

    Args:
        path: the file.

    Returns:
        The configuration, the tensors by Hugging Face's names, and the metadata.

    Raises:
        ModelError: no GGUF file, an unsupported architecture, or metadata missing.
    """
    try:
        from gguf import GGUFReader, dequantize
    except ImportError as error:
        raise ModelError(
            f"{path}: GGUF files need the gguf package: pip install lorafusion-jax[gguf]"
        ) from error
    try:
        reader = GGUFReader(path)
        metadata = {key: value.contents() for key, value in reader.fields.items()}
    except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: not a readable GGUF file: {error}") from error
    raw = {tensor.name: tensor for tensor in reader.tensors}
    factors = raw.pop(_ROPE_FACTORS, None)
    config = _config(path, metadata, raw, factors)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    if not _PERMUTED[config.model_type]:
        heads = {}
    tensors = {}
    for name, tensor in raw.items():
        shape = tuple(int(size) for size in reversed(tensor.shape))
        num_heads = heads.get(_kind(name))
        read = partial(_read, dequantize, tensor, shape, num_heads)
        rows = partial(_read_rows, dequantize, tensor) if num_heads is None else None
        tensors[_hf_name(name)] = LazyTensor(shape, read, read_rows=rows)
    return config, tensors, metadata


def _read(dequantize, tensor, shape: tuple[int, ...], num_heads: int | None) -> np.ndarray:
    values = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return values if num_heads is None else unpermute(values, num_heads)


def _read_rows(dequantize, tensor, start: int, stop: int) -> np.ndarray:
    return dequantize(tensor.data[start:stop], tensor.tensor_type)


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Returns the rows of q or k with each head's neighbouring pairs split into halves."""
    pairs = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _kind(name: str) -> str:
    """`attn_q` of `blk.0.attn_q.weight`."""
    return name.split(".")[-2]


def _hf_name(name: str) -> str:
    """Unknown names stay as they are, for the check of names to report."""
    match name.split("."):
        case ["blk", index, kind, suffix] if kind in _LAYER_TENSORS:
            return f"model.layers.{index}.{_LAYER_TENSORS[kind]}.{suffix}"
        case [kind, suffix] if kind in _MODEL_TENSORS:
            return f"{_MODEL_TENSORS[kind]}.{suffix}"
    return name


def _config(path: Path, metadata: Mapping[str, Any], names: Container[str], factors) -> ModelConfig:
    """Which biases there are and whether the head is tied, GGUF says by tensor names only."""
    kind = metadata.get("general.architecture")
    if kind in _UNREAD_TOKENIZER:
        raise ModelError(
            f"{path}: GGUF files of architecture {kind!r} are not read, because their tokenizer is "
            "a SentencePiece model: use the model's Hugging Face directory"
        )
    if kind not in _PERMUTED:
        raise ModelError(
            f"{path}: architecture {kind!r} is not supported: expected one of "
            f"{', '.join(_PERMUTED)}"
        )
    if metadata.get(f"{kind}.expert_count"):
        raise ModelError(f"{path}: mixtures of experts are not supported")
    if window := metadata.get(f"{kind}.attention.sliding_window"):
        raise ModelError(
            f"{path}: the sliding window of {window} is not read from GGUF files: use the model's "
            "Hugging Face directory"
        )

    def value(key: str, default=None):
        found = metadata.get(key, default)
        if found is None:
            raise ModelError(f"{path}: metadata key {key!r} is missing")
        return found

    heads, hidden = value(f"{kind}.attention.head_count"), value(f"{kind}.embedding_length")
    vocab_size = metadata.get(f"{kind}.vocab_size") or len(value("tokenizer.ggml.tokens"))
    # Where heads are not hidden / heads wide, their width is that of the keys.
    width = metadata.get(f"{kind}.attention.key_length", hidden // heads)
    biased = "blk.0.attn_q.bias" in names
    eos = metadata.get("tokenizer.ggml.eos_token_id")
    eot = metadata.get("tokenizer.ggml.eot_token_id")
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=value(f"{kind}.feed_forward_length"),
        num_hidden_layers=value(f"{kind}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value(f"{kind}.attention.head_count_kv", heads),
        head_dim=value(f"{kind}.rope.dimension_count", width),
        model_type=kind,
        rms_norm_eps=value(f"{kind}.attention.layer_norm_rms_epsilon"),
        rope_theta=value(f"{kind}.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(path, kind, metadata, factors),
        max_position_embeddings=value(f"{kind}.context_length"),
        tie_word_embeddings="output.weight" not in names,
        attention_bias=biased and kind != "qwen2",
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        mlp_bias="blk.0.ffn_gate.bias" in names,
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(i for i in (eos, eot) if i is not None)),
    )


def _rope_scaling(
    path: Path, model_type: str, metadata: Mapping[str, Any], factors
) -> RopeScaling | None:
    kind = metadata.get(f"{model_type}.rope.scaling.type", "none")
    if factors is not None:
        return RopeScaling("factors", factors=tuple(float(f) for f in factors.data))
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling("linear", float(metadata[f"{model_type}.rope.scaling.factor"]))
    raise ModelError(f"{path}: rope scaling {kind!r} is not supported: expected none or linear")
