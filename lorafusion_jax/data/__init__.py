"""Training data: rows, token ids with loss masks, and the order they are seen in."""

from lorafusion_jax.data.cache import load_dataset, read_source, tokenizer_fingerprint
from lorafusion_jax.data.dataset import Dataset, concatenate
from lorafusion_jax.data.order import batch_order, mixed_order, split_eval
from lorafusion_jax.data.records import (
    Message,
    Record,
    read_records,
    records_from_rows,
    with_system,
)
from lorafusion_jax.data.tokenize import (
    prompt_text,
    prompt_tokens,
    text_tokens,
    tokenize_dataset,
)

__all__ = [
    "Dataset",
    "Message",
    "Record",
    "batch_order",
    "concatenate",
    "load_dataset",
    "mixed_order",
    "prompt_text",
    "prompt_tokens",
    "read_records",
    "read_source",
    "records_from_rows",
    "split_eval",
    "text_tokens",
    "tokenize_dataset",
    "tokenizer_fingerprint",
    "with_system",
]
