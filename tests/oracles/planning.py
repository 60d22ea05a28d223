"""Plans by trying all of them: every way to cut a chain into ranges, every covering of a chain by options.

Bytes of a covering are those of a stack: what a forward keeps is put on it, what a backward is done with is taken off.
"""

from collections.abc import Callable, Sequence

from fedpipe.memory.recomputation import Option


def cuts(count: int) -> list[list[tuple[int, int]]]:
    """All 2^(count - 1) lists of ranges (first, last) that cover 0 .. count - 1 in order."""
    if count == 0:
        return [[]]
    return [[*before, (first, count - 1)] for first in range(count) for before in cuts(first)]


def fewest(fits: Callable[[int, int], bool], count: int) -> list[tuple[int, int]] | None:
    """The fewest ranges that all fit; of these the one whose first range is longest, then its second, ..."""
    good = [cut for cut in cuts(count) if all(fits(*r) for r in cut)]
    return min(good, key=lambda cut: (len(cut), [-last for _, last in cut]), default=None)


def coverings(options: Sequence[Option], count: int, first: int = 0) -> list[list[Option]]:
    """All rows of options that cover units first .. count - 1 once."""
    if first == count:
        return [[]]
    starting = [o for o in options if o.first == first and o.last < count]
    return [[o, *rest] for o in starting for rest in coverings(options, count, o.last + 1)]


def peak(options: Sequence[Option], boundary: Sequence[int]) -> int:
    moments, held, stack, kept = [], 0, [], False
    for o in options:
        moments.append(held + o.forward)
        entry = boundary[o.first] if kept or o.input else 0
        stack.append((o, entry))
        held += entry + o.saved
        kept = o.output
    while stack:
        o, entry = stack.pop()
        held -= o.saved
        moments.append(held + o.backward)
        held += o.gradients - entry
    return max(moments)


def cheapest(options: Sequence[Option], boundary: Sequence[int], budget: int) -> tuple[float, int] | None:
    """Least cost within the budget, and the least peak at that cost."""
    found = [(sum(o.cost for o in row), peak(row, boundary)) for row in coverings(options, len(boundary))]
    return min((f for f in found if f[1] <= budget), default=None)


def smallest(options: Sequence[Option], boundary: Sequence[int]) -> int:
    return min(peak(row, boundary) for row in coverings(options, len(boundary)))
