"""Text generation with a key-value cache: the base and many adapters side by side in one batch."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lorafusion_jax.data.tokenize import text_tokens
from lorafusion_jax.errors import AdapterError, ModelError
from lorafusion_jax.lora.bank import AdapterBank, lora_context, merge_adapters, split_adapters
from lorafusion_jax.models.decoder import Decoder
from lorafusion_jax.models.hf_weights import Base

BASE_SLOT = -1
_SMALLEST_BUCKET = 32


def generate(
    base: Base,
    bank: AdapterBank | None,
    prompts: Sequence[str | Sequence[int]],
    slots: Sequence[int] | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    batch_size: int = 32,
) -> list[str]:
    """Continues each prompt by the adapter in its slot; rows of different adapters run together.

    Prompts are padded to a power of two, so calls of similar length share one compilation.
    Generation of a row ends at any of the model's or tokenizer's end tokens.

    Args:
        base: the base model, with its tokenizer.
        bank: the adapters, as attached to `base.model`; None for the base alone.
        prompts: texts, or token ids to be used as they are.
        slots: bank slot of each prompt, -1 (and default) for the base.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the most likely token; above, tokens are drawn.
        top_p: draw from the most likely tokens that together have this probability.
        seed: draws depend on it, the prompt's index and the step only.
        chat: whether a text is a user's message, to be put into the chat template.
        batch_size: most rows to run at once.

    Returns:
        The added text of each prompt, without special tokens.

    Raises:
        ModelError: a prompt is empty or, with the new tokens, longer than the model's context; or
            the tokenizer has no chat template.
        AdapterError: a slot is not one of the bank's, or not one per prompt.
        ValueError: a number is out of range.
    """
    if max_new_tokens < 1 or batch_size < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"{max_new_tokens=} and {batch_size=} must be positive, {temperature=} not negative, "
            f"{top_p=} in (0, 1]"
        )
    if not prompts:
        return []
    slots = [BASE_SLOT] * len(prompts) if slots is None else list(slots)
    _check_slots(bank, slots, len(prompts))
    encoded = [_encode(base, prompt, chat) for prompt in prompts]
    length = _bucket(base, encoded, max_new_tokens)
    size = min(batch_size, len(prompts))
    ends = _end_tokens(base)
    graphdef, frozen = nnx.split(base.model) if bank is None else split_adapters(base.model)
    sampling = _Sampling(jnp.float32(temperature), jnp.float32(top_p), jax.random.key(seed))
    texts = []
    for first in range(0, len(prompts), size):
        chunk = slice(first, first + size)
        rows = _pad_rows(encoded[chunk], slots[chunk], first, size, length)
        settings = (graphdef, max_new_tokens, temperature > 0, ends)
        added = np.asarray(_generate(*settings, frozen, bank, rows, sampling))
        texts += [_text(base, ids, ends) for ids in added[: len(encoded[chunk])]]
    return texts


class _Rows(NamedTuple):
    """A batch of prompts, right-padded; rows beyond the last prompt are not live."""

    tokens: Int[Array, "B S"]
    lengths: Int[Array, " B"]
    slots: Int[Array, " B"]
    number: Int[Array, " B"]
    live: Bool[Array, " B"]


class _Sampling(NamedTuple):
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    key: Array


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _generate(
    graphdef,
    max_new_tokens: int,
    sampled: bool,
    ends: tuple[int, ...],
    frozen,
    bank: AdapterBank | None,
    rows: _Rows,
    sampling: _Sampling,
) -> Int[Array, "B new"]:
    """Prefill and decoding loop in one compilation; rows are filled up with an end token."""
    merged = nnx.merge(graphdef, frozen) if bank is None else merge_adapters(graphdef, frozen, bank)
    model = cast(Decoder, merged)
    size, length = rows.tokens.shape
    end_tokens = jnp.asarray(ends, jnp.int32)

    def forward(tokens, positions, caches):
        lora = None
        if bank is not None:
            # One tile per row: each sequence has its own adapter. No dropout, so any key will do.
            keys = jnp.ones(tokens.size, jnp.uint32)
            lora = lora_context(bank, rows.slots, keys, train=False)
        return model.decode(tokens, positions, caches, lora)

    def choose(hidden, step):
        logits = model.logits(hidden)
        if not sampled:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(sampling.key, i), step))
        return jax.vmap(partial(_draw, sampling))(keys(rows.number), logits)

    def body(state):
        step, token, done, added, caches = state
        added = added.at[:, step].set(jnp.where(done, end_tokens[0], token))
        done = done | jnp.isin(token, end_tokens)
        hidden, caches = forward(token[:, None], (rows.lengths + step)[:, None], caches)
        return step + 1, choose(hidden[:, 0], step + 1), done, added, caches

    def unfinished(state):
        step, _, done, *_ = state
        return (step < max_new_tokens) & ~jnp.all(done)

    positions = jnp.broadcast_to(jnp.arange(length), rows.tokens.shape)
    caches = model.init_cache(size, length + max_new_tokens)
    hidden, caches = forward(rows.tokens, positions, caches)
    token = choose(hidden[jnp.arange(size), rows.lengths - 1], 0)
    added = jnp.full((size, max_new_tokens), end_tokens[0], jnp.int32)
    state = (jnp.int32(0), token, ~rows.live, added, caches)
    return jax.lax.while_loop(unfinished, body, state)[3]


def _draw(sampling: _Sampling, key, logits: Float[Array, " V"]) -> Int[Array, ""]:
    """Draws from the nucleus (Holtzman et al. 2020, arXiv 1904.09751)."""
    order = jnp.argsort(-logits)
    scaled = logits[order] / sampling.temperature
    probabilities = jax.nn.softmax(scaled)
    before = jnp.cumsum(probabilities) - probabilities
    nucleus = jnp.where(before < sampling.top_p, scaled, -jnp.inf)
    return order[jax.random.categorical(key, nucleus)].astype(jnp.int32)


def _check_slots(bank: AdapterBank | None, slots: Sequence[int], num_prompts: int) -> None:
    if len(slots) != num_prompts:
        raise AdapterError(f"{len(slots)} slots for {num_prompts} prompts: expected one per prompt")
    num_slots = 0 if bank is None else bank.rank.shape[0]
    for slot in slots:
        if not BASE_SLOT <= slot < num_slots:
            raise AdapterError(f"{slot=}: expected {BASE_SLOT} (base) or one of {num_slots} slots")


def _encode(base: Base, prompt: str | Sequence[int], chat: bool) -> list[int]:
    if not isinstance(prompt, str):
        ids = list(prompt)
    elif not chat:
        ids = text_tokens(prompt, base.tokenizer)
    elif base.tokenizer.chat_template is None:
        raise ModelError(f"base model {base.name!r} has no chat template: give plain text")
    else:
        message = [{"role": "user", "content": prompt}]
        text = base.tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
        ids = list(base.tokenizer.encode(cast(str, text), add_special_tokens=False))
    if not ids:
        raise ModelError(f"prompt {prompt!r} has no tokens: expected at least one")
    return ids


def _bucket(base: Base, encoded: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    longest = max(map(len, encoded))
    limit = base.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ModelError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"context of {limit}: shorten the prompt or lower max_new_tokens"
        )
    return max(_SMALLEST_BUCKET, 1 << (longest - 1).bit_length())


def _end_tokens(base: Base) -> tuple[int, ...]:
    """The configuration's end tokens and, if there is a tokenizer, its own."""
    ends = base.config.eos_token_ids
    if base.make_tokenizer is not None and base.tokenizer.eos_token_id is not None:
        ends = (*ends, cast(int, base.tokenizer.eos_token_id))
    if not ends:
        raise ModelError(f"base model {base.name!r} names no end token (eos_token_id)")
    return tuple(dict.fromkeys(ends))


def _pad_rows(
    encoded: Sequence[Sequence[int]], slots: Sequence[int], first: int, size: int, length: int
) -> _Rows:
    tokens = np.zeros((size, length), np.int32)
    lengths, all_slots = np.ones(size, np.int32), np.full(size, BASE_SLOT, np.int32)
    for row, ids in enumerate(encoded):
        tokens[row, : len(ids)] = ids
        lengths[row] = len(ids)
    all_slots[: len(slots)] = slots
    number = first + np.arange(size, dtype=np.int32)
    live = np.arange(size) < len(encoded)
    return _Rows(*map(jnp.asarray, (tokens, lengths, all_slots, number, live)))


def _text(base: Base, ids: np.ndarray, ends: tuple[int, ...]) -> str:
    stops = np.flatnonzero(np.isin(ids, ends))
    kept = ids[: stops[0]] if stops.size else ids
    return cast(str, base.tokenizer.decode(kept.tolist(), skip_special_tokens=True))
