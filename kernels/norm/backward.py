"""Backward in two passes: sums over sets of the gradient, then that of x. Sets, tiles and programs as in `forward`."""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl

from fedpipe.kernels.norm.forward import affine, tile


@triton.jit
def centred(x, dh, t, m, r, weight, bias, rows, inner, hw, per_client, groups, ROWS: tl.constexpr,
            BLOCK: tl.constexpr, GROUPED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Of a tile: x less its mean, dh where ReLU let it through, the weight; where they are, and which of them are."""
    row, at, inside = tile(t, rows, inner, hw, ROWS, BLOCK, WIDE)
    w, b = affine(weight, bias, row, rows, per_client, groups, GROUPED)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - m
    d = tl.load(dh + at, mask=inside, other=0.0).to(tl.float32)
    return v, tl.where(v * (r * w) + b <= 0, 0.0, d), w, at, inside


@triton.jit
def sums_kernel(x, dh, sums, mean, rstd, weight, bias, rows, inner, units, each, per_client, groups,
                UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, GROUPED: tl.constexpr,
                WIDE: tl.constexpr):  # fmt: skip
    """Sums of dy and of dy x-hat: of each part of a channel, [2, sets, parts], or of each row of a group,
    [2, sets, rows], where a program has all tiles of its rows."""
    hw = units * UNIT
    s = tl.program_id(0)
    p = tl.program_id(1)
    m = tl.load(mean + s)
    r = tl.load(rstd + s)
    first = tl.zeros([ROWS, BLOCK], tl.float32)
    second = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in range(each):
        v, d, _, _, _ = centred(
            x, dh, p * each + i, m, r, weight, bias, rows, inner, hw, per_client, groups, ROWS, BLOCK, GROUPED, WIDE
        )
        first += d
        second += d * v
    if GROUPED:
        row = p * ROWS + tl.arange(0, ROWS)
        out = sums + s * rows + row
        size = tl.num_programs(0) * rows
        tl.store(out, tl.sum(first, axis=1), mask=row < rows)
        tl.store(out + size, r * tl.sum(second, axis=1), mask=row < rows)
    else:
        out = sums + s * tl.num_programs(1) + p
        size = tl.num_programs(0) * tl.num_programs(1)
        tl.store(out, tl.sum(first))
        tl.store(out + size, r * tl.sum(second))


@triton.jit
def dx_kernel(x, dh, dx, sums, dweight, dbias, mean, rstd, weight, bias, count, rows, inner, units, each, per_client,
              groups, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
              GROUPED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """count: sums of a set. Where sets are channels, dweight and dbias are made of them, too."""
    hw = units * UNIT
    s = tl.program_id(0)
    p = tl.program_id(1)
    m = tl.load(mean + s)
    r = tl.load(rstd + s)
    i = tl.arange(0, COUNT)
    mine = sums + s * count + i
    first = tl.load(mine, mask=i < count, other=0.0)
    second = tl.load(mine + tl.num_programs(0) * count, mask=i < count, other=0.0)
    scale, _ = affine(weight, bias, i, rows, per_client, groups, GROUPED)
    if GROUPED:
        first = tl.sum(first[:, None] * scale)
        second = tl.sum(second[:, None] * scale)
    else:
        first = tl.sum(first)
        second = tl.sum(second)
        if p == 0:
            tl.store(dbias + s, first)
            tl.store(dweight + s, second)
        first *= scale
        second *= scale
    n = 1.0 * rows * hw
    first /= n
    second = second / n * r
    for j in range(each):
        v, d, w, at, inside = centred(
            x, dh, p * each + j, m, r, weight, bias, rows, inner, hw, per_client, groups, ROWS, BLOCK, GROUPED, WIDE
        )
        tl.store(dx + at, r * (d * w - first - v * second), mask=inside)
