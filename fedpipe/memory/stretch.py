"""A stretch of units trained together: its peak at any levels of recomputation, and the least of it that fits."""

from collections.abc import Iterable, Sequence

from fedpipe.memory.costs import Costs
from fedpipe.memory.planner import Option, cheapest, smallest
from fedpipe.recompute import Policy
from fedpipe.types import Phase

Again = None  # as a level: every unit runs again in the backward
Ranges = dict[tuple[str, str], dict[int | None, int]]  # peaks in bytes, by first and last unit and by level


class Stretch:
    """Units first .. last of the body (counted from 0, the stem) and the head behind them, trained in one phase."""

    def __init__(self, costs: Costs, first: int, last: int) -> None:
        self.costs, self.first, self.last = costs, first, last
        self.units = range(first, last + 1)
        # gradients end with the first unit that has any of its own
        self.lowest = next((u for u in self.units if costs.trains(costs.body[u])), last)

    def peak(self, level: int | None = 0) -> int:
        """Bytes with every unit at a level, or the highest it has below; the stem never runs again."""
        return self.costs.peak([self._way(u, level) for u in self.units])

    def under(self, policy: Policy) -> int:
        """Bytes under a policy without ranges."""
        return self.costs.peak([self._way(u, policy.level(self.costs.body[u])) for u in self.units])

    def _way(self, unit: int, level: int | None) -> Option:
        deep, ends = unit > self.lowest, unit == self.last
        if level is Again and unit in self.costs.steady:
            return self.costs.again(unit, unit, deep, ends)
        return self.costs.way(unit, level or 0, deep, ends)

    def options(self, alone: bool = False) -> tuple[list[Option], list[int]]:
        """Every way to train each unit and every range that may run again, or of these only single units, and the
        tail; inputs in bytes."""
        costs = self.costs
        ways = [costs.way(u, n, u > self.lowest, u == self.last) for u in self.units for n in costs.has(u)]
        for a in self.units:
            for b in range(a, (a if alone else self.last) + 1):
                if b not in costs.steady:
                    break
                ways.append(costs.again(a, b, a > self.lowest, b == self.last))
        return costs.moved(ways, costs.tail(self.last))

    def cheapest(self, limit: int) -> Policy | None:
        """What to run again, with the least work, so that the peak is within `limit` bytes; None where nothing does."""
        held, *others = self.costs.constant(self.first, self.last, 0)
        if max(held, *others) > limit:
            return None
        chosen = cheapest(*self.options(), limit - held)
        return None if chosen is None else self._policy(chosen[:-1])

    def smallest(self, alone: bool = False) -> int:
        """The least peak in bytes that recomputation can reach; alone: of single units."""
        return max(self.costs.constant(self.first, self.last, smallest(*self.options(alone))))

    def _policy(self, chosen: Sequence[Option]) -> Policy:
        names = self.costs.body[self.first :]
        levels = tuple((names[o.first], o.level) for o in chosen if o.level)
        return Policy(levels, tuple((names[o.first], names[o.last]) for o in chosen if o.level is Again))


def of(costs: Costs, phase: Phase) -> Stretch | None:
    """The units whose gradients a phase computes; None where it trains the head alone."""
    trained = [u for u, name in enumerate(costs.body) if costs.trains(name)]
    last = costs.body.index(phase.upto) if phase.upto in costs.body else len(costs.body) - 1
    return Stretch(costs, trained[0], last) if trained and trained[0] <= last else None


def ranges(costs: Costs, levels: Iterable[int | None]) -> Ranges:
    """The peaks of every range of units after the stem, which goes with the first of them, at some levels; none of a
    range whose last unit cannot be linked to the head."""
    names, found = costs.body, Ranges()
    linked = [last for last in range(1, len(names)) if costs.links(last)]
    for first in range(1, len(names)):
        for last in (u for u in linked if u >= first):
            stretch = Stretch(costs, 0 if first == 1 else first, last)
            found[names[first], names[last]] = {level: stretch.peak(level) for level in levels}
    return found
