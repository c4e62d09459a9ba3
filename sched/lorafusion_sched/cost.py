"""The cost of a microbatch from measured times: fitted, kept in a file, read again."""

import json
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

from lorafusion_sched.problem import Cost, PlanError

FORMAT, VERSION = "lorafusion-cost", 1
_TERMS = ("fixed", "per_token", "per_square")


class Measured(NamedTuple):
    """One measured microbatch.

    Attributes:
        rows: tokens of its static shape.
        squares: sum of its squared sample lengths.
        seconds: forward and backward together.
    """

    rows: int
    squares: int
    seconds: float


def fit_cost(measured: Sequence[Measured], *, backward: float = 1.0) -> Cost:
    """Fits the terms of a cost to measured times, none of them negative.

    Least squares of relative errors, over every choice of terms: with three terms that is exact
    and needs no solver.

    Args:
        measured: microbatches of at least two sizes.
        backward: backward time over forward time, which the sum of both does not tell.

    Raises:
        PlanError: times are missing or not positive.
    """
    if len({one.rows for one in measured}) < 2 or not all(one.seconds > 0 for one in measured):
        raise PlanError("a cost needs positive times of microbatches of at least two sizes")
    # Columns in units of their largest value: sums of squares are a million times the rows.
    columns = [(1.0, float(one.rows), float(one.squares)) for one in measured]
    scale = [max(column[i] for column in columns) or 1.0 for i in range(3)]
    rows = [
        [column[i] / scale[i] / one.seconds for i in range(3)]
        for column, one in zip(columns, measured, strict=True)
    ]
    best, best_error = (0.0, 0.0, 0.0), float("inf")
    for count in (1, 2, 3):
        for chosen in combinations(range(3), count):
            solved = _least_squares([[row[i] for i in chosen] for row in rows])
            if solved is None or min(solved) < 0:
                continue
            terms = [0.0, 0.0, 0.0]
            for i, value in zip(chosen, solved, strict=True):
                terms[i] = value
            error = sum(
                (sum(a * t for a, t in zip(row, terms, strict=True)) - 1) ** 2 for row in rows
            )
            if error < best_error - 1e-12:
                best_error = error
                best = (terms[0] / scale[0], terms[1] / scale[1], terms[2] / scale[2])
    fixed, per_token, per_square = (term / (1 + backward) for term in best)
    return Cost(fixed=fixed, per_token=per_token, per_square=per_square, backward=backward)


def _least_squares(rows: list[list[float]]) -> list[float] | None:
    """Solves rows @ x = 1 in the sense of least squares; None if it has no single solution."""
    n = len(rows[0])
    table = [
        [sum(row[i] * row[j] for row in rows) for j in range(n)] + [sum(row[i] for row in rows)]
        for i in range(n)
    ]
    size = max(table[i][i] for i in range(n))
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(table[k][i]))
        table[i], table[pivot] = table[pivot], table[i]
        if abs(table[i][i]) < 1e-9 * size:
            return None
        for k in range(n):
            if k != i:
                factor = table[k][i] / table[i][i]
                table[k] = [a - factor * b for a, b in zip(table[k], table[i], strict=True)]
    return [table[i][n] / table[i][i] for i in range(n)]


def cost_to_json(cost: Cost, **about: str) -> str:
    """Returns a cost as one JSON document.

    Args:
        cost: times in any unit.
        about: what was measured where, for the reader.
    """
    terms = {name: getattr(cost, name) for name in (*_TERMS, "backward")}
    return (
        json.dumps({"format": FORMAT, "version": VERSION, **terms, "about": about}, indent=1) + "\n"
    )


def cost_from_json(text: str) -> Cost:
    """Reads what `cost_to_json` wrote.

    Raises:
        PlanError: another document, or a term that is not a number.
    """
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"not a cost: invalid JSON ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise PlanError(f'not a cost: expected a JSON object with "format": "{FORMAT}"')
    if record.get("version") != VERSION:
        raise PlanError(f"cost version {record.get('version')!r}, this program reads {VERSION}")
    terms: dict[str, float] = {}
    for name in (*_TERMS, "backward"):
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise PlanError(f"{name} of a cost must be a number, got {value!r}")
        terms[name] = float(value)
    return Cost(
        fixed=terms["fixed"],
        per_token=terms["per_token"],
        per_square=terms["per_square"],
        backward=terms["backward"],
    )
