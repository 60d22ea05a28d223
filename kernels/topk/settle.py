"""The undecided entries: their keys side by side, then which of them stay.

Tiles hold EACH tiles of the split, as few entries are left in them; a word's bits are taken one by one, lowest first.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

from fedpipe.kernels.bits.kernel import ones
from fedpipe.kernels.topk.order import key
from fedpipe.kernels.topk.split import clip, lowest

EACH = 8  # tiles of the split in one of these


@triton.jit
def pieces(first, tiles, EACH: tl.constexpr, SEGMENTED: tl.constexpr):
    """First and last segment of this tile."""
    s0 = 0
    s1 = 0
    if SEGMENTED:
        s0 = tl.load(first + tl.program_id(0) * EACH)
        s1 = tl.load(first + tl.minimum((tl.program_id(0) + 1) * EACH, tiles))
    return s0, s1


@triton.jit
def places(w, counts, starts, row, s, slots, EACH: tl.constexpr, TILE: tl.constexpr):
    """Where each word's candidates begin among all of them."""
    total = tl.num_programs(1).to(tl.int64) * slots
    slot = tl.maximum(tl.program_id(0) * EACH, tl.load(starts + s) // TILE) + s
    many = ones(w)
    before = tl.load(counts + 2 * total + row * slots + slot) - tl.load(counts + 2 * total)
    return before + (tl.cumsum(many, axis=0) - many), tl.max(many, axis=0)


@triton.jit
def compact_kernel(
    x, undecided, bracket, starts, first, counts, candidates, n, count, tiles, slots, segments, capacity,
    MASK: tl.constexpr, W: tl.constexpr, EACH: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Keys of the undecided, in the order of their indices; segments whose bracket is one value need none."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * W + tl.arange(0, W)
    words = tl.load(undecided + row * count + word, mask=word < count, other=0)
    s0, s1 = pieces(first, tiles, EACH, SEGMENTED)
    for s in range(s0, s1 + 1):
        group = row * segments + s
        if tl.load(bracket + group * 2) < tl.load(bracket + group * 2 + 1):
            w = words & clip(word, tl.load(starts + s), tl.load(starts + s + 1))
            place, most = places(w, counts, starts, row, s, slots, EACH, W // EACH * 32)
            for _ in range(most):
                live = w != 0
                at = row * n + word.to(tl.int64) * 32 + lowest(w & (-w))
                v = key(tl.load(x + at, mask=live, other=0), MASK)
                tl.store(candidates + place, v.to(candidates.dtype.element_ty), mask=live & (place < capacity))
                w = w & (w - 1)
                place += 1


@triton.jit
def settle_kernel(
    sure, undecided, bracket, found, starts, first, counts, candidates, ties,
    count, tiles, slots, tie_slots, segments, capacity, W: tl.constexpr, EACH: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Candidates above the threshold are sure; those equal to it stay undecided, and are counted."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * W + tl.arange(0, W)
    words = tl.load(undecided + row * count + word, mask=word < count, other=0)
    grew = tl.zeros([W], tl.int32)
    tied = tl.zeros([W], tl.int32)
    s0, s1 = pieces(first, tiles, EACH, SEGMENTED)
    for s in range(s0, s1 + 1):
        group = row * segments + s
        t = tl.load(found + group * 2).to(tl.int32)
        mine = words & clip(word, tl.load(starts + s), tl.load(starts + s + 1))
        equal = mine
        if tl.load(bracket + group * 2) < tl.load(bracket + group * 2 + 1):
            place, most = places(mine, counts, starts, row, s, slots, EACH, W // EACH * 32)
            w = mine
            equal = tl.zeros([W], tl.int32)
            for _ in range(most):
                v = tl.load(candidates + place, mask=(w != 0) & (place < capacity), other=0).to(tl.int32)
                bit = w & (-w)
                grew |= tl.where(v > t, bit, 0)
                equal |= tl.where(v == t, bit, 0)
                w = w & (w - 1)
                place += 1
        tied |= equal
        slot = row * tie_slots + tl.program_id(0) + s
        tl.store(ties + 1 + slot, tl.sum(ones(equal), axis=0).to(tl.int64))
    before = tl.load(sure + row * count + word, mask=(word < count) & (grew != 0), other=0)
    tl.store(sure + row * count + word, before | grew, mask=(word < count) & (grew != 0))
    tl.store(undecided + row * count + word, tied, mask=(word < count) & (tied != words))


@triton.jit
def tie_kernel(
    sure, undecided, found, starts, first, ties, count, tiles, tie_slots, segments,
    W: tl.constexpr, EACH: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Of the entries equal to the threshold, those of lowest index stay: as many as were found to be wanted."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * W + tl.arange(0, W)
    stay = tl.zeros([W], tl.int32)
    s0, s1 = pieces(first, tiles, EACH, SEGMENTED)
    for s in range(s0, s1 + 1):
        begin = row * tie_slots + tl.load(starts + s) // (W * 32) + s
        slot = row * tie_slots + tl.program_id(0) + s
        here = tl.load(ties + slot)
        wanted = tl.load(found + (row * segments + s) * 2 + 1) - (here - tl.load(ties + begin))
        if (wanted > 0) & (tl.load(ties + slot + 1) > here):
            w = tl.load(undecided + row * count + word, mask=word < count, other=0)
            w = w & clip(word, tl.load(starts + s), tl.load(starts + s + 1))
            many = ones(w)
            room = tl.minimum(tl.maximum(wanted - (tl.cumsum(many, axis=0) - many), 0), 32).to(tl.int32)
            stay |= tl.where(many <= room, w, 0)
            room = tl.where(many <= room, 0, room)
            for i in range(tl.max(room, axis=0)):
                stay |= tl.where(i < room, w & (-w), 0)
                w = w & (w - 1)
    before = tl.load(sure + row * count + word, mask=(word < count) & (stay != 0), other=0)
    tl.store(sure + row * count + word, before | stay, mask=(word < count) & (stay != 0))
