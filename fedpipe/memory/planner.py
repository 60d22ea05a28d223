"""What of a network fits a budget: blocks of a chain of units, and what has to run again for the whole to fit
(`recomputation`). Pure functions.

`fits` may trace a training step each time: it is asked until the answer is known and never twice the same.
"""

from collections.abc import Callable, Sequence

from fedpipe.memory.recomputation import Option, cheapest, peak, smallest

__all__ = ["Option", "cheapest", "fewest", "greedy", "peak", "smallest"]


def greedy(costs: Sequence[float], budget: float) -> tuple[list[tuple[int, ...]], list[int]]:
    """FeDepth's blocks (arXiv 2303.04887) as tuples of indices of `costs` in order, and the indices that fit in none.

    In depth order: a unit of a cost above the budget is left out; another joins the block before it while the block's
    sum stays within the budget, across units left out, too, and begins a block otherwise. No fewer blocks would do.
    Costs and budget are in one unit; the published blocks of a client of share r are those of `proxy.values` of stem
    and head left out and budget r times the sum of ALL values, stem and head included. Raises ValueError for no costs
    and for negative numbers.
    """
    if not costs:
        raise ValueError("costs: none came; wanted one of each unit")
    if wrong := [c for c in costs if not c >= 0]:
        raise ValueError(f"costs: {wrong[0]} came; wanted numbers >= 0")
    if not budget >= 0:
        raise ValueError(f"budget: {budget} came; wanted a number >= 0")
    blocks: list[tuple[int, ...]] = []
    unfit: list[int] = []
    total: float = 0
    for k, cost in enumerate(costs):
        if cost > budget:
            unfit.append(k)
        elif blocks and total + cost <= budget:
            blocks[-1] += (k,)
            total += cost
        else:
            blocks.append((k,))
            total = cost
    return blocks, unfit


def fewest(fits: Callable[[int, int], bool], count: int) -> list[tuple[int, int]] | None:
    """The fewest ranges (first, last), both inclusive, that cover units 0 .. count - 1 in order and all fit.

    None when no ranges do. Of equally few the first range is as long as possible, then the second, and so on. Exact for
    any `fits`: a part of a range that fits need not fit. No range is asked about twice, and a single one that fits ends
    it at once. Raises ValueError for a count below 1.
    """
    if count < 1:
        raise ValueError(f"count: {count} came; wanted 1 at least")
    # breadth first from the end: a unit is reached in the round of the fewest ranges from it on
    ends: dict[int, int] = {}
    reached, waiting = [count], list(range(count))
    while reached and 0 in waiting:
        found = []
        for first in waiting:
            end = next((e for e in reached if e > first and fits(first, e - 1)), None)
            if end is not None:
                ends[first] = end
                found.append(first)
            if 0 in ends:
                break
        waiting = [u for u in waiting if u not in ends]
        reached = found[::-1]  # longest first
    if 0 not in ends:
        return None
    ranges, first = list[tuple[int, int]](), 0
    while first < count:
        ranges.append((first, ends[first] - 1))
        first = ends[first]
    return ranges
