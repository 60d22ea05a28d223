"""What to keep and what to run again, so that a chain of units trains within a budget: an exact dynamic programme.

An option says how consecutive units are trained; options in order cover the chain, and bytes add up along it. The chain
is that of arXiv 1911.13214, its units as different as they are; ranges run again once, as in arXiv 1604.06174, and do
not nest; units have levels of recomputation, and gradients stay. Parameters, optimizer state and whatever else does not
change are outside.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedpipe.memory.option import Option

# bytes and costs of ways to train the units from one on, the bytes ascending, the costs descending
Front = tuple[NDArray[np.int64], NDArray[np.float64]]

LIMIT = 2**62


def peak(options: Sequence[Option], boundary: Sequence[int]) -> int:
    """Most bytes at any moment of a forward and backward over options in order: the larger of `moments`."""
    return max(moments(options, boundary))


def moments(options: Sequence[Option], boundary: Sequence[int]) -> tuple[int, int]:
    """Most bytes at any moment of a forward over options in order, which cover the chain once, and of their backward.

    boundary[u]: bytes of the input of unit u (0 for the first where the images are held anyway). It is kept in front of
    an option whose `input` is, or after one whose `output` is. Raises ValueError for options that do not cover.
    """
    at = 0
    for o in options:
        if o.first != at:
            raise ValueError(f"options: units {o.first}..{o.last} came; wanted what begins with unit {at}")
        at = o.last + 1
    if at != len(_checked(boundary)):
        raise ValueError(f"options: they cover {at} units; wanted the {len(boundary)} of the boundaries")
    later, below, forward, backward, kept = sum(o.gradients for o in options), 0, 0, 0, False
    for given in options:
        o = given.behind(kept)
        later -= o.gradients
        forward = max(forward, below + o.forward)
        below += boundary[o.first] if kept or o.input else 0
        backward = max(backward, below + later + o.backward)
        below, kept = below + o.saved, o.output
    return forward, backward


def cheapest(options: Sequence[Option], boundary: Sequence[int], budget: int) -> list[Option] | None:
    """Of all options in a row that cover the chain with a peak within the budget, those of the least total cost.

    None when there are none. Of equal costs those of the smaller peak, then those that stand earlier in `options`,
    from the first unit on. Costs are added from the last unit to the first: ties are exact for whole numbers.

    options may come in any order; boundary as for `peak`; budget in bytes. Raises ValueError for a negative budget,
    for options that cannot cover the chain, and where a range's gradients are not the sum of its units'.
    """
    if not budget >= 0:
        raise ValueError(f"budget: {budget} came; wanted bytes >= 0")
    chain = _Chain(options, boundary)
    tails = chain.tails(min(budget, LIMIT))
    return chain.walk(tails) if (0, False) in tails else None


def smallest(options: Sequence[Option], boundary: Sequence[int]) -> int:
    """The least peak in bytes that any options in a row reach; arguments and errors as for `cheapest`."""
    # where nothing costs anything, the smallest is all that remains
    tails = _Chain([o.free for o in options], boundary).tails(LIMIT)
    return int(tails[0, False][0][0])


def _checked(boundary: Sequence[int]) -> Sequence[int]:
    if not boundary or min(boundary) < 0:
        raise ValueError(f"boundary: {list(boundary)} came; wanted the bytes >= 0 of each unit's input")
    return boundary


class _Chain:
    """Options by the unit they begin with, and `later`: the gradients' bytes of units from u on."""

    def __init__(self, options: Sequence[Option], boundary: Sequence[int]) -> None:
        self.boundary, self.units = _checked(boundary), len(boundary)
        self.options: list[list[Option]] = [[] for _ in boundary]
        for o in options:
            if o.last >= self.units:
                raise ValueError(f"options: units {o.first}..{o.last} came; wanted them below {self.units}")
            self.options[o.first].append(o)
        before = {0: 0}
        for o in (o for u in self.options for o in u if o.first in before):
            total = before[o.first] + o.gradients
            if before.setdefault(o.last + 1, total) != total:
                raise ValueError(
                    f"units {o.first}..{o.last}: gradients {o.gradients} came; other options of these units have "
                    f"{before[o.last + 1] - before[o.first]}"
                )
        if self.units not in before:
            raise ValueError(f"options: none in a row cover units 0..{self.units - 1}")
        self.later = {u: before[self.units] - b for u, b in before.items()}

    def _at(self, unit: int, kept: bool) -> list[Option]:
        return [o.behind(kept) for o in self.options[unit]]

    def _below(self, option: Option, kept: bool) -> int:
        return self.boundary[option.first] if kept or option.input else 0

    def _least(self) -> dict[tuple[int, bool], int]:
        """Fewest bytes saved before a unit, its own input aside, by whether that input is kept already."""
        least = {(0, False): 0}
        for u in range(self.units):
            for kept in (False, True):
                for o in self._at(u, kept) if (u, kept) in least else ():
                    key, total = (o.last + 1, o.output), least[u, kept] + self._below(o, kept) + o.saved
                    least[key] = min(least.get(key, total), total)
        return least

    def _joined(self, option: Option, kept: bool, tail: Front, limit: int) -> tuple[Front, slice]:
        """The option followed by ways of the tail: peaks above what is saved before it, up to the limit, and costs;
        and which of the tail's these are."""
        below = self._below(option, kept)
        own, above = max(option.forward, below + self.later[option.last + 1] + option.backward), below + option.saved
        # of ways that rise no higher than the option itself the last is the cheapest
        first = max(0, int(np.searchsorted(tail[0], own - above, "right")) - 1)
        part = slice(first, int(np.searchsorted(tail[0], limit - above, "right")) if own <= limit else first)
        return (np.maximum(tail[0][part] + above, own), tail[1][part] + option.cost), part

    def tails(self, budget: int) -> dict[tuple[int, bool], Front]:
        """Ways to train the units from u on that none betters in both peak and cost, by u and whether its input is
        kept already. Every moment is a sum on top of what is saved before, so a tail's peak is, too."""
        least = self._least()
        nothing = np.array([-LIMIT]), np.array([0.0])  # no moment of its own
        tails: dict[tuple[int, bool], Front] = {(self.units, False): nothing, (self.units, True): nothing}
        for u, kept in sorted(least, reverse=True):
            found = []
            for o in self._at(u, kept) if u < self.units else ():
                if (o.last + 1, o.output) in tails:
                    front, _ = self._joined(o, kept, tails[o.last + 1, o.output], budget - least[u, kept])
                    found.append(front)
            if sum(len(peaks) for peaks, _ in found):
                tails[u, kept] = _front(*(np.concatenate(part) for part in zip(*found, strict=True)))
        return tails

    def walk(self, tails: dict[tuple[int, bool], Front]) -> list[Option]:
        """The options behind the cheapest way over the whole chain."""
        chosen, u, kept = list[Option](), 0, False
        peak, cost = (numbers[-1] for numbers in tails[0, False])
        while u < self.units:
            for o in (o for o in self._at(u, kept) if (o.last + 1, o.output) in tails):
                tail = tails[o.last + 1, o.output]
                (peaks, costs), part = self._joined(o, kept, tail, peak)
                if len(peaks) and (peaks[-1], costs[-1]) == (peak, cost):
                    break
            chosen.append(o)
            u, kept, peak, cost = o.last + 1, o.output, tail[0][part][-1], tail[1][part][-1]
        return chosen


def _front(peaks: NDArray[np.int64], costs: NDArray[np.float64]) -> Front:
    """Those that none betters, the peaks ascending."""
    order = np.argsort(peaks, kind="stable")  # the parts are sorted already, which a stable sort is quick with
    peaks, costs = peaks[order], costs[order]
    lower = np.append(True, costs[1:] < np.minimum.accumulate(costs)[:-1])
    peaks, costs = peaks[lower], costs[lower]
    last = np.append(peaks[1:] > peaks[:-1], True)  # of equal peaks the last is the cheapest
    return peaks[last], costs[last]
