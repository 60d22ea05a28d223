"""Order statistics of magnitudes, without sorting: of a sample in registers, of any number of keys by counting passes.

A key is the bits of a float without its sign, an integer in the order of |x|.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

DIGIT = 16  # pivots of a counting pass: each leaves a sixteenth of the interval
BLOCK = 512


@triton.jit
def key(value, MASK: tl.constexpr):
    return value.to(tl.int32) & MASK


@triton.jit
def scattered(i):
    """A counter's hash (the finaliser of MurmurHash3): where in its stratum a sample lies, the same in every run."""
    h = i.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def sample_kernel(
    x, starts, ranks, out, n, segments, MASK: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, LOG: tl.constexpr
):  # fmt: skip
    """Two order statistics of M entries of a segment, one from each of M strata; of all, where there are at most M.

    A rank of 0 gives MASK, above every number; one beyond M gives 0.
    """
    group = tl.program_id(0)
    row = (group // segments).to(tl.int64)
    start = tl.load(starts + group % segments)
    size = tl.load(starts + group % segments + 1) - start
    i = tl.arange(0, M)
    stratum = tl.maximum(size >> LOG, 1)
    inside = scattered(i * tl.num_programs(1) + tl.program_id(1)) % stratum.to(tl.uint32)
    at = tl.where(size <= M, i.to(tl.int64), ((i * size) >> LOG) + inside.to(tl.int64))
    v = key(tl.load(x + row * n + start + at, mask=at < size, other=0), MASK)
    v = tl.where(at < size, v, -1)
    ranks += group % segments * 2
    low_rank, high_rank = tl.load(ranks), tl.load(ranks + 1)
    low = low_rank * 0
    high = high_rank * 0
    for b in range(BITS):
        bit = 1 << (BITS - 1 - b)
        low = tl.where(tl.sum((v >= (low | bit)).to(tl.int32), axis=0) >= low_rank, low | bit, low)
        high = tl.where(tl.sum((v >= (high | bit)).to(tl.int32), axis=0) >= high_rank, high | bit, high)
    out += (group * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(out, low)
    tl.store(out + 1, high)


@triton.jit
def refined(before, partial, wanted, DIGIT: tl.constexpr, B: tl.constexpr):
    """The interval that is left after a pass, by the counts of its programs, and the keys above it."""
    low, high, above = tl.load(before), tl.load(before + 1), tl.load(before + 2)
    if low < high:
        j = tl.arange(0, DIGIT)
        step = (high - low) // DIGIT + 1
        counts = tl.load(partial + tl.arange(0, B)[:, None] * DIGIT + j[None, :])
        inside = low + j * step <= high
        reached = tl.where(inside, tl.sum(counts.to(tl.int64), axis=0), 0)
        digit = tl.max(tl.where(inside & (reached >= wanted), j, 0), axis=0)
        beyond = tl.sum(tl.where(j == digit + 1, reached, 0), axis=0)
        above = tl.where((digit + 1 < DIGIT) & (low + (digit + 1) * step <= high), beyond, above)
        low = low + digit * step
        high = tl.minimum(high, low + step - 1)
    return low, high, above


@triton.jit(do_not_specialize=["number"])
def narrow_kernel(
    keys, plan, bracket, state, partial, found, threshold, number, groups,
    MASK: tl.constexpr, INF: tl.constexpr, DIGIT: tl.constexpr, BLOCK: tl.constexpr, B: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    """One pass: take the last pass's counts into account, then count the keys at or above each pivot of what is left.

    state [passes, groups, 3]: interval [low, high] of the statistic, keys above it; every program works it out and the
    first writes it, so that a pass is one launch. The last writes it, and how many of the keys equal to it are wanted.
    """
    group = tl.program_id(0)
    wanted = tl.load(plan + group * 4 + 2)
    j = tl.arange(0, DIGIT)
    if number == 0:
        low, high = tl.load(bracket + group * 2).to(tl.int64), tl.load(bracket + group * 2 + 1).to(tl.int64)
        above = low * 0
    else:
        low, high, above = refined(
            state + ((number - 1) * groups + group) * 3, partial + ((number - 1) * groups + group) * B * DIGIT, wanted,
            DIGIT, B,
        )  # fmt: skip
    if LAST:
        tl.store(found + group * 2, low)
        tl.store(found + group * 2 + 1, wanted - above)
        tl.store(threshold + group, tl.where(wanted == 0, INF, low).to(threshold.dtype.element_ty))
    else:
        now = state + (number * groups + group) * 3
        if tl.program_id(1) == 0:
            tl.store(now, low)
            tl.store(now + 1, high)
            tl.store(now + 2, above)
        if low < high:
            pivot = tl.minimum(low + j * ((high - low) // DIGIT + 1), MASK).to(tl.int32)
            end = tl.load(plan + group * 4 + 1)
            seen = tl.zeros([DIGIT], tl.int32)
            for first in range(tl.load(plan + group * 4) + tl.program_id(1) * BLOCK, end, B * BLOCK):
                at = first + tl.arange(0, BLOCK)
                v = tl.where(at < end, key(tl.load(keys + at, mask=at < end, other=0), MASK), -1)
                seen += tl.sum((v[:, None] >= pivot[None, :]).to(tl.int32), axis=0)
            tl.store(partial + ((number * groups + group) * B + tl.program_id(1)) * DIGIT + j, seen)
