"""Brackets of a threshold: order statistics of samples, searched for bit by bit in registers.

A key is the bits of a float without its sign, an integer in the order of |x|.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl


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
def two_ranks(v, a_rank, b_rank, top, BITS: tl.constexpr):
    """The a_rank-th and the b_rank-th largest of v, of at most 2^15 entries, to their highest `top` bits; the rest of
    the first are 0, of the second 1. A rank of 0 gives all ones.

    One sum over entries for each bit serves both: at first both search the same, then two counts share a word."""
    low, high = a_rank * 0, b_rank * 0
    for i in range(top):
        bit = 1 << (BITS - 1 - i)
        if low == high:
            both = tl.sum((v >= (low | bit)).to(tl.int32), axis=0) * 65537
        else:
            both = tl.sum((v >= (low | bit)).to(tl.int32) + ((v >= (high | bit)).to(tl.int32) << 16), axis=0)
        low = tl.where((both & 0xFFFF) >= a_rank, low | bit, low)
        high = tl.where((both >> 16) >= b_rank, high | bit, high)
    return low, high | ((1 << (BITS - top)) - 1)


@triton.jit
def sample_kernel(
    x, starts, ranks, out, n, segments,
    MASK: tl.constexpr, INF: tl.constexpr, BITS: tl.constexpr, M: tl.constexpr, STRATA: tl.constexpr,
):  # fmt: skip
    """Two order statistics of M entries of a segment, neighbours from each of 2^STRATA strata; of all entries, where
    there are at most M.

    A rank of 0 gives INF, which no number is above; one beyond M gives 0. Where not all are sampled, a low and a high
    one that are near, to 18 bits: the least and the greatest of the sample that begin like those of the ranks.
    """
    group = tl.program_id(0)
    row = (group // segments).to(tl.int64)
    start = tl.load(starts + group % segments)
    size = tl.load(starts + group % segments + 1) - start
    i = tl.arange(0, M)
    NEAR: tl.constexpr = M >> STRATA
    j = i // NEAR
    here = scattered(j * tl.num_programs(1) + tl.program_id(1))
    inside = tl.umulhi(here, tl.maximum((size >> STRATA) - NEAR + 1, 1).to(tl.uint32) + here * 0).to(tl.int64)
    at = tl.where(size <= M, i.to(tl.int64), ((j * size) >> STRATA) + inside + i % NEAR)
    v = key(tl.load(x + row * n + start + at, mask=at < size, other=0), MASK)
    v = tl.where(at < size, v, -1)
    ranks += group % segments * 2
    a_rank, b_rank = tl.load(ranks), tl.load(ranks + 1)
    low, high = two_ranks(v, a_rank, b_rank, tl.where(size <= M, BITS, min(BITS, 18)), BITS)
    if size > M:
        low = tl.where(a_rank > M, 0, tl.min(tl.where(v >= low, v, MASK), axis=0))
        high = tl.where(b_rank == 0, INF, tl.max(tl.where(v <= high, v, 0), axis=0))
    out += (group * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(out, tl.minimum(low, INF))
    tl.store(out + 1, tl.minimum(high, INF))


@triton.jit
def mean_kernel(out, bracket, programs, INF: tl.constexpr, MANY: tl.constexpr, B: tl.constexpr):
    """Of the brackets out [groups, programs, 2] of each group, the means of both ends, rounded outwards.

    Neighbours that are alike make these vary more than entries drawn one by one would, of which a bracket is four
    standard deviations to each side: it is at least 3.2 of those that are seen, where that can be told."""
    i = tl.arange(0, B)
    here = out + (tl.program_id(0) * programs + i) * 2
    lows = tl.load(here, mask=i < programs, other=0).to(tl.int64)
    highs = tl.load(here + 1, mask=i < programs, other=0).to(tl.int64)
    low = tl.sum(lows, axis=0) // programs
    high = (tl.sum(highs, axis=0) + programs - 1) // programs
    off = tl.where(i < programs, lows - low, 0).to(tl.float32)
    deviation = tl.sqrt(tl.sum(off * off, axis=0) / ((programs - 1) * programs))
    more = tl.maximum(3.2 * deviation - (high - low).to(tl.float32) / 2, 0.0).to(tl.int64)
    more = tl.where(programs >= MANY, more, 0)
    tl.store(bracket + tl.program_id(0) * 2, tl.maximum(low - more, 0).to(tl.int32))
    tl.store(bracket + tl.program_id(0) * 2 + 1, tl.minimum(high + more, INF).to(tl.int32))
