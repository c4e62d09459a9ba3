"""Chunked LM head and cross-entropy: never all logits at once, no gradient for the frozen head.

The forward pass computes, chunk by chunk, the losses *and* their gradient with respect to the
hidden states, so the backward pass only scales rows and no logits are computed twice or kept (the
idea of Liger-Kernel's fused linear cross-entropy). Rows without supervision are not computed at
all: the supervised ones are gathered to the front and the loop stops after the last of them.

With e = exp(logits - max), the gradient of a row is (e W) / sum(e) - W[label]: one pass over the
logits less than by way of the probabilities.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num


class TokenLosses(NamedTuple):
    """What the LM head says about each row.

    Attributes:
        weighted: loss_weight * cross-entropy, exactly 0 where the weight is 0.
        correct: the label is the most likely token; False where the weight is 0.
    """

    weighted: Float[Array, " T"]
    correct: Bool[Array, " T"]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def token_losses(
    hidden: Float[Array, "T d"],
    head: Float[Array, "V d"],
    labels: Int[Array, " T"],
    weight: Float[Array, " T"],
    chunk: int,
    softcap: float | None = None,
) -> TokenLosses:
    """Computes the weighted cross-entropy of each row against its label.

    Differentiable in `hidden` only. Rows with weight 0 contribute exactly nothing, even if they
    hold NaN.

    Args:
        hidden: final hidden states.
        head: frozen LM head, vocabulary first as in tied embeddings.
        labels: token id that each row should predict.
        weight: loss weight of each row, 0 for unsupervised ones.
        chunk: rows whose logits exist at the same time.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None leaves them.

    Returns:
        Losses in float32 (float64 for float64 inputs) and whether the arg-max is right.
    """
    return _forward(hidden, head, labels, weight, chunk, softcap, with_gradient=False)[0]


def _forward(hidden, head, labels, weight, chunk, softcap, *, with_gradient: bool):
    num_rows = hidden.shape[0]
    acc = jnp.promote_types(hidden.dtype, jnp.float32)
    padded = -(-num_rows // chunk) * chunk
    # Stable, so supervised rows keep their order; the tail repeats row 0 with weight 0.
    order = jnp.argsort(weight == 0, stable=True)
    order = jnp.pad(order, (0, padded - num_rows))
    live = jnp.arange(padded) < jnp.count_nonzero(weight)
    num_chunks = -(-jnp.count_nonzero(weight) // chunk)

    def body(i, carry):
        losses, correct, dhidden = carry
        rows = jax.lax.dynamic_slice_in_dim(order, i * chunk, chunk)
        is_live = jax.lax.dynamic_slice_in_dim(live, i * chunk, chunk)
        h = jnp.where(is_live[:, None], hidden[rows], 0)
        row_weight = jnp.where(is_live, weight[rows], 0).astype(acc)
        label = labels[rows]
        logits = jax.lax.dot_general(h, head, (((1,), (1,)), ((), ())), preferred_element_type=acc)
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        top = jnp.max(logits, axis=1, keepdims=True)
        exponentials = jnp.exp(logits - top)
        total = jnp.sum(exponentials, axis=1, keepdims=True)
        log_z = (jnp.log(total) + top)[:, 0]
        label_logit = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
        # Rows past the last live one would write to row 0: send them out of bounds instead.
        target = jnp.where(is_live, rows, num_rows)
        losses = losses.at[target].set(row_weight * (log_z - label_logit), mode="drop")
        hit = jnp.argmax(logits, axis=1) == label
        correct = correct.at[target].set(hit, mode="drop")
        if with_gradient:
            of_label = jnp.ones_like(label_logit)
            if softcap is not None:
                exponentials = exponentials * (1 - jnp.square(logits / softcap))
                of_label = 1 - jnp.square(label_logit / softcap)
            mean = jax.lax.dot_general(
                exponentials.astype(hidden.dtype),
                head,
                (((1,), (0,)), ((), ())),
                preferred_element_type=acc,
            )
            dh = mean / total - of_label[:, None] * head[label].astype(acc)
            dh = dh * row_weight[:, None]
            dhidden = dhidden.at[target].set(dh.astype(hidden.dtype), mode="drop")
        return losses, correct, dhidden

    dhidden = jnp.zeros_like(hidden) if with_gradient else None
    zeros = (jnp.zeros(num_rows, acc), jnp.zeros(num_rows, jnp.bool_), dhidden)
    losses, correct, dhidden = jax.lax.fori_loop(0, num_chunks, body, zeros)
    return TokenLosses(losses, correct), dhidden


def _token_losses_fwd(hidden, head, labels, weight, chunk, softcap):
    return _forward(hidden, head, labels, weight, chunk, softcap, with_gradient=True)


def _token_losses_bwd(chunk, softcap, dhidden, cotangent):
    row_scale = cotangent.weighted[:, None].astype(dhidden.dtype)
    # A row that took part in nothing has gradient 0, whatever its cotangent is.
    dx = jnp.where(dhidden == 0, jnp.zeros((), dhidden.dtype), dhidden * row_scale)
    return dx, None, None, None


token_losses.defvjp(_token_losses_fwd, _token_losses_bwd)


def sum_by_slot(
    per_row: Num[Array, " T"], tile_adapter: Int[Array, " tiles"], num_slots: int
) -> Num[Array, " slots"]:
    """Sums rows by adapter slot, tile by tile: one slot's NaN never reaches another's sum."""
    per_tile = per_row.reshape(tile_adapter.shape[0], -1).sum(axis=1)
    mine = jnp.arange(num_slots)[:, None] == tile_adapter[None, :]
    return jnp.sum(jnp.where(mine, per_tile[None, :], 0), axis=1)
