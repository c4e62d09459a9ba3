"""Attention by XLA: exact, bit-repeatable, on any device, and never storing anything quadratic.

The backward pass recomputes the probabilities from the log-sum-exp of each row (Dao et al. 2022,
arXiv 2205.14135). Rows longer than a query chunk are worked off chunk by chunk, in order.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_QUERY_CHUNK = 512
_UNCHUNKED_ROWS = 2048


class Scoring(NamedTuple):
    """How scores come from queries and keys; static.

    Attributes:
        scale: factor of the products.
        softcap: scores become softcap * tanh(scores / softcap), as in Gemma 2; None leaves them.
        window: rows that a row sees at most, itself included and the last ones; None for all.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None


def attend_to(
    q: Float[Array, "Q H D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    visible: Bool[Array, "Q T"],
    scoring: Scoring,
) -> tuple[Float[Array, "Q H D"], Float[Array, "Q G H_G"]]:
    """Attention and the log-sum-exp of its scores, both by f32 softmax."""
    acc = _accumulator_dtype(q)
    scores = jnp.where(visible, _scores(q, k, scoring), -jnp.inf)
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    weights = jnp.exp(scores - log_sum[..., None]).astype(v.dtype)
    out = jnp.einsum("ghqt,tgd->qghd", weights, v, preferred_element_type=acc)
    return out.reshape(q.shape).astype(q.dtype), jnp.moveaxis(log_sum, -1, 0)


def _attend_backward(q, k, v, visible, scoring: Scoring, log_sum, dout, taken):
    """Gradients of `_attend`; `taken` is the sum of dout * out over D, [Q, G, H_G]."""
    acc = _accumulator_dtype(q)
    grouped = log_sum.shape + q.shape[2:]
    q_rows, dout = q.reshape(grouped), dout.reshape(grouped)
    scores = _scores(q, k, scoring)
    weights = jnp.exp(
        jnp.where(visible, scores, -jnp.inf) - jnp.moveaxis(log_sum, 0, -1)[..., None]
    )
    dweights = jnp.einsum("qghd,tgd->ghqt", dout, v, preferred_element_type=acc)
    dscores = weights * (dweights - jnp.moveaxis(taken, 0, -1)[..., None]) * scoring.scale
    if scoring.softcap is not None:
        dscores = dscores * (1.0 - jnp.square(scores / scoring.softcap))
    dscores = jnp.where(visible, dscores, 0.0)  # dweights of a neighbour may have overflowed
    weights, dscores = weights.astype(q.dtype), dscores.astype(q.dtype)
    dq = jnp.einsum("ghqt,tgd->qghd", dscores, k, preferred_element_type=acc)
    dk = jnp.einsum("ghqt,qghd->tgd", dscores, q_rows, preferred_element_type=acc)
    dv = jnp.einsum("ghqt,qghd->tgd", weights, dout, preferred_element_type=acc)
    return dq.reshape(q.shape), dk, dv


def _scores(q, k, scoring: Scoring) -> Float[Array, "G H_G Q T"]:
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[2])
    acc = _accumulator_dtype(q)
    scores = jnp.einsum("qghd,tgd->ghqt", grouped, k, preferred_element_type=acc)
    scores = scores * scoring.scale
    if scoring.softcap is None:
        return scores
    return scoring.softcap * jnp.tanh(scores / scoring.softcap)


def _accumulator_dtype(x: Array) -> np.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: Float[Array, "T H D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    start: Int[Array, " T"],
    scoring: Scoring,
) -> Float[Array, "T H D"]:
    """Attends from each row to the rows from `start` up to itself; inputs must be finite."""
    return _forward(q, k, v, start, scoring)[0]


def _forward(q, k, v, start, scoring: Scoring):
    def chunk(carry, args):
        rows, q_rows = args
        return carry, attend_to(q_rows, k, v, _visible(rows, start, scoring.window), scoring)

    _, (out, log_sum) = _over_chunks(chunk, (), (jnp.arange(q.shape[0]), q))
    return out, (q, k, v, start, out, log_sum)


def _backward(scoring: Scoring, residuals, dout):
    # Else XLA takes the scores of the forward pass, or computes them early, and keeps them all.
    residuals, dout = jax.lax.optimization_barrier((residuals, dout))
    q, k, v, start, out, log_sum = residuals
    acc = _accumulator_dtype(q)
    taken = jnp.sum(dout.astype(acc) * out.astype(acc), axis=-1).reshape(log_sum.shape)

    def chunk(sums, args):
        rows, q_rows, *rest = args
        visible = _visible(rows, start, scoring.window)
        dq, dk, dv = _attend_backward(q_rows, k, v, visible, scoring, *rest)
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = (jnp.zeros(k.shape, acc), jnp.zeros(v.shape, acc))
    rows = jnp.arange(q.shape[0])
    (dk, dv), dq = _over_chunks(chunk, zeros, (rows, q, log_sum, dout, taken))
    return (*(d.astype(q.dtype) for d in (dq, dk, dv)), None)


attend.defvjp(_forward, _backward)


def _over_chunks(body, carry, args):
    """Scans `body` over chunks of query rows; short rows are one chunk.

    Rows that fill up the last chunk are copies of row 0 with zero gradient, and are cut off.
    """
    num_rows = args[0].shape[0]
    if num_rows <= _UNCHUNKED_ROWS:
        return body(carry, args)
    missing = -num_rows % _QUERY_CHUNK

    def split(x):
        padded = jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1))
        return padded.reshape(-1, _QUERY_CHUNK, *x.shape[1:])

    carry, outs = jax.lax.scan(body, carry, jax.tree.map(split, args))
    return carry, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_rows], outs)


def _visible(
    rows: Int[Array, " Q"], start: Int[Array, " T"], window: int | None
) -> Bool[Array, "Q T"]:
    keys, first = jnp.arange(start.shape[0]), start[rows]
    if window is not None:
        first = jnp.maximum(first, rows - (window - 1))
    return (keys >= first[:, None]) & (keys <= rows[:, None])
