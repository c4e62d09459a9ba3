"""Causal attention that never crosses a sample, behind one switch.

`xla` never stores anything quadratic: the backward pass recomputes the probabilities from the
log-sum-exp of each row (Dao et al. 2022, arXiv 2205.14135), and rows longer than a query chunk are
worked off chunk by chunk in order, so that results are bit-repeatable.

A masked product still turns `0 * NaN` into NaN. So samples that hold anything non-finite are set
to zero on the way in and to NaN on the way out, forward and backward: the whole sample is NaN, and
no other sample changes by a bit. Padding rows are samples of one row.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

type Implementation = Literal["xla"]

_QUERY_CHUNK = 512
_UNCHUNKED_ROWS = 2048


class Segments(NamedTuple):
    """Where the samples of a packed row lie.

    Attributes:
        start: first row of the row's own sample; padding rows are their own start.
        offsets: first row of each sample and one past the last, padded with T, for
            implementations that walk over samples; its length M + 1 is static.
    """

    start: Int[Array, " T"]
    offsets: Int[Array, " M1"]


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


def attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    segments: Segments,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "T H D"]:
    """Attends from each row to the rows of its own sample up to itself.

    Args:
        q: queries, H heads.
        k: keys, G heads of which each serves H / G query heads in a row.
        v: values.
        segments: where the samples lie.
        window: a row sees the last `window` rows of its sample, itself included; None for all.
        softcap: scores become softcap * tanh(scores / softcap); None leaves them as they are.
        scale: factor of the scores; None for 1 / sqrt(D).
        implementation: "xla", or None for the best one here.

    Returns:
        The attended values in q's dtype.

    Raises:
        ValueError: unknown implementation, H is no multiple of G, or a window or soft cap that is
            not positive.
    """
    scoring = _scoring(q, window, softcap, scale)
    if implementation not in (None, "xla"):
        raise ValueError(f"{implementation=} is unknown: expected 'xla'")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    return _attention_xla(q, k, v, segments.start, scoring)


def cached_attention(
    q: Float[Array, "B S H D"],
    k: Float[Array, "B L G D"],
    v: Float[Array, "B L G D"],
    positions: Int[Array, "B S"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
) -> Float[Array, "B S H D"]:
    """Attends from new tokens to a key-value cache, whose row j holds position j.

    Args:
        q: queries of S new tokens in each of B sequences.
        k: cached keys, those of the new tokens included.
        v: cached values.
        positions: position of each new token; it sees cache rows up to that one.
        window: see `attention`.
        softcap: see `attention`.
        scale: see `attention`.

    Returns:
        The attended values in q's dtype.
    """
    scoring = _scoring(q, window, softcap, scale)
    rows, positions = jnp.arange(k.shape[1]), positions[..., None]
    visible = rows <= positions
    if window is not None:
        visible &= rows > positions - window

    def of_one(q, k, v, visible):
        return _attend(q, k, v, visible, scoring)[0]

    return jax.vmap(of_one)(q, k, v, visible)


def _scoring(q: Array, window: int | None, softcap: float | None, scale: float | None) -> Scoring:
    if window is not None and window < 1:
        raise ValueError(f"{window=}: expected at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{softcap=}: expected a positive number, or None for no cap")
    return Scoring(q.shape[-1] ** -0.5 if scale is None else float(scale), softcap, window)


def _attend(
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
def _attention_xla(q, k, v, start, scoring: Scoring):
    return _forward(q, k, v, start, scoring)[0]


def _forward(q, k, v, start, scoring: Scoring):
    bad = _samples_with(_nonfinite(q) | _nonfinite(k) | _nonfinite(v), start)
    q, k, v = (_fill(bad, x, 0.0) for x in (q, k, v))

    def chunk(carry, args):
        rows, q_rows = args
        return carry, _attend(q_rows, k, v, _visible(rows, start, scoring.window), scoring)

    _, (out, log_sum) = _over_chunks(chunk, (), (jnp.arange(q.shape[0]), q))
    bad = _samples_with(bad | _nonfinite(out), start)
    return _fill(bad, out, jnp.nan), (q, k, v, start, bad, out, log_sum)


def _backward(scoring: Scoring, residuals, dout):
    q, k, v, start, bad, out, log_sum = residuals
    bad = _samples_with(bad | _nonfinite(dout), start)
    q, k, v, out, log_sum, dout = (_fill(bad, x, 0.0) for x in (q, k, v, out, log_sum, dout))
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
    return (*(_fill(bad, d.astype(q.dtype), jnp.nan) for d in (dq, dk, dv)), None)


_attention_xla.defvjp(_forward, _backward)


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


def _nonfinite(x: Float[Array, "T _ _"]) -> Bool[Array, " T"]:
    return ~jnp.all(jnp.isfinite(x), axis=(1, 2))


def _samples_with(flag: Bool[Array, " T"], start: Int[Array, " T"]) -> Bool[Array, " T"]:
    """Spreads a row's flag over its whole sample."""
    per_start = jnp.zeros(flag.shape, jnp.int32).at[start].max(flag.astype(jnp.int32))
    return per_start[start] > 0


def _fill(rows: Bool[Array, " T"], x: Float[Array, "T _ _"], value: float) -> Array:
    return jnp.where(rows[:, None, None], jnp.asarray(value, x.dtype), x)
