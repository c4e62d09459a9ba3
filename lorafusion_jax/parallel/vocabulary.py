"""Embedding, LM head and cross-entropy, each stage holding its share of the vocabulary.

Each stage takes its slice of the logits once, for the loss and for the gradient. With a slice's
peak m and W its rows of the head, the slice contributes Z = sum exp(l - m) and, row by row of the
microbatch, the pull U = exp(l - m) W. The stages then exchange two floats per token, rescale U by
what the others found, and one sum over the stages gives the gradient (the online softmax of Milakov
and Gimelshein, arXiv 1805.02867, over devices). The label's own term is kept out of U: rounded to
bfloat16, p - 1 of a sure prediction would be noise.

Rows without supervision are not computed: supervised ones are moved to the front and the loop stops
after the last of them. No function here holds the logits of more than a chunk of rows.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from lorafusion_jax.parallel.mesh import STAGE
from lorafusion_jax.train.loss import TokenLosses


class HeadSlice(NamedTuple):
    """What one stage's share of the vocabulary says about each row, supervised rows first.

    Attributes:
        peak: largest logit of the slice.
        total: sum of exp(logit - peak).
        label_logit: logit of the label, 0 where another stage has it.
        best: token of the largest logit.
        pull: sum of exp(logit - peak) times the head's rows, the label's left out; [1, d] if no
            gradient is wanted.
    """

    peak: Float[Array, " C"]
    total: Float[Array, " C"]
    label_logit: Float[Array, " C"]
    best: Int[Array, " C"]
    pull: Float[Array, "_ d"]


def padded_vocabulary(vocab_size: int, stages: int) -> int:
    """Returns the vocabulary filled up to equal shares."""
    return -(-vocab_size // stages) * stages


def embed_share(
    tokens: Int[Array, " C"], table: Float[Array, "V_S d"], stage: Int[Array, ""]
) -> Float[Array, "C d"]:
    """Returns the embeddings that this stage holds and zeros for the others: sum over stages."""
    local = tokens - stage * table.shape[0]
    mine = (local >= 0) & (local < table.shape[0])
    return jnp.where(mine[:, None], table[jnp.clip(local, 0, table.shape[0] - 1)], 0)


def supervised_first(weight: Float[Array, " C"]) -> Int[Array, " C"]:
    """Returns the permutation that moves rows with a loss weight to the front, in order."""
    return jnp.argsort(weight == 0, stable=True)


def head_slice(
    hidden: Float[Array, "C d"],
    head: Float[Array, "V_S d"],
    labels: Int[Array, " C"],
    num_live: Int[Array, ""],
    stage: Int[Array, ""],
    *,
    vocab_size: int,
    chunk: int,
    gradient: bool,
    softcap: float | None = None,
) -> HeadSlice:
    """Applies one stage's share of the head.

    Args:
        hidden: normed hidden states, supervised rows first.
        head: this stage's rows.
        labels: of the rows.
        num_live: supervised rows.
        stage: index of this stage.
        vocab_size: of the whole model; rows of the head beyond it are filling.
        chunk: rows whose logits exist at the same time, at most.
        gradient: whether `pull` is wanted.
        softcap: logits become softcap * tanh(logits / softcap).
    """
    rows, share = hidden.shape[0], head.shape[0]
    chunk = math.gcd(rows, chunk)
    acc = jnp.promote_types(hidden.dtype, jnp.float32)
    column = stage * share + jnp.arange(share)

    def body(i, slices: HeadSlice) -> HeadSlice:
        start = i * chunk
        h, label = (lax.dynamic_slice_in_dim(x, start, chunk) for x in (hidden, labels))
        logits = lax.dot_general(h, head, (((1,), (1,)), ((), ())), preferred_element_type=acc)
        slope = jnp.ones((), acc)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
            slope = _slope(logits, softcap)
        logits = jnp.where(column < vocab_size, logits, -jnp.inf)
        is_label = column == label[:, None]
        # A share may be all filling: its peak must stay finite.
        peak = jnp.maximum(logits.max(axis=1), jnp.finfo(acc).min)
        grown = jnp.exp(logits - peak[:, None])
        others = jnp.where(is_label, 0, grown * slope).astype(head.dtype)
        pull = slices.pull[:1]
        if gradient:
            pull = jnp.dot(others, head, preferred_element_type=acc)
        part = HeadSlice(
            peak,
            grown.sum(axis=1),
            jnp.where(is_label, logits, 0).sum(axis=1),
            column[jnp.argmax(logits, axis=1)],
            pull,
        )
        return HeadSlice(
            *(
                lax.dynamic_update_slice_in_dim(whole, new, start, 0)
                for whole, new in zip(slices, part, strict=True)
            )
        )

    zeros = jnp.zeros(rows, acc)
    pull = jnp.zeros((rows if gradient else 1, hidden.shape[1]), acc)
    empty = HeadSlice(zeros, zeros + 1, zeros, jnp.zeros(rows, column.dtype), pull)
    return lax.fori_loop(0, -(-num_live // chunk), body, empty)


class Softmax(NamedTuple):
    """The whole vocabulary's softmax, put together from all stages.

    Attributes:
        scale: what this stage's exp(logit - peak) must be multiplied by.
        label_probability: of each row.
        loss: cross-entropy of each row.
        peak: largest logit of the whole vocabulary.
    """

    scale: Float[Array, " C"]
    label_probability: Float[Array, " C"]
    loss: Float[Array, " C"]
    peak: Float[Array, " C"]


def softmax_over_stages(mine: HeadSlice) -> Softmax:
    """Exchanges peak and sums of all stages; to be called by all of them."""
    peak = lax.pmax(mine.peak, STAGE)
    rescale = jnp.exp(mine.peak - peak)
    total, label_logit = lax.psum((mine.total * rescale, mine.label_logit), STAGE)
    probability = jnp.exp(label_logit - peak) / total
    return Softmax(rescale / total, probability, peak + jnp.log(total) - label_logit, peak)


def hidden_gradient(
    mine: HeadSlice,
    softmax: Softmax,
    head: Float[Array, "V_S d"],
    labels: Int[Array, " C"],
    weight: Float[Array, " C"],
    stage: Int[Array, ""],
    softcap: float | None = None,
) -> Float[Array, "C d"]:
    """Returns this stage's part of the gradient of the weighted losses: sum over stages."""
    local = labels - stage * head.shape[0]
    here = (local >= 0) & (local < head.shape[0])
    row = head[jnp.clip(local, 0, head.shape[0] - 1)].astype(mine.pull.dtype)
    pulled = softmax.label_probability - 1
    if softcap is not None:
        pulled = pulled * _slope(mine.label_logit, softcap)
    own = jnp.where(here, pulled, 0)[:, None] * row
    part = mine.pull * softmax.scale[:, None] + own
    # A row without supervision takes part in nothing, whatever it holds.
    return jnp.where((weight != 0)[:, None], weight[:, None] * part, 0)


def _slope(capped: Float[Array, "*rows"], softcap: float) -> Float[Array, "*rows"]:
    """Derivative of a soft cap at the value that it gave."""
    return 1 - jnp.square(capped / softcap)


def losses_over_stages(
    mine: HeadSlice,
    softmax: Softmax,
    labels: Int[Array, " C"],
    weight: Float[Array, " C"],
) -> TokenLosses:
    """Returns weighted losses and whether the label is the arg-max; to be called by all stages."""
    at_peak: Bool[Array, " C"] = mine.peak == softmax.peak
    # Of equal logits the first token counts, as for arg-max on one device.
    best = lax.pmin(jnp.where(at_peak, mine.best, jnp.iinfo(mine.best.dtype).max), STAGE)
    live = weight != 0
    return TokenLosses(jnp.where(live, weight * softmax.loss, 0), live & (best == labels))


def unsorted(
    sorted_rows: Shaped[Array, "C ..."], order: Int[Array, " C"]
) -> Shaped[Array, "C ..."]:
    """Puts rows back to where `supervised_first` took them from."""
    return sorted_rows[jnp.argsort(order)]
