"""The threshold of a group, from its candidates: those of one bin are listed and searched."""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

from fedpipe.kernels.topk.bins import keys_of, scale
from fedpipe.kernels.topk.collect import AGAIN, region

BLOCK = 1024  # candidates of a program at a time


@triton.jit
def stands(totals, k, group, s):
    """Of a group: how many of the undecided are wanted, how many there are, and whether the bracket holds the k-th
    largest: counts prove it."""
    sure, left = tl.load(totals + group * 2), tl.load(totals + group * 2 + 1)
    wanted = tl.load(k + s) - sure
    return wanted, left, ((wanted > 0) & (wanted <= left)) | ((wanted == 0) & (sure == 0))


@triton.jit
def pick_kernel(
    bracket, k, rooms, totals, bins, flags, plan, listed, keys, places, list_keys, list_places, segments,
    INF: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Candidates of the bin that holds the threshold, side by side. plan [groups, 3]: that bin's interval, and how many
    of its keys are wanted. After this all flags are known."""
    BINS: tl.constexpr = 1 << LOG
    group, s = tl.program_id(0), tl.program_id(0) % segments
    wanted, left, held = stands(totals, k, group, s)
    low, high = tl.load(bracket + group * 2), tl.load(bracket + group * 2 + 1)
    begin, stop = region(rooms, (group // segments).to(tl.int64), s, segments)
    if (tl.program_id(1) == 0) & ~(held & ((low == high) | (left <= stop - begin))):
        tl.atomic_or(flags, AGAIN, sem="relaxed")
    if held & (low < high):
        i = tl.arange(0, BINS)
        here = tl.load(bins + group * BINS + (BINS - 1 - i))  # highest first
        upto = tl.cumsum(here, axis=0).to(tl.int64)
        chosen = BINS - 1 - tl.sum((upto < wanted).to(tl.int32), axis=0)
        above = tl.max(tl.where(upto < wanted, upto, 0), axis=0)
        edge, fine, coarse = scale(low, high, INF, LOG)
        first, last = keys_of(chosen, low, high, edge, fine, coarse, LOG)
        if tl.program_id(1) == 0:
            tl.store(plan + group * 3, first.to(tl.int64))
            tl.store(plan + group * 3 + 1, last.to(tl.int64))
            tl.store(plan + group * 3 + 2, wanted - above)
        if left <= stop - begin:
            end = begin + left
            for at in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
                place = at + tl.arange(0, BLOCK)
                v = tl.load(keys + place, mask=place < end, other=-1).to(tl.int32)
                mine = (v >= first) & (v <= last)
                many = tl.sum(mine.to(tl.int32), axis=0)
                if many > 0:
                    to = tl.atomic_add(listed + group, many.to(tl.int64), sem="relaxed") - 1
                    to += tl.cumsum(mine.to(tl.int32), axis=0)
                    mine = mine & (to < BINS)
                    tl.store(list_keys + group * BINS + to, v, mask=mine)
                    p = tl.load(places + place, mask=mine, other=0)
                    tl.store(list_places + group * BINS + to, p.to(tl.int64), mask=mine)


@triton.jit
def searched(v, p, low, high, wanted):
    """The wanted-th largest key t of v, all in [low, high], and of the places p of its equals the last wanted."""
    while low < high:
        middle = low + (high - low + 1) // 2
        reached = tl.sum((v >= middle).to(tl.int32), axis=0) >= wanted
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    wanted -= tl.sum((v > low).to(tl.int32), axis=0)
    equal = v == low
    begin = tl.min(tl.where(equal, p, 0x7FFFFFFFFFFFFFFF), axis=0)
    end = tl.max(tl.where(equal, p, -1), axis=0)
    if wanted <= 16:  # as a rule: they are looked up one by one
        for _ in range(1, wanted):
            begin = tl.min(tl.where(equal & (p > begin), p, 0x7FFFFFFFFFFFFFFF), axis=0)
        end = begin
    while begin < end:
        middle = begin + (end - begin) // 2
        reached = tl.sum((equal & (p <= middle)).to(tl.int32), axis=0) >= wanted
        end = tl.where(reached, middle, end)
        begin = tl.where(reached, begin, middle + 1)
    return low, begin


@triton.jit
def reread(keys, begin, end, first, last, wanted, BLOCK: tl.constexpr):
    """The wanted-th largest of the keys in [first, last], of which there are too many to list, and how many of its
    equals are wanted: each step of the search reads all candidates, but most often one key is all there is."""
    least, most = last, first
    if first < last:
        for at in range(begin, end, BLOCK):
            i = at + tl.arange(0, BLOCK)
            v = tl.load(keys + i, mask=i < end, other=-1).to(tl.int32)
            least = tl.minimum(least, tl.min(tl.where(v >= first, v, last), axis=0))
            most = tl.maximum(most, tl.max(tl.where(v <= last, v, first), axis=0))
    above = wanted * 0
    while least < most:
        middle = least + (most - least + 1) // 2
        reached = wanted * 0
        for at in range(begin, end, BLOCK):
            i = at + tl.arange(0, BLOCK)
            v = tl.load(keys + i, mask=i < end, other=-1).to(tl.int32)
            reached += tl.sum(((v >= middle) & (v <= last)).to(tl.int32), axis=0)
        least = tl.where(reached >= wanted, middle, least)
        most = tl.where(reached >= wanted, most, middle - 1)
        above = tl.where(reached >= wanted, above, reached)
    return least, wanted - above


@triton.jit
def decide_kernel(
    bracket, k, rooms, totals, plan, listed, keys, list_keys, list_places, found, following, threshold, segments,
    INF: tl.constexpr, LOG: tl.constexpr,
):  # fmt: skip
    """found [groups, 3]: the threshold, the last place at which its equals stay, and how many of its equals are wanted
    where they were not listed. following [groups, 2]: the bracket to go on with, nearer or proved, where this one did
    not do."""
    BINS: tl.constexpr = 1 << LOG
    group, s = tl.program_id(0), tl.program_id(0) % segments
    wanted, left, held = stands(totals, k, group, s)
    low, high = tl.load(bracket + group * 2), tl.load(bracket + group * 2 + 1)
    begin, stop = region(rooms, (group // segments).to(tl.int64), s, segments)
    last, tied = begin * 0 - 1, begin * 0
    if not held:
        above = wanted <= 0
        low, high = tl.where(above, high + 1, 0), tl.where(above, INF, low - 1)
    elif low < high:
        first, end = tl.load(plan + group * 3).to(tl.int32), tl.load(plan + group * 3 + 1).to(tl.int32)
        inside, many = tl.load(plan + group * 3 + 2), tl.load(listed + group)
        if left > stop - begin:
            low, high = first, end
        elif many > BINS:
            low, tied = reread(keys, begin, begin + left, first, end, inside, BINS)
            high = low
        else:
            i = tl.arange(0, BINS)
            v = tl.load(list_keys + group * BINS + i, mask=i < many, other=-1)
            p = tl.load(list_places + group * BINS + i, mask=i < many, other=0)
            low, last = searched(v, p, first, end, inside)
            high = low
    else:
        tied = wanted
    tl.store(found + group * 3, low.to(tl.int64))
    tl.store(found + group * 3 + 1, last)
    tl.store(found + group * 3 + 2, tied)
    tl.store(following + group * 2, low)
    tl.store(following + group * 2 + 1, high)
    tl.store(threshold + group, tl.where(wanted == 0, INF, low).to(threshold.dtype.element_ty))
