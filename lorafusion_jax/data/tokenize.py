"""From rows to token ids with a loss mask.

The loss is on what the model must produce itself: completions, assistant turns, and the token that
ends each of them; or on the last assistant turn only, or on everything. A text is learnt whole.
"""

from collections.abc import Iterator, Sequence
from itertools import batched
from typing import Any, Literal

from lorafusion_jax.data.chat import Learn, tokenize_chat
from lorafusion_jax.data.dataset import Dataset, join_samples
from lorafusion_jax.data.records import Record
from lorafusion_jax.errors import DataError

_ROWS_PER_CALL = 512

type Overlong = Literal["truncate", "drop", "error"]
type _Sample = tuple[list[int], list[bool]]


def tokenize_dataset(
    records: Sequence[Record],
    tokenizer: Any,
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    vocab_size: int | None = None,
    learn: Learn = "answers",
    name: str = "data",
) -> Dataset:
    """Tokenises rows and marks their targets.

    Args:
        records: rows.
        tokenizer: of `transformers`, fast.
        max_length: longest sample in tokens.
        overlong: cut longer samples at the end, leave them out, or refuse them. A sample that has
            no target left after the cut is left out.
        vocab_size: rows of the model's embedding; token ids beyond it are refused.
        learn: what is a target: every answer, the last one of a chat, or all tokens.
        name: of the file, for errors.

    Raises:
        DataError: a row cannot be tokenised, has no target, is too long under `error`, or no row
            is left.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the model's tokenizer has no end token, so no answer would ever end")
    samples: list[tuple[int, list[int], list[bool]]] = []
    truncated = dropped = 0
    for record, (tokens, supervised) in _samples(records, tokenizer, learn, name):
        _check(tokens, supervised, record.line, name, vocab_size)
        if len(tokens) > max_length:
            if overlong == "error":
                raise DataError(
                    f"has {len(tokens)} tokens, expected at most max_length={max_length}: raise "
                    "it, or set overlong to truncate or drop",
                    path=name,
                    line=record.line,
                )
            tokens, supervised = tokens[:max_length], supervised[:max_length]
            if overlong == "drop" or not any(supervised):
                dropped += 1
                continue
            truncated += 1
        samples.append((record.line, tokens, supervised))
    if not samples:
        raise DataError(
            f"none of {len(records)} rows is left to train on: all are longer than "
            f"max_length={max_length}",
            path=name,
        )
    return join_samples(samples, truncated=truncated, dropped=dropped)


def prompt_text(record: Record, tokenizer: Any) -> str:
    """Returns what the model is given at inference to produce the row's (last) answer."""
    if record.kind != "chat":
        return record.prompt
    turns = [{"role": turn.role, "content": turn.content} for turn in record.messages[:-1]]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def prompt_tokens(record: Record, tokenizer: Any) -> list[int]:
    """Returns the prompt of `prompt_text` as the tokens that training puts in front of the answer.

    A chat template writes its own begin token; a second one would be a prompt nobody trained on.
    """
    text = prompt_text(record, tokenizer)
    if record.kind == "chat":
        return tokenizer.encode(text, add_special_tokens=False)
    return text_tokens(text, tokenizer)


def text_tokens(text: str, tokenizer: Any) -> list[int]:
    """Returns a text to be continued: the tokenizer's begin token, if it writes one, no end token.

    What a tokenizer adds by itself may include an end token, after which nothing would follow.
    """
    return _start_tokens(tokenizer) + tokenizer.encode(text, add_special_tokens=False)


def _samples(
    records: Sequence[Record], tokenizer: Any, learn: Learn, name: str
) -> Iterator[tuple[Record, _Sample]]:
    if any(record.kind == "chat" for record in records) and not tokenizer.chat_template:
        raise DataError(
            "is a chat, but the model's tokenizer has no chat template: use rows of prompt and "
            "completion",
            path=name,
        )
    start = _start_tokens(tokenizer)
    for group in batched(records, _ROWS_PER_CALL):
        plain = iter(_pairs([r for r in group if r.kind != "chat"], tokenizer, start, learn))
        for record in group:
            if record.kind != "chat":
                yield record, next(plain)
                continue
            try:
                yield record, tokenize_chat(record.messages, tokenizer, learn)
            except ValueError as error:
                raise DataError(str(error), path=name, line=record.line) from None


def _start_tokens(tokenizer: Any) -> list[int]:
    """What the tokenizer puts in front of a text by itself: its begin token, or nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer.encode("")[:1] == [bos] else []


def _pairs(records: list[Record], tokenizer: Any, start: list[int], learn: Learn) -> list[_Sample]:
    """Prompt and completion; where a token would straddle both, they are tokenised apart.

    At inference the prompt is tokenised alone, so the sample must begin with just those tokens.
    """
    if not records:
        return []
    prompts = _encode(tokenizer, [record.prompt for record in records])
    wholes = _encode(tokenizer, [record.prompt + record.completion for record in records])
    samples = []
    for record, prompt, whole in zip(records, prompts, wholes, strict=True):
        if whole[: len(prompt)] != prompt:
            whole = prompt + _encode(tokenizer, [record.completion])[0]
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole = [*whole, tokenizer.eos_token_id]
        given = 0 if learn == "all" else len(start) + len(prompt)
        tokens = start + whole
        samples.append((tokens, [False] * given + [True] * (len(tokens) - given)))
    return samples


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]


def _check(
    tokens: list[int], supervised: list[bool], line: int, name: str, vocab_size: int | None
) -> None:
    supervised[:1] = [False] * len(tokens[:1])
    if not any(supervised):
        raise DataError("has no token to learn", path=name, line=line)
    if vocab_size is not None and max(tokens) >= vocab_size:
        raise DataError(
            f"has token id {max(tokens)}, expected less than the model's vocabulary of "
            f"{vocab_size}: the tokenizer is not this model's",
            path=name,
            line=line,
        )
