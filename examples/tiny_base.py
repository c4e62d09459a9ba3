"""The base model of the examples when none is named: tiny, random, with a tokenizer of bytes."""

import os

import lorafusion_jax as lf
from lorafusion_jax.models import ModelConfig


def load_or_make(model: str | None) -> lf.Base:
    """Loads a Hugging Face directory or a GGUF file; None makes a tiny random model."""
    if model is not None:
        return lf.load_base(model)
    tokenizer = byte_tokenizer()
    config = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_ids=(len(tokenizer) - 1,),
    )
    return lf.random_base(config, tokenizer=tokenizer)


def byte_tokenizer():
    """Returns a tokenizer whose tokens are the bytes of UTF-8, and one that ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not needed
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
