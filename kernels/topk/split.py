"""Tiles of words cut at a bracket: what is above it, what is in it, and counts of both.

A tile may hold several segments; counts of (tile, segment) go to slot tile + segment, which no other pair has as both
only grow along the buffer.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

from fedpipe.kernels.bits.kernel import ones, tile

TILE = 128  # words of a tile: 4,096 entries
WARPS = 4
# Of a tile of several segments: compilers before 3.8 take 80 registers where 64 do; that of 3.9 spills under a limit.
LIMIT = {"maxnreg": 64} if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else {}


@triton.jit
def below(i):
    """The lowest i bits, 0 to 32 of them."""
    return tl.where(i < 32, (1 << (i & 31)) - 1, -1)


@triton.jit
def within(entry, W: tl.constexpr):
    """An entry's number in a tile of W words, as 32 bits; 0 before it and W * 32 behind."""
    return tl.minimum(tl.maximum(entry, 0), W * 32).to(tl.int32)


@triton.jit
def clip(start, end, W: tl.constexpr):
    """The bits of W words that stand for entries from start up to end, both counted from the first word's first."""
    entry = tl.arange(0, W) * 32
    a, b = within(start, W) - entry, within(end, W) - entry
    return below(tl.minimum(tl.maximum(b, 0), 32)) & ~below(tl.minimum(tl.maximum(a, 0), 32))


@triton.jit
def number(key, like):
    """The magnitude that a key stands for, in float32, which holds those of 16 bits too."""
    if like.dtype.primitive_bitwidth == 16:
        return key.to(tl.int16).to(like.dtype, bitcast=True).to(tl.float32)
    return key.to(tl.float32, bitcast=True)


@triton.jit
def piece(
    x, local, inside_n, bracket, starts, counts, ties, n, begin, row, s, slots, segments,
    W: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Words of a tile's entries of one segment above its bracket and in it, and the number of these."""
    raw = tl.load(x + local, mask=local < inside_n, other=0.0)  # on its way while the segment is looked up
    low, high = tl.load(bracket + (row * segments + s) * 2), tl.load(bracket + (row * segments + s) * 2 + 1)
    start, end = 0, within(n - begin, W)
    if SEGMENTED:
        start, end = within(tl.load(starts + s) - begin, W), within(tl.load(starts + s + 1) - begin, W)
    v = tl.abs(raw.to(tl.float32))
    one = (tl.full([32], 1, tl.int32) << tl.arange(0, 32))[None, :]
    above = tl.sum(tl.where(v > number(high, raw), one, 0), axis=1)
    reached = tl.sum(tl.where(v < number(low, raw), 0, one), axis=1)
    if (start > 0) | (end < W * 32):
        inside = clip(start, end, W)
        above &= inside
        reached &= inside
    reached &= ~above
    both = tl.sum(ones(above) + (ones(reached) << 16), axis=0)
    two = both.to(tl.int64)
    if low == high:  # read again, as registers are scarce
        again = tl.load(x + local, mask=local < inside_n, other=0.0)
        two |= (tl.max(tl.max((again != again).to(tl.int32), axis=1), axis=0)).to(tl.int64) << 32
    slot = row * slots + tl.program_id(0) + s
    tl.store(counts + slot, two)
    tl.store(ties + slot, tl.where(low == high, both >> 16, 0))
    return above, reached, both >> 16


@triton.jit
def split_kernel(
    x, bracket, starts, first, sure, undecided, counts, ties, filled, values, offsets, n, count, slots, segments,
    W: tl.constexpr, CAP: tl.constexpr, SEGMENTED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The one read of the buffer: masks of what is above the bracket and of what is in it, and counts.

    Instructions, not bytes, are scarce here: magnitudes are compared as floats, and entries are counted and cut at
    segments' ends as bits of words. A NaN is left undecided, and found when that is looked at; where a bracket is one
    value, and nothing will be, it is looked for here. Counts of a slot share an integer: sure, undecided from bit 16
    on, a NaN at bit 32; ties are the undecided of a bracket of one value. The undecided are written side by side while
    the tile is in the cache: values and offsets in the tile [tiles, CAP], filled [tiles] their number; if that is above
    CAP, none are.
    """
    row = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0).to(tl.int64) * (W * 32)
    x += row * n + begin
    inside_n = n - begin if WIDE else n - tl.program_id(0) * (W * 32)
    local = tl.arange(0, W)[:, None] * 32 + tl.arange(0, 32)[None, :]
    s0, s1 = 0, 0
    if SEGMENTED:
        s0, s1 = tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)
    word = tl.program_id(0) * W + tl.arange(0, W)
    at_sure, at_left = sure + row * count + word, undecided + row * count + word
    total = 0
    for s in range(s0, s1 + 1):
        above, reached, many = piece(
            x, local, inside_n, bracket, starts, counts, ties, n, begin, row, s, slots, segments, W, SEGMENTED
        )
        if s > s0:
            above |= tl.load(at_sure, mask=word < count, other=0)
            reached |= tl.load(at_left, mask=word < count, other=0)
        tl.store(at_sure, above, mask=word < count)
        tl.store(at_left, reached, mask=word < count)
        total += many
    tl.debug_barrier()
    w = tl.load(at_left, mask=word < count, other=0)  # now each in a thread of its own
    many = ones(w)
    tile = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(filled + tile, total)
    if total <= CAP:
        here = tile * CAP + (tl.cumsum(many, axis=0) - many)
        at = tl.arange(0, W) * 32
        for _ in range(tl.max(many, axis=0)):
            lowest = at + ones((w & (-w)) - 1)
            tl.store(values + here, tl.load(x + lowest, mask=w != 0, other=0.0), mask=w != 0)
            tl.store(offsets + here, lowest.to(tl.int16), mask=w != 0)
            w &= w - 1
            here += 1


@triton.jit
def zero_kernel(x, packed, n, count, W: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    word, bit, at = tile(W, WIDE)
    w = tl.load(packed + row * count + word, mask=word < count, other=0)
    v = tl.load(x + row * n + at, mask=at < n, other=0)
    tl.store(x + row * n + at, tl.where(((w[:, None] >> bit[None, :]) & 1) != 0, v, 0), mask=at < n)
