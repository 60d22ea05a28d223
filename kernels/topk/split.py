"""Tiles of words cut at a bracket: what is surely kept, what is undecided, and settling the undecided.

A tile may hold several segments; counts of (tile, segment) go to slot tile + segment, which no other pair has as both
only grow along the buffer. Counts lie from index 1 on, so that their running sum is that of the slots before.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

from fedpipe.kernels.bits.kernel import ones, tile
from fedpipe.kernels.topk.order import key

TILE = 128  # words of a tile: 4,096 entries


@triton.jit
def lowest(bit):
    """Number of the one bit that is set, from the exponent of it as a float."""
    return ((bit.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def clip(word, start, end):
    """The bits of each word that stand for entries from start up to end."""
    entry = word.to(tl.int64) * 32
    a = tl.minimum(tl.maximum(start - entry, 0), 32)
    b = tl.minimum(tl.maximum(end - entry, 0), 32)
    one = a * 0 + 1
    return ((one << b) - (one << a)).to(tl.int32)


@triton.jit
def noted(slot, total, two, open_, nan):
    """Counts of a slot: sure, undecided, undecided if the bracket is no single value, and whether there is a NaN."""
    tl.store(slot, (two & 0xFFFF).to(tl.int64))
    tl.store(slot + total, (two >> 16).to(tl.int64))
    tl.store(slot + 2 * total, tl.where(open_, two >> 16, 0).to(tl.int64))
    tl.store(slot + 3 * total, nan.to(tl.int64))


@triton.jit
def split_kernel(
    x, bracket, starts, first, sure, undecided, counts, n, count, slots, segments,
    MASK: tl.constexpr, INF: tl.constexpr, W: tl.constexpr, SEGMENTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The one read of the buffer: masks of what is above the bracket and of what is in it, and counts.

    Instructions, not bytes, are scarce here: entries are counted and cut at segments' ends as bits of words, and loaded
    again for each segment of a tile rather than held.
    """
    row = tl.program_id(1).to(tl.int64)
    total = tl.num_programs(1).to(tl.int64) * slots
    begin = tl.program_id(0).to(tl.int64) * (W * 32)
    x += row * n + begin
    inside_n = n - begin if WIDE else n - tl.program_id(0) * (W * 32)
    bit = tl.arange(0, 32)
    local = tl.arange(0, W)[:, None] * 32 + bit[None, :]
    s0, s1 = 0, 0
    if SEGMENTED:
        s0, s1 = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    kept, left = tl.zeros([W], tl.int32), tl.zeros([W], tl.int32)
    for s in range(s0, s1 + 1):
        low, high = tl.load(bracket + (row * segments + s) * 2), tl.load(bracket + (row * segments + s) * 2 + 1)
        v = key(tl.load(x + local, mask=local < inside_n, other=0), MASK)
        one = (tl.full([32], 1, tl.int32) << bit)[None, :]
        above = tl.sum(tl.where(v > high, one, 0), axis=1)
        band = tl.sum(tl.where(v >= low, one, 0), axis=1) & ~above
        nan = tl.max(v, axis=None) > INF
        start, end = tl.load(starts + s), tl.load(starts + s + 1)
        if (start > begin) | (end < begin + W * 32):
            inside = clip(tl.arange(0, W), start - begin, end - begin)
            above &= inside
            band &= inside
        kept |= above
        left |= band
        two = tl.sum(ones(above) + (ones(band) << 16), axis=0)  # each is at most 32 W, far below 2^16
        noted(counts + 1 + row * slots + tl.program_id(0) + s, total, two, low < high, nan)
    word = tl.program_id(0) * W + tl.arange(0, W)
    tl.store(sure + row * count + word, kept, mask=word < count)
    tl.store(undecided + row * count + word, left, mask=word < count)


@triton.jit
def plan_kernel(
    counts, starts, k, plan, slots, segments, capacity,
    HEAVY: tl.constexpr, MISSED: tl.constexpr, NAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """What the running sums of counts say of a segment: the place of its candidates, how many of them are wanted, and
    whether the bracket held and all candidates have room."""
    s, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    total = tl.num_programs(1).to(tl.int64) * slots
    begin = counts + row * slots + s + tl.load(starts + s) // TILE
    end = counts + row * slots + s + (tl.load(starts + s + 1) - 1) // TILE + 1
    sure = tl.load(end) - tl.load(begin)
    undecided = tl.load(end + total) - tl.load(begin + total)
    first = tl.load(counts + 2 * total)
    place, stop = tl.load(begin + 2 * total) - first, tl.load(end + 2 * total) - first
    nan = tl.load(end + 3 * total) - tl.load(begin + 3 * total)
    wanted = tl.load(k + s) - sure
    held = ((wanted > 0) & (wanted <= undecided)) | ((wanted == 0) & (sure == 0))
    status = tl.where(held, tl.where(stop > capacity, HEAVY, 0), MISSED)
    plan += (row * segments + s) * 4
    tl.store(plan, tl.minimum(place, capacity))
    tl.store(plan + 1, tl.minimum(stop, capacity))
    tl.store(plan + 2, wanted)
    tl.store(plan + 3, tl.where(nan > 0, NAN, status).to(tl.int64))


@triton.jit
def zero_kernel(x, packed, n, count, W: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    word, bit, at = tile(W, WIDE)
    w = tl.load(packed + row * count + word, mask=word < count, other=0)
    v = tl.load(x + row * n + at, mask=at < n, other=0)
    tl.store(x + row * n + at, tl.where(((w[:, None] >> bit[None, :]) & 1) != 0, v, 0), mask=at < n)
