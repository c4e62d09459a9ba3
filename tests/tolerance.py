"""Comparisons that name the worst leaf: same bits, few ulps, or no worse than a reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

type Tree = Any


def assert_bit_equal(actual: Tree, expected: Tree) -> None:
    """Asserts equal structure, dtypes, shapes and bytes (sign of zero and NaN payload too)."""
    problems = []
    for name, got, want in _paired_leaves(actual, expected):
        if got.dtype != want.dtype or got.shape != want.shape:
            problems.append(f"{name}: got {_kind(got)}, expected {_kind(want)}")
            continue
        different = np.flatnonzero(_bytes_of_elements(got) != _bytes_of_elements(want))
        if different.size:
            at = np.unravel_index(different[0], got.shape)
            problems.append(
                f"{name}: {different.size} of {got.size} elements differ, first at "
                f"{tuple(int(i) for i in at)}: got {got[at]!r}, expected {want[at]!r}"
            )
    assert not problems, "not bit-equal:\n  " + "\n  ".join(problems)


def assert_error_ratio(
    actual: Tree,
    same_dtype_ref: Tree,
    truth: Tree,
    factor: float = 2.0,
    *,
    floor_ulp: float = 2.0,
) -> float:
    """Asserts that no leaf errs more than `factor` times what a reference in its dtype errs.

    The error of a leaf is the largest absolute difference from the truth. The allowance has a floor
    of `floor_ulp` units in the last place of the leaf's largest true value, in the dtype of the
    reference, because a reference may happen to be exact. The criterion is flash-attention's.

    Args:
        actual: what is tested.
        same_dtype_ref: an independent computation in the dtype of what is tested.
        truth: the same in a wider dtype.
        factor: allowed ratio of the two errors.
        floor_ulp: allowance where the reference is (nearly) exact, in ulps.

    Returns:
        The worst error as a share of its allowance, at most 1.

    Raises:
        AssertionError: with one line per failing leaf and the worst one marked.
    """
    rows = []
    for (name, got, want), (_, ref, _) in zip(
        _paired_leaves(actual, truth), _paired_leaves(same_dtype_ref, truth), strict=True
    ):
        assert got.shape == want.shape == ref.shape, (
            f"{name}: shapes {got.shape} (actual), {ref.shape} (reference), {want.shape} (truth)"
        )
        assert np.isfinite(_wide(want)).all(), f"{name}: the truth itself is not finite"
        ours, theirs = _largest_error(got, want), _largest_error(ref, want)
        floor = floor_ulp * _epsilon(ref) * float(np.max(np.abs(_wide(want)), initial=0.0))
        allowed = max(factor * theirs, floor)
        share = 0.0 if ours == 0 else ours / allowed if allowed else np.inf
        rows.append((share, f"{name}: error {ours:.3e}, reference {theirs:.3e}, x{share:.2f}"))
    bad = sorted((row for row in rows if not row[0] <= 1), reverse=True)
    assert not bad, f"error beyond {factor} x the reference's (worst first):\n  " + "\n  ".join(
        text for _, text in bad
    )
    return max((share for share, _ in rows), default=0.0)


def assert_ulp(actual: Tree, expected: Tree, max_ulp: int) -> int:
    """Asserts that floats are at most `max_ulp` representable numbers apart; returns the most."""
    worst, problems = 0, []
    for name, got, want in _paired_leaves(actual, expected):
        if got.dtype != want.dtype or got.shape != want.shape:
            problems.append(f"{name}: got {_kind(got)}, expected {_kind(want)}")
            continue
        nan = np.isnan(_wide(got)), np.isnan(_wide(want))
        if not np.array_equal(*nan):
            problems.append(f"{name}: NaN in different places")
            continue
        apart = np.where(nan[0], 0, np.abs(_ordered(got) - _ordered(want)))
        largest = int(np.max(apart, initial=0))
        worst = max(worst, largest)
        if largest > max_ulp:
            at = np.unravel_index(np.argmax(apart), got.shape)
            problems.append(
                f"{name}: {largest} ulp at {at}: got {got[at]!r}, expected {want[at]!r}"
            )
    assert not problems, f"more than {max_ulp} ulp apart:\n  " + "\n  ".join(problems)
    return worst


def _paired_leaves(actual: Tree, expected: Tree) -> list[tuple[str, np.ndarray, np.ndarray]]:
    got, got_def = tree_flatten_with_path(jax.tree.map(np.asarray, actual))
    want, want_def = tree_flatten_with_path(jax.tree.map(np.asarray, expected))
    assert got_def == want_def, f"trees differ:\n  got      {got_def}\n  expected {want_def}"
    return [(keystr(path) or "value", a, b) for (path, a), (_, b) in zip(got, want, strict=True)]


def _kind(x: np.ndarray) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _bytes_of_elements(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(f"V{x.dtype.itemsize}")


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def _largest_error(x: np.ndarray, truth: np.ndarray) -> float:
    error = np.abs(_wide(x) - _wide(truth))
    return float(np.max(np.where(np.isfinite(error), error, np.inf), initial=0.0))


def _epsilon(x: np.ndarray) -> float:
    return float(jnp.finfo(x.dtype).eps) if jnp.issubdtype(x.dtype, jnp.floating) else 0.0


def _ordered(x: np.ndarray) -> np.ndarray:
    """Maps floats to integers of the same order, adjacent floats to adjacent integers."""
    bits = np.ascontiguousarray(x).view(f"i{x.dtype.itemsize}").astype(object)
    lowest = -(1 << (8 * x.dtype.itemsize - 1))
    return np.where(bits < 0, lowest - bits, bits)
