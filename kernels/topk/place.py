"""The mask, from the thresholds: candidates one by one, ties in the order of their indices."""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

from fedpipe.kernels.bits.kernel import ones
from fedpipe.kernels.topk.collect import AGAIN, pieces, region
from fedpipe.kernels.topk.split import clip

EACH = 16  # tiles of the split of a program that looks for ties


@triton.jit
def place_kernel(
    sure, undecided, bracket, rooms, totals, found, flags, keys, places, ties, count, slots, segments,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Set the bits of candidates above the threshold, and of its equals up to the last place. Equals that were too many
    to list are all that stays undecided, and are counted by tile."""
    group, s = tl.program_id(0), tl.program_id(0) % segments
    if (tl.load(bracket + group * 2) < tl.load(bracket + group * 2 + 1)) & ((tl.load(flags) & AGAIN) == 0):
        row = (group // segments).to(tl.int64)
        t, last, tied = tl.load(found + group * 3), tl.load(found + group * 3 + 1), tl.load(found + group * 3 + 2)
        begin, stop = region(rooms, row, s, segments)
        end = begin + tl.load(totals + group * 2 + 1)
        for at in range(begin + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
            place = at + tl.arange(0, BLOCK)
            v = tl.load(keys + place, mask=place < end, other=-1).to(tl.int64)
            p = tl.load(places + place, mask=place < end, other=0).to(tl.int64)
            bit = tl.full([BLOCK], 1, tl.int32) << (p % 32).to(tl.int32)
            word = row * count + p // 32
            tl.atomic_or(sure + word, bit, mask=(v > t) | ((v == t) & (p <= last)), sem="relaxed")
            if tied > 0:
                tl.atomic_xor(undecided + word, bit, mask=(place < end) & (v != t), sem="relaxed")
                tl.atomic_add(ties + row * slots + p // TILE + s, 1, mask=v == t, sem="relaxed")


@triton.jit
def tie_kernel(
    sure, undecided, found, starts, first, ties, count, tiles, slots, segments,
    W: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """Of the undecided of groups with ties, those of lowest index stay: as many as are wanted. EACH tiles at once."""
    TILE: tl.constexpr = W // EACH * 32
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * W + tl.arange(0, W)
    begin = tl.program_id(0).to(tl.int64) * (W * 32)
    stay = tl.zeros([W], tl.int32)
    s0, s1 = pieces(first, tiles, EACH, SEGMENTED)
    for s in range(s0, s1 + 1):
        wanted = tl.load(found + (row * segments + s) * 3 + 2)
        if wanted > 0:
            start, end = tl.load(starts + s), tl.load(starts + s + 1)
            slot = start // TILE  # those before, then those here
            mine = tl.maximum(tl.program_id(0).to(tl.int64) * EACH, slot)
            e = mine + tl.arange(0, EACH)
            inside = (e <= (end - 1) // TILE) & (e < (tl.program_id(0) + 1) * EACH)
            if tl.sum(tl.load(ties + row * slots + e + s, mask=inside, other=0), axis=0) > 0:
                while (slot < mine) & (wanted > 0):
                    at = slot + tl.arange(0, BLOCK)
                    before = tl.load(ties + row * slots + at + s, mask=at < mine, other=0)
                    wanted -= tl.sum(before.to(tl.int64), axis=0)
                    slot += BLOCK
                if wanted > 0:
                    w = tl.load(undecided + row * count + word, mask=word < count, other=0)
                    w = w & clip(start - begin, end - begin, W)
                    many = ones(w)
                    room = tl.minimum(tl.maximum(wanted - (tl.cumsum(many, axis=0) - many), 0), 32).to(tl.int32)
                    stay |= tl.where(many <= room, w, 0)
                    room = tl.where(many <= room, 0, room)
                    for i in range(tl.max(room, axis=0)):
                        stay |= tl.where(i < room, w & (-w), 0)
                        w = w & (w - 1)
    before = tl.load(sure + row * count + word, mask=(word < count) & (stay != 0), other=0)
    tl.store(sure + row * count + word, before | stay, mask=(word < count) & (stay != 0))
