"""The undecided entries, from the tiles they were left in to their groups.

A group is a segment of a row. Its candidates (key and index in the row) lie in a region of its own, in no order: all
that is asked of them is a count, and what is written is set bit by bit.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

from fedpipe.kernels.topk.bins import binned, scale
from fedpipe.kernels.topk.order import key

LANES = 512  # slots of a program that collects
FEW = 16  # keys of a bracket that are counted one by one
AGAIN, NAN = tl.constexpr(1), tl.constexpr(2)  # flags: a bracket cannot settle its group; there is a NaN


@triton.jit
def pieces(first, tiles, EACH: tl.constexpr, SEGMENTED: tl.constexpr):
    """First and last segment of this tile."""
    s0, s1 = 0, 0
    if SEGMENTED:
        s0 = tl.load(first + tl.program_id(0) * EACH)
        s1 = tl.load(first + tl.minimum((tl.program_id(0) + 1) * EACH, tiles))
    return s0, s1


@triton.jit
def region(rooms, row, s, segments):
    """Where a group's candidates begin and end."""
    before = row * tl.load(rooms + segments)
    return before + tl.load(rooms + s), before + tl.load(rooms + s + 1)


@triton.jit
def collect_kernel(
    x, undecided, bracket, starts, first, rooms, counts, filled, values, offsets, totals, bins, flags, keys, places,
    n, count, tiles, slots, segments,
    MASK: tl.constexpr, INF: tl.constexpr, W: tl.constexpr, EACH: tl.constexpr, CAP: tl.constexpr, LOG: tl.constexpr,
    FEW: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Candidates of EACH tiles of the split, to their groups' regions and bins. totals [groups, 2]: sure, undecided.
    A bracket of one value has no candidates."""
    B: tl.constexpr = EACH * CAP
    row = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * EACH
    e, i = tl.arange(0, EACH), tl.arange(0, B)
    t = tile + i // CAP
    slot = (row * tiles + t) * CAP + i % CAP
    # all of it is asked for at once: what lies in a slot that is not filled is not looked at
    have = tl.load(filled + row * tiles + t, mask=t < tiles, other=0)
    value = key(tl.load(values + slot, mask=t < tiles, other=0), MASK)
    offset = i // CAP * (W * 32) + tl.load(offsets + slot, mask=t < tiles, other=0)
    again = tl.max(have, axis=0) > CAP
    s0, s1 = pieces(first, tiles, EACH, SEGMENTED)
    for s in range(s0, s1 + 1):
        group = row * segments + s
        start, end = tl.load(starts + s), tl.load(starts + s + 1)
        low, high = tl.load(bracket + group * 2), tl.load(bracket + group * 2 + 1)
        from_, stop = region(rooms, row, s, segments)
        mine = (tile + e >= start // (W * 32)) & (tile + e <= (end - 1) // (W * 32))
        two = tl.load(counts + row * slots + tile + e + s, mask=mine, other=0)
        left = tl.sum((two >> 16) & 0xFFFF, axis=0)
        to = from_ + tl.atomic_add(totals + group * 2 + 1, left, sem="relaxed")
        tl.atomic_add(totals + group * 2, tl.sum(two & 0xFFFF, axis=0), sem="relaxed")
        nan = (tl.max(two, axis=0) >> 32) > 0
        edge, fine, coarse = scale(low, high, INF, LOG)
        # the slots; then, of tiles with too many for them, the entries again
        for c in range(0, tl.where((left > 0) & (low < high), tl.where(again, 1 + EACH * W * 32 // B, 1), 0)):
            origin = tile.to(tl.int64) * (W * 32)
            live = (have <= CAP) & (i % CAP < have)
            v, at = value, offset
            if c > 0:
                at = (c - 1) * B + i
                inside = origin + at < n
                many = tl.load(filled + row * tiles + tile + at // (W * 32), mask=inside, other=0)
                live = many > CAP
            if (c == 0) | (tl.max(live.to(tl.int32), axis=0) > 0):
                if c > 0:
                    w = tl.load(undecided + row * count + origin // 32 + at // 32, mask=live, other=0)
                    live = ((w >> (at % 32)) & 1) != 0
                    v = key(tl.load(x + row * n + origin + at, mask=live, other=0), MASK)
                if SEGMENTED:
                    live = live & (at >= start - origin) & (at < end - origin)
                nan = nan | (tl.max(tl.where(live, v, 0), axis=0) > INF)
                upto = tl.cumsum(live.to(tl.int32), axis=0)
                here = to + upto - 1
                tl.store(keys + here, tl.minimum(v, high).to(keys.dtype.element_ty), mask=live & (here < stop))
                tl.store(places + here, (origin + at).to(places.dtype.element_ty), mask=live & (here < stop))
                to += tl.max(upto, axis=0)
                binned(v, live, bins + (group << LOG), low, high, edge, fine, coarse, LOG, FEW)
        if nan:
            tl.atomic_or(flags, NAN, sem="relaxed")
