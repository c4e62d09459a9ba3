"""LoRAFusion's two mixed-integer programs, solved by HiGHS: the baseline of `bench schedule`.

First the fewest bins, then the emptiest last bin at that count; first-fit decreasing is the
fallback, as in the published algorithm (arXiv 2510.00206, section 5.2).
"""

from collections.abc import Callable

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from lorafusion_sched.baselines import ffd_bins
from lorafusion_sched.problem import padded
from lorafusion_sched.refill import Bin

_RELATIVE_GAP = 0.15  # of the second program, as published


class _Program:
    """Rows of one mixed-integer program under construction."""

    def __init__(self, variables: int):
        self.variables = variables
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def row(self, terms: list[tuple[int, float]], low: float, high: float) -> None:
        self.entries += [(len(self.low), column, value) for column, value in terms]
        self.low.append(low)
        self.high.append(high)

    def solve(
        self, cost: np.ndarray, upper: np.ndarray, seconds: float, gap: float
    ) -> np.ndarray | None:
        rows, columns, values = zip(*self.entries, strict=True)
        matrix = coo_array((values, (rows, columns)), shape=(len(self.low), self.variables))
        # scipy documents arrays here, but its defaults make the parameters look like floats.
        result = milp(
            cost,
            constraints=LinearConstraint(matrix.tocsr(), self.low, self.high),  # pyright: ignore[reportArgumentType]
            integrality=np.ones(self.variables),
            bounds=Bounds(0, upper),  # pyright: ignore[reportArgumentType]
            options={"time_limit": seconds, "mip_rel_gap": gap},
        )
        return result.x


def milp_packer(seconds: float = 3.0) -> Callable[[list[list[int]], int, int], list[Bin]]:
    """Returns a packer that solves both programs, each for at most `seconds`."""

    def pack_one(lengths: list[list[int]], capacity: int, tile: int) -> list[Bin]:
        best = ffd_bins(lengths, capacity, tile)
        fewest = _fewest_bins(lengths, capacity, tile, len(best), seconds)
        if fewest is not None and len(fewest) < len(best):
            best = fewest
        emptiest = _emptiest_bin(lengths, capacity, tile, len(best), seconds)
        if emptiest is not None and _key(emptiest, lengths, tile) < _key(best, lengths, tile):
            best = emptiest
        return best

    return pack_one


def _key(bins: list[Bin], lengths: list[list[int]], tile: int) -> tuple[int, int]:
    def rows(content: Bin) -> int:
        return sum(padded(sum(lengths[j][i] for i in x), tile) for j, x in content.items())

    return len(bins), min(map(rows, bins))


def _assignment(
    program: _Program, lengths: list[list[int]], bins: int, tile: int
) -> Callable[[int], list[tuple[int, float]]]:
    """Adds "each sample once" and "padded tiles per job and bin"; returns the rows of a bin.

    Variables: x[sample, bin] first, then k[job, bin], the tiles of a job in a bin.
    """
    samples = [(job, n) for job, batch in enumerate(lengths) for n in batch]
    tiles = len(samples) * bins
    for s in range(len(samples)):
        program.row([(s * bins + b, 1.0) for b in range(bins)], 1, 1)
    for job in range(len(lengths)):
        mine = [(s, n) for s, (owner, n) in enumerate(samples) if owner == job]
        for b in range(bins):
            terms = [(s * bins + b, float(n)) for s, n in mine]
            program.row([*terms, (tiles + job * bins + b, -float(tile))], -np.inf, 0)
    return lambda b: [(tiles + job * bins + b, float(tile)) for job in range(len(lengths))]


def _fewest_bins(
    lengths: list[list[int]], capacity: int, tile: int, bins: int, seconds: float
) -> list[Bin] | None:
    """Minimises the used bins, at most `bins` of them (the published program allows one each)."""
    shared = (sum(map(len, lengths)) + len(lengths)) * bins
    program = _Program(shared + bins)
    rows_of = _assignment(program, lengths, bins, tile)
    for b in range(bins):
        program.row([*rows_of(b), (shared + b, -float(capacity))], -np.inf, 0)
        program.row([*rows_of(b), (shared + b, -1.0)], 0, np.inf)
        if b:
            program.row([(shared + b - 1, 1.0), (shared + b, -1.0)], 0, np.inf)
    cost = np.zeros(program.variables)
    cost[shared:] = 1
    return _read(program.solve(cost, _upper(program, lengths, bins), seconds, 0.0), lengths, bins)


def _emptiest_bin(
    lengths: list[list[int]], capacity: int, tile: int, bins: int, seconds: float
) -> list[Bin] | None:
    """Minimises the rows of the least full of exactly `bins` bins."""
    shared = (sum(map(len, lengths)) + len(lengths)) * bins
    program = _Program(shared + bins + 1)
    least = shared + bins
    rows_of = _assignment(program, lengths, bins, tile)
    program.row([(shared + b, 1.0) for b in range(bins)], 1, 1)
    for b in range(bins):
        program.row(rows_of(b), 1, capacity)
        # The bin marked as least full has at most `least` rows.
        program.row([*rows_of(b), (least, -1.0), (shared + b, float(capacity))], -np.inf, capacity)
    cost = np.zeros(program.variables)
    cost[least] = 1
    upper = _upper(program, lengths, bins)
    upper[least] = capacity
    return _read(program.solve(cost, upper, seconds, _RELATIVE_GAP), lengths, bins)


def _upper(program: _Program, lengths: list[list[int]], bins: int) -> np.ndarray:
    upper = np.ones(program.variables)
    first = sum(map(len, lengths)) * bins
    upper[first : first + len(lengths) * bins] = np.inf
    return upper


def _read(solution: np.ndarray | None, lengths: list[list[int]], bins: int) -> list[Bin] | None:
    if solution is None:
        return None
    result: list[Bin] = [{} for _ in range(bins)]
    s = 0
    for job, batch in enumerate(lengths):
        for i in range(len(batch)):
            chosen = int(np.argmax(solution[s * bins : (s + 1) * bins]))
            result[chosen].setdefault(job, []).append(i)
            s += 1
    return [content for content in result if content]
