"""Causal attention that never crosses a sample, behind one switch.

`cudnn` is the fastest on a GPU; `xla` runs everywhere, does all that is asked of it and repeats its
bits. An implementation refuses what it cannot do with a reason (NotImplementedError), and the next
one is taken.

A masked product still turns `0 * NaN` into NaN. So what is not finite, or so large that a product
of two might not be, is zero on the way in, and samples that hold any of it are NaN on the way out,
or flagged to become NaN, forward and backward, whatever the implementation: the whole sample is
NaN, and no other sample changes by a bit. Padding rows are samples of one row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lorafusion_jax.models import attention_cudnn, attention_xla
from lorafusion_jax.models.attention_cudnn import Operand
from lorafusion_jax.models.attention_xla import Scoring
from lorafusion_jax.models.rotary import Rotary, rotate

type AttentionImplementation = Literal["cudnn", "xla"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Demands:
    """What a run asks of attention; static.

    Attributes:
        deterministic: take an implementation that repeats its bits.
        longest: no sample and no run of padding has more rows; None for no bound.
    """

    deterministic: bool = False
    longest: int | None = None


class Segments(NamedTuple):
    """Where the samples of a packed row lie.

    Attributes:
        start: first row of the row's own sample; padding rows are their own start.
        offsets: first row of each sample and of each run of padding, and one past the last, padded
            with T, for implementations that walk over samples; its length M + 1 is static.
        demands: what the run asks of attention.
    """

    start: Int[Array, " T"]
    offsets: Int[Array, " M1"]
    demands: Demands = Demands()


def attention(
    q: Float[Array, "T H D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    segments: Segments,
    *,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: AttentionImplementation | None = None,
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
        implementation: "cudnn", "xla", or None for the first one that can.

    Returns:
        The attended values in q's dtype.

    Raises:
        ValueError: unknown implementation, H is no multiple of G, or a window or soft cap that is
            not positive.
        NotImplementedError: the implementation asked for cannot do this; the reason.
    """
    out, bad = attention_and_flags(
        q, k, v, segments,
        window=window, softcap=softcap, scale=scale, implementation=implementation,
    )  # fmt: skip
    return _fill(bad, out, jnp.nan)


def attention_and_flags(
    q: Float[Array, "T H D"],
    k: Float[Array, "T G D"],
    v: Float[Array, "T G D"],
    segments: Segments,
    *,
    rotary: Rotary | None = None,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: AttentionImplementation | None = None,
) -> tuple[Float[Array, "T H D"], Bool[Array, " T"]]:
    """As `attention`, but leaves it to the caller to make samples NaN that hold such values.

    A layer does that where it adds up its residual stream, for nothing; here it would take a pass
    over the output, and keep it twice. The gradients of such samples are NaN in any case.

    Args:
        q: see `attention`, and so for all others.
        rotary: angles by which q and k are to be rotated first. What is not finite is then looked
            for in the same pass over them.

    Returns:
        The attended values, wrong in some samples, and the rows of those.
    """
    scoring = _scoring(q, window, softcap, scale)
    if implementation not in (None, *_IMPLEMENTATIONS):
        known = " or ".join(map(repr, _IMPLEMENTATIONS))
        raise ValueError(f"{implementation=} is unknown: expected {known}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if implementation is None:
        implementation = choose(q, k, segments, scoring)
    elif implementation == "cudnn" and (reason := attention_cudnn.refusal(q, k, segments, scoring)):
        raise NotImplementedError(f"cudnn: {reason}")
    return _guarded((_IMPLEMENTATIONS[implementation], scoring), q, k, v, segments, rotary)


def choose(q: Operand, k: Operand, segments: Segments, scoring: Scoring) -> AttentionImplementation:
    """Returns the implementation that `attention` takes for operands of these shapes."""
    return "xla" if attention_cudnn.refusal(q, k, segments, scoring) else "cudnn"


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
        return attention_xla.attend_to(q, k, v, visible, scoring)[0]

    return jax.vmap(of_one)(q, k, v, visible)


def _scoring(q: Array, window: int | None, softcap: float | None, scale: float | None) -> Scoring:
    if window is not None and window < 1:
        raise ValueError(f"{window=}: expected at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"{softcap=}: expected a positive number, or None for no cap")
    return Scoring(q.shape[-1] ** -0.5 if scale is None else float(scale), softcap, window)


def _by_xla(q, k, v, segments: Segments, scoring: Scoring):
    return attention_xla.attend(q, k, v, segments.start, scoring)


def _by_cudnn(q, k, v, segments: Segments, scoring: Scoring):
    longest, deterministic = segments.demands.longest, segments.demands.deterministic
    return attention_cudnn.attend(q, k, v, segments.offsets, scoring, longest, deterministic)


_IMPLEMENTATIONS: dict[AttentionImplementation, Callable] = {"cudnn": _by_cudnn, "xla": _by_xla}


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(what: tuple[Callable, Scoring], q, k, v, segments: Segments, rotary: Rotary | None):
    """Runs an implementation that may spread what is not finite, and keeps it in its sample.

    Returns the output, and the rows of samples that hold such values.
    """
    return _guarded_forward(what, q, k, v, segments, rotary)[0]


def _guarded_forward(what, q, k, v, segments: Segments, rotary: Rotary | None):
    function, scoring = what
    bad = _samples_with(_unusable(q) | _unusable(k) | _unusable(v), segments.start)

    def attend(q, k, v):
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return function(q, k, v, segments, scoring)

    out, pull = jax.vjp(attend, *(_usable_or_zero(x) for x in (q, k, v)))
    if out.dtype == jnp.float16:  # its range is too small for the promise of `_bound`
        bad = _samples_with(bad | ~jnp.all(jnp.isfinite(out), axis=(1, 2)), segments.start)
    return (out, bad), (pull, bad, segments)


def _guarded_backward(what, residuals, cotangents):
    (pull, bad, segments), (dout, _) = residuals, cotangents
    bad = _samples_with(bad | _unusable(dout), segments.start)
    gradients = pull(_usable_or_zero(dout))
    return (*(_fill(bad, gradient, jnp.nan) for gradient in gradients), None, None)


_guarded.defvjp(_guarded_forward, _guarded_backward)


def _bound(x: Array) -> Array:
    """What is larger is as good as not finite: products and sums of what is not are finite.

    1e17, and 32,752 for float16.
    """
    return jnp.asarray(min(1e17, float(jnp.finfo(x.dtype).max) / 2), x.dtype)


def _unusable(x: Float[Array, "T _ _"]) -> Bool[Array, " T"]:
    # By the maximum, as XLA would write down and read again what it shares with `_usable_or_zero`.
    return ~(jnp.max(jnp.abs(x), axis=(1, 2)) <= _bound(x))


def _usable_or_zero(x: Array) -> Array:
    """Element by element: XLA does it where x is needed, in the rotary embedding's own pass."""
    return jnp.where(jnp.abs(x) <= _bound(x), x, jnp.zeros((), x.dtype))


def _samples_with(flag: Bool[Array, " T"], start: Int[Array, " T"]) -> Bool[Array, " T"]:
    """Spreads a row's flag over its whole sample."""
    # Without the barrier XLA computes a row's flag inside the scatter: one thread reads the row.
    flag = jax.lax.optimization_barrier(flag)
    per_start = jnp.zeros(flag.shape, jnp.int32).at[start].max(flag.astype(jnp.int32))
    return per_start[start] > 0


def _fill(rows: Bool[Array, " T"], x: Float[Array, "T _ _"], value: float) -> Array:
    return jnp.where(rows[:, None, None], jnp.asarray(value, x.dtype), x)
