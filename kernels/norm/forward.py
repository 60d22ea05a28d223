"""Moments of sets of entries in parts, then one pass that normalises, scales, shifts and cuts off below 0.

A set shares a mean: a channel of a batch, or a group of a sample's channels. It is `rows` rows of `hw` contiguous
entries, `inner` rows apart, cut into tiles [ROWS, BLOCK]. Program (set, part) has `each` tiles in a row.
"""

# mypy: disable-error-code="no-untyped-def"
# Arguments of a Triton kernel are what it is compiled for, not Python values.

import triton
import triton.language as tl


@triton.jit
def tile(t, rows, inner, hw, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Of tile t of this program's set: its rows [ROWS], where its entries are [ROWS, BLOCK], and which of them are."""
    s = tl.program_id(0)
    columns = tl.cdiv(hw, BLOCK)
    row = t // columns * ROWS + tl.arange(0, ROWS)
    column = t % columns * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < hw)[None, :]
    wide = s.to(tl.int64) if WIDE else s
    first = wide // inner * rows * inner + wide % inner
    return row, (first + row * inner)[:, None] * hw + column[None, :], inside


@triton.jit
def affine(weight, bias, row, rows, per_client, groups, GROUPED: tl.constexpr):
    """Weight and bias of a group's rows, [rows, 1], or of this program's channel."""
    s = tl.program_id(0)
    if GROUPED:
        at = (s // per_client * groups + s % groups) * rows + row
        w = tl.load(weight + at, mask=row < rows, other=0.0)[:, None]
        b = tl.load(bias + at, mask=row < rows, other=0.0)[:, None]
    else:
        w = tl.load(weight + s)
        b = tl.load(bias + s)
    return w.to(tl.float32), b.to(tl.float32)


@triton.jit
def moments_kernel(x, parts, rows, inner, units, each, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
                   WIDE: tl.constexpr):  # fmt: skip
    """Of each part: its entries, their mean, and their squared distances from it, to parts [3, sets, parts].

    Sums are of distances from the mean of the first tile: an offset of all entries costs no precision.
    """
    hw = units * UNIT
    p = tl.program_id(1)
    row, at, inside = tile(p * each, rows, inner, hw, ROWS, BLOCK, WIDE)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.sum(inside.to(tl.float32))
    shift = tl.sum(v) / count
    total = tl.where(inside, v - shift, 0.0)
    square = total * total
    for i in range(1, each):
        row, at, inside = tile(p * each + i, rows, inner, hw, ROWS, BLOCK, WIDE)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        v = tl.where(inside, v - shift, 0.0)
        total += v
        square += v * v
        count += tl.sum(inside.to(tl.float32))
    added = tl.sum(total)
    off = added / count
    squares = tl.sum(square) - added * off
    out = parts + tl.program_id(0) * tl.num_programs(1) + p
    size = tl.num_programs(0) * tl.num_programs(1)
    tl.store(out, count)
    tl.store(out + size, shift + off)
    tl.store(out + 2 * size, tl.where(squares < 0, 0.0, squares))


@triton.jit
def merged(parts, eps, PARTS: tl.constexpr):
    """Mean and rstd of this program's set; parts are added in one order, their means as distances from the first."""
    size = tl.num_programs(0) * tl.num_programs(1)
    mine = parts + tl.program_id(0) * tl.num_programs(1)
    i = tl.arange(0, PARTS)
    there = i < tl.num_programs(1)
    count = tl.load(mine + i, mask=there, other=0.0)
    first = tl.load(mine + size)
    away = tl.where(there, tl.load(mine + size + i, mask=there, other=0.0) - first, 0.0)
    squares = tl.load(mine + 2 * size + i, mask=there, other=0.0)
    n = tl.sum(count)
    off = tl.sum(count * away) / n
    away -= off
    return first + off, tl.rsqrt(tl.sum(squares + count * away * away) / n + eps)


@triton.jit
def apply_kernel(x, h, parts, mean, rstd, weight, bias, eps, rows, inner, units, each, per_client, groups,
                 UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
                 GROUPED: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """parts: None where mean and rstd are known; else they are made of it, and written."""
    hw = units * UNIT
    s = tl.program_id(0)
    p = tl.program_id(1)
    if parts is not None:
        m, r = merged(parts, eps, PARTS)
        if p == 0:
            tl.store(mean + s, m)
            tl.store(rstd + s, r)
    else:
        m = tl.load(mean + s)
        r = tl.load(rstd + s)
    for i in range(each):
        row, at, inside = tile(p * each + i, rows, inner, hw, ROWS, BLOCK, WIDE)
        w, b = affine(weight, bias, row, rows, per_client, groups, GROUPED)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        v = (v - m) * (r * w) + b
        tl.store(h + at, tl.where(v <= 0, 0.0, v), mask=inside)  # a NaN stays, to be seen
