"""Fills one microbatch exactly: the subset of samples with the most tokens that fits after padding.

Every job's reachable token sums are the bits of one Python integer (shift and or per sample, a
prefix kept per sample to read the subset back). A job given u tiles uses its largest reachable sum
of at most u * tile; a small max-plus recursion over jobs splits the tiles of the microbatch.
"""

from bisect import insort
from collections.abc import Sequence

_LONGEST, _SHORTEST = 40, 24  # samples of one batch considered at once
_MAX_UNITS = 96  # budget units of a microbatch; finer tiles are grouped
_IMPOSSIBLE = -(1 << 60)


class Pool:
    """The samples of one open global batch that are not placed yet, longest first.

    Args:
        lengths: tokens (or any size that is at least the tokens) of each sample, in any order.
    """

    def __init__(self, lengths: Sequence[int]):
        self.items = sorted(((n, -i) for i, n in enumerate(lengths)), reverse=True)
        self.tokens = sum(lengths)
        self._tables: dict[tuple[int, int, int, bool], _Table] = {}

    def table(self, unit: int, units: int, slack: int, forced: bool) -> "_Table":
        """Returns the reachable sums; kept until the pool changes."""
        key = unit, units, slack, forced
        if key not in self._tables:
            self._tables[key] = _Table(self.items, unit, units, slack, forced)
        return self._tables[key]

    def take(self, positions: Sequence[int]) -> list[int]:
        """Removes items by position; returns the indices they had in `lengths`."""
        taken = []
        for position in sorted(positions, reverse=True):
            length, negated = self.items[position]
            del self.items[position]
            self.tokens -= length
            taken.append(-negated)
        self._tables.clear()
        return sorted(taken)

    def hold(self, position: int) -> tuple[int, int]:
        """Removes one item for a while."""
        self._tables.clear()
        self.tokens -= self.items[position][0]
        return self.items.pop(position)

    def release(self, item: tuple[int, int]) -> None:
        """Puts a held item back."""
        self._tables.clear()
        self.tokens += item[0]
        insort(self.items, item, key=lambda x: (-x[0], -x[1]))


class _Table:
    """Reachable sums of one pool: for which budgets the best sum grows, and how to read it back."""

    def __init__(
        self, items: list[tuple[int, int]], unit: int, units: int, slack: int, forced: bool
    ):
        count = len(items)
        self.positions = [*range(min(count, _LONGEST))]
        self.positions += range(max(len(self.positions), count - _SHORTEST), count)
        self.lengths = [items[p][0] for p in self.positions]
        self.forced = forced
        mask = (1 << (units * unit + slack + 1)) - 1
        reach = 1
        self.prefix = [reach]
        for i, length in enumerate(self.lengths):
            moved = (reach << length) & mask
            reach = moved if forced and i == 0 else reach | moved
            self.prefix.append(reach)
        # (budget units, best tokens), only where one more unit allows more tokens
        self.points: list[tuple[int, int]] = []
        best = 0
        for u in range(units + 1):
            tokens = (reach & ((1 << (u * unit + slack + 1)) - 1)).bit_length() - 1
            if tokens > best:
                self.points.append((u, tokens))
                best = tokens

    def subset(self, tokens: int) -> list[int]:
        """Returns item positions whose lengths sum to `tokens`; prefers long ones."""
        chosen = []
        for i in range(len(self.lengths) - 1, -1, -1):
            before = self.prefix[i]
            if (self.forced and i == 0) or not (before >> tokens) & 1:
                chosen.append(self.positions[i])
                tokens -= self.lengths[i]
        return chosen


def fill(
    pools: Sequence[Pool], capacity: int, tile: int, *, focus: float = 0.0, force: bool = True
) -> list[list[int]]:
    """Takes the samples for one microbatch out of the pools.

    Maximises tokens, the first pool's counting up to `1 + focus` times the last one's, so that
    focus trades a few tokens for finishing the batches that come first.

    Args:
        pools: open batches, the most urgent first.
        capacity: rows available, a multiple of `tile`.
        tile: padding multiple of each pool's share.
        focus: relative weight of the first pool's tokens over the last one's.
        force: the first pool's longest sample must be in.

    Returns:
        For each pool the indices of the samples taken, ascending.
    """
    if not pools:
        return []
    unit = tile * -(-capacity // (tile * _MAX_UNITS))
    units, slack = divmod(capacity, unit)  # the first pool may use the slack beyond its units
    tables = [
        pool.table(unit, units, slack if i == 0 else 0, force and i == 0)
        for i, pool in enumerate(pools)
    ]
    weight = [1000 + round(1000 * focus * (1 - i / len(pools))) for i in range(len(pools))]
    points = [
        [(u, tokens * w) for u, tokens in table.points]
        for table, w in zip(tables, weight, strict=True)
    ]
    values = [[0] * (units + 1)]
    for i, steps in enumerate(points):
        old = values[-1]
        if i == 0:
            new = [_IMPOSSIBLE if force else 0] * (units + 1)
            for u, value in steps:
                new[u:] = [value] * (units + 1 - u)
        elif i + 1 < len(points):
            new = old.copy()
            for u, value in steps:
                new[u:] = map(max, new[u:], [x + value for x in old[: units + 1 - u]])
        else:  # of the last pool's row only the end is read
            new = [*old[:-1], max([old[-1], *(old[units - u] + value for u, value in steps)])]
        values.append(new)
    return _read_back(pools, tables, points, values, units)


def _read_back(
    pools: Sequence[Pool],
    tables: list[_Table],
    points: list[list[tuple[int, int]]],
    values: list[list[int]],
    units: int,
) -> list[list[int]]:
    taken: list[list[int]] = [[] for _ in pools]
    left = units
    for i in range(len(pools) - 1, -1, -1):
        want, old = values[i + 1][left], values[i]
        if want == old[left] and not tables[i].forced:
            continue
        for (u, value), (_, tokens) in zip(points[i], tables[i].points, strict=True):
            if u <= left and value + old[left - u] == want:
                taken[i] = pools[i].take(tables[i].subset(tokens))
                left -= u
                break
    return taken
