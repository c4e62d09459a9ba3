"""Tokenizers of base models: from a directory's tokenizer.json, or from GGUF metadata.

`transformers` (without torch) and `tokenizers` are imported when a tokenizer is asked for.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafusion_jax.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Pre-tokenizers of GGUF's byte-level BPE models that we build.
_RULES = ("smollm", "gpt-2", "qwen2")
# Qwen's words: contractions, letters with one sign before them, single digits, signs, line ends.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL_TOKEN, _USER_TOKEN = 3, 4


def load_tokenizer(directory: Path) -> "PreTrainedTokenizerFast":
    """Loads tokenizer.json and tokenizer_config.json (special tokens, chat template).

    Raises:
        ModelError: tokenizer.json is missing or cannot be read.
    """
    fast_class = _import_fast_class()
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(
            f"{directory}: no tokenizer.json; save the tokenizer with transformers' "
            "AutoTokenizer(...).save_pretrained to get one"
        )
    try:
        return fast_class.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{directory}: cannot read the tokenizer: {error}") from error


def gguf_tokenizer(metadata: Mapping[str, Any], where: str) -> "PreTrainedTokenizerFast":
    """Builds the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's key-value pairs.
        where: the file, for messages.

    Returns:
        The tokenizer with special tokens and chat template.

    Raises:
        ModelError: the kind of tokenizer is not supported, or metadata is missing.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    model, rule = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if model != "gpt2" or rule not in _RULES:
        raise ModelError(
            f"{where}: tokenizer {model!r} with pre-tokenizer {rule!r} is not supported: expected "
            f"'gpt2' with one of {sorted(_RULES)}; use the model's Hugging Face directory"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = _words(rule)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata.get("tokenizer.ggml.token_type", ())
    for wanted, special in ((_CONTROL_TOKEN, True), (_USER_TOKEN, False)):
        tokenizer.add_tokens(
            [
                AddedToken(token, special=special, normalized=False)
                for token, kind in zip(tokens, types, strict=False)
                if kind == wanted
            ]
        )

    def token(name: str) -> str | None:
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if index is None else tokens[index]

    return _import_fast_class()(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding") or token("eos"),
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
    )


def _import_fast_class() -> "type[PreTrainedTokenizerFast]":
    """Imports `transformers`, which says then that torch is missing: no news here."""
    key = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    given = os.environ.get(key)
    os.environ[key] = given or "1"
    try:
        from transformers import PreTrainedTokenizerFast
    finally:
        if given is None:
            del os.environ[key]
    return PreTrainedTokenizerFast


def _words(rule: str):
    """How a byte-level tokenizer cuts a text before merging."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if rule == "qwen2":
        words = Split(Regex(_QWEN_WORDS), "isolated")
        return Sequence([words, ByteLevel(add_prefix_space=False, use_regex=False)])
    digits = [Digits(individual_digits=True)] if rule == "smollm" else []
    return Sequence([*digits, ByteLevel(add_prefix_space=False, use_regex=True)])
