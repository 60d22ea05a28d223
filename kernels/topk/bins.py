"""How a bracket is divided into bins, and candidates are counted in them.

Sums are of integers, so that the order in which programs add to them changes nothing.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl


@triton.jit
def exponent(v):
    """Position of the highest set bit, or one more; negative for 0."""
    return ((v.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def shift_of(most, H: tl.constexpr, LOG: tl.constexpr):
    """Bits by which 0 .. most are shifted to be below H - 1."""
    shift = tl.maximum(exponent(most) + 2 - LOG, 0)
    return shift + ((most >> shift) > H - 2).to(tl.int32)


@triton.jit
def scale(low, high, INF: tl.constexpr, LOG: tl.constexpr):
    """How 2^LOG bins divide a bracket: the first is low alone, the last high alone, as a value that many entries share
    is likely to be an end; half of the others reach over four octaves, the rest up to a high end that may be infinite.
    Returns where the second half begins, and the bits that number each."""
    H: tl.constexpr = 1 << (LOG - 1)
    edge = low + tl.minimum(high - low, 4 * (INF & -INF))
    return edge, shift_of(edge - low - 2, H, LOG), shift_of(high - edge - 1, H, LOG)


@triton.jit
def bin_of(v, low, high, edge, fine, coarse, LOG: tl.constexpr):
    H: tl.constexpr = 1 << (LOG - 1)
    number = tl.where(v < edge, 1 + ((v - low - 1) >> fine), H + ((v - edge) >> coarse))
    return tl.where(v == low, 0, tl.where(v == high, 2 * H - 1, number))


@triton.jit
def keys_of(number, low, high, edge, fine, coarse, LOG: tl.constexpr):
    """First and last key of a bin."""
    H: tl.constexpr = 1 << (LOG - 1)
    first = tl.where(number < H, low + 1 + ((number - 1) << fine), edge + ((number - H) << coarse))
    last = tl.where(
        number < H, tl.minimum(edge - 1 - first, (1 << fine) - 1), tl.minimum(high - 1 - first, (1 << coarse) - 1)
    )
    end = tl.where(number == 0, low, high)
    single = (number == 0) | (number == 2 * H - 1)
    return tl.where(single, end, first), tl.where(single, end, first + last)


@triton.jit
def binned(v, mine, bins, low, high, edge, fine, coarse, LOG: tl.constexpr, FEW: tl.constexpr):
    """Count keys in bins. Of few keys, and of an end, there may be many: those are counted before they are added."""
    BINS: tl.constexpr = 1 << LOG
    v = tl.minimum(v, high)
    if high - low < FEW:
        for j in range(0, high - low + 1):
            number = tl.sum((mine & (v == low + j)).to(tl.int32), axis=0).to(tl.int64)
            here = bins + bin_of(low + j, low, high, edge, fine, coarse, LOG)
            tl.atomic_add(here, number, mask=number > 0, sem="relaxed")
    else:
        ends = tl.sum((mine & (v == low)).to(tl.int32) + ((mine & (v == high)).to(tl.int32) << 16), axis=0)
        tl.atomic_add(bins, (ends & 0xFFFF).to(tl.int64), mask=(ends & 0xFFFF) > 0, sem="relaxed")
        tl.atomic_add(bins + BINS - 1, (ends >> 16).to(tl.int64), mask=ends > 0xFFFF, sem="relaxed")
        here = bins + bin_of(v, low, high, edge, fine, coarse, LOG)
        tl.atomic_add(here, mine.to(tl.int64), mask=mine & (v > low) & (v < high), sem="relaxed")
