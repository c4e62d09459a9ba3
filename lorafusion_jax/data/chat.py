"""Conversations: which tokens of a rendered chat are the assistant's own.

The mask that `transformers` can return is all zeros for templates without generation tags, which
is most of them. So the conversation is rendered up to each assistant turn, as at inference, and the
token lists are compared.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Literal

from lorafusion_jax.data.records import Message

type Learn = Literal["answers", "last_answer", "all"]


def tokenize_chat(
    messages: Sequence[Message], tokenizer: Any, learn: Learn = "answers"
) -> tuple[list[int], list[bool]]:
    """Renders a conversation with the tokenizer's template and marks what is to be learnt.

    An assistant turn's own tokens are marked, and the token that ends the turn; what the template
    writes in front of the answer (header, empty thinking block) and behind its end is not. What
    follows the last answer is left out.

    Args:
        messages: turns; the last is the assistant's.
        tokenizer: of `transformers`, with a chat template.
        learn: every answer, the last one only, or all tokens up to its end.

    Returns:
        Token ids and, for each, whether it is supervised.

    Raises:
        ValueError: the template refuses the conversation, or an answer cannot be located.
    """
    turns = [{"role": message.role, "content": message.content} for message in messages]

    def render(count: int, prompt: bool = False) -> list[int]:
        text = _render(tokenizer, turns[:count], prompt)
        return tokenizer.encode(text, add_special_tokens=False)

    tokens = render(len(turns))
    special = set(tokenizer.all_special_ids)
    supervised = [False] * len(tokens)
    for index, message in enumerate(messages):
        if message.role == "assistant" and (learn != "last_answer" or index == len(messages) - 1):
            start = _answer_start(tokens, render, index)
            end = _answer_end(tokens, render(index + 1), start, special)
            end = _without_tail(tokens, start, end, special, tokenizer)
            supervised[start:end] = [True] * (end - start)
    used = len(tokens) - supervised[::-1].index(True) if True in supervised else 0
    return tokens[:used], [True] * used if learn == "all" else supervised[:used]


def _render(tokenizer: Any, turns: list[dict[str, str]], prompt: bool) -> str:
    if not turns and not prompt:
        return ""
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # templates are programs and may raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the model's chat template refuses this conversation: {reason}") from None


def _answer_start(tokens: list[int], render: Callable[..., list[int]], index: int) -> int:
    """First token that the prompt of turn `index` does not supply."""
    prompt = render(index, prompt=True)
    start = _common(prompt, tokens)
    # A template may prompt with a thinking block that it leaves out of the final text.
    if start < len(prompt) and start < len(render(index)):
        raise ValueError(
            f"the model's chat template changes the turns before messages[{index}] when it is "
            "added, so its answer cannot be located"
        )
    return start


def _answer_end(tokens: list[int], upto: list[int], start: int, special: set[int]) -> int:
    """One past the turn; `upto` is the conversation that ends with it."""
    if tokens[: len(upto)] == upto:
        return len(upto)
    # A template may shorten answers that are not the last (older thinking): up to the end token.
    for position in range(start, len(tokens)):
        if tokens[position] in special:
            return position + 1
    raise ValueError("the model's chat template marks no end of an answer")


def _without_tail(
    tokens: list[int], start: int, end: int, special: set[int], tokenizer: Any
) -> int:
    """`end` without white space that follows the end-of-turn token."""
    last = next((p for p in range(end - 1, start - 1, -1) if tokens[p] in special), None)
    if last is None or tokenizer.decode(tokens[last + 1 : end]).strip():
        return end
    return last + 1


def _common(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
