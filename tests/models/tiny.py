"""Tiny models and packed rows for the tests of this room."""

import jax.numpy as jnp
import numpy as np

from lorafusion_jax.models import ModelConfig, Segments

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    eos_token_ids=(2,),
)


def packed(lengths, rows: int, offset_count: int = 8):
    """Positions and segments of samples laid one after another, padded to `rows`."""
    start = np.arange(rows, dtype=np.int32)
    offsets = np.full(offset_count, rows, np.int32)
    first = 0
    for i, length in enumerate(lengths):
        start[first : first + length] = first
        offsets[i : i + 2] = first, first + length
        first += length
    start, offsets = jnp.asarray(start), jnp.asarray(offsets)
    return jnp.arange(rows, dtype=jnp.int32) - start, Segments(start, offsets)
