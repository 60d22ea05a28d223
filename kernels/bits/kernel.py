"""Bit masks in Triton: a word and the 32 entries it stands for are loaded as [W] and [W, 32]: no thread gathers.

One program per tile of W words; rows of clients are the second axis of the grid. Where n is a multiple of 16, as the
buffers of the engine are, loads are 128 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedpipe.kernels.common import Variant, words

TILE = 64  # words of a program: 2,048 entries
PACKED = 256  # words of a program that packs


@triton.jit
def tile(W: tl.constexpr, WIDE: tl.constexpr):
    """This program's words [W], the bits of a word [32], and the entries they stand for [W, 32]."""
    word = tl.program_id(0) * W + tl.arange(0, W)
    bit = tl.arange(0, 32)
    first = word.to(tl.int64) if WIDE else word
    return word, bit, first[:, None] * 32 + bit[None, :]


@triton.jit
def pack_kernel(mask, out, n, count, W: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    word, bit, at = tile(W, WIDE)
    m = tl.load(mask + row * n + at, mask=at < n, other=0).to(tl.int32)
    tl.store(out + row * count + word, tl.sum((m != 0).to(tl.int32) << bit[None, :], axis=1), mask=word < count)


@triton.jit
def pack_fours_kernel(mask, out, fours, count, W: tl.constexpr, WIDE: tl.constexpr):
    """The same, four entries, bytes of 0 or 1, at a time: a product has their bits side by side in its top byte."""
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * W + tl.arange(0, W)
    j = tl.arange(0, 8)
    first = word.to(tl.int64) if WIDE else word
    at = first[:, None] * 8 + j[None, :]
    m = tl.load(mask + row * fours + at, mask=at < fours, other=0)
    bits = ((m * 0x01020408) >> 24) & 0xF
    tl.store(out + row * count + word, tl.sum(bits << (4 * j)[None, :], axis=1), mask=word < count)


@triton.jit
def unpack_kernel(packed, out, n, count, W: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    word, bit, at = tile(W, WIDE)
    w = tl.load(packed + row * count + word, mask=word < count, other=0)
    tl.store(out + row * n + at, ((w[:, None] >> bit[None, :]) & 1).to(tl.int8), mask=at < n)


@triton.jit
def ones(v):
    """Set bits of words; spelt as LLVM recognises one machine instruction in it."""
    v = v.to(tl.uint32, bitcast=True)
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    return ((((v + (v >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def popcount_kernel(packed, out, count, W: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * W + tl.arange(0, W)
    v = ones(tl.load(packed + row * count + word, mask=word < count, other=0))
    tl.store(out + row * tl.num_programs(0) + tl.program_id(0), tl.sum(v, axis=0))


@triton.jit
def threshold_kernel(x, threshold, out, n, count, W: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    word, bit, at = tile(W, WIDE)
    inside = at < n
    v = tl.load(x + row * n + at, mask=inside, other=0.0)
    keep = (~(tl.abs(v) < tl.load(threshold + row))) & inside
    tl.store(x + row * n + at, tl.where(keep, v, 0.0), mask=inside)
    tl.store(out + row * count + word, tl.sum(keep.to(tl.int32) << bit[None, :], axis=1), mask=word < count)


def _rows(t: Tensor) -> int:
    return t.numel() // t.shape[-1] if t.numel() else 0


def pack(mask: Tensor) -> Tensor:
    n = mask.shape[-1]
    out = torch.empty((*mask.shape[:-1], words(n)), dtype=torch.int32, device=mask.device)
    if not out.numel():
        return out
    grid, constants = (triton.cdiv(words(n), PACKED), _rows(mask)), {"W": PACKED, "WIDE": n >= 2**31}
    if n % 4 == 0 and mask.storage_offset() % 4 == 0:
        pack_fours_kernel[grid](mask.view(torch.int8).view(torch.int32), out, n // 4, words(n), **constants)
    else:
        pack_kernel[grid](mask.view(torch.int8), out, n, words(n), **constants)
    return out


def unpack(packed: Tensor, n: int) -> Tensor:
    out = torch.empty((*packed.shape[:-1], n), dtype=torch.bool, device=packed.device)
    if out.numel():
        grid = (triton.cdiv(words(n), TILE), _rows(packed))
        unpack_kernel[grid](packed, out.view(torch.int8), n, words(n), W=TILE, WIDE=n >= 2**31)
    return out


def popcount(packed: Tensor) -> Tensor:
    """Counts of tiles, added up by torch in a fixed order: no atomics."""
    tile = 1024
    tiles = triton.cdiv(packed.shape[-1], tile)
    out = torch.empty((*packed.shape[:-1], tiles), dtype=torch.int32, device=packed.device)
    if out.numel():
        popcount_kernel[(tiles, _rows(packed))](packed, out, packed.shape[-1], W=tile)
    return out.sum(-1, dtype=torch.int64)


def threshold_zero_(x: Tensor, threshold: Tensor) -> Tensor:
    n = x.shape[-1]
    out = torch.empty((*x.shape[:-1], words(n)), dtype=torch.int32, device=x.device)
    if out.numel():
        threshold_kernel[(triton.cdiv(words(n), TILE), _rows(x))](
            x, threshold, out, n, words(n), W=TILE, WIDE=n >= 2**31
        )
    return out


VARIANTS = {
    "pack": Variant(
        pack_kernel,
        {"mask": "*i8", "out": "*i32", "n": "i32", "count": "i32"},
        {"W": PACKED, "WIDE": False},
        aligned=("n",),
    ),
    "pack, by fours": Variant(
        pack_fours_kernel,
        {"mask": "*i32", "out": "*i32", "fours": "i32", "count": "i32"},
        {"W": PACKED, "WIDE": False},
        aligned=("fours",),
    ),
    "unpack": Variant(
        unpack_kernel,
        {"packed": "*i32", "out": "*i8", "n": "i32", "count": "i32"},
        {"W": TILE, "WIDE": False},
        aligned=("n",),
    ),
    "popcount": Variant(
        popcount_kernel, {"packed": "*i32", "out": "*i32", "count": "i32"}, {"W": 1024}, aligned=("count",)
    ),
    "threshold": Variant(
        threshold_kernel,
        {"x": "*fp32", "threshold": "*fp32", "out": "*i32", "n": "i32", "count": "i32"},
        {"W": TILE, "WIDE": False},
        aligned=("n",),
    ),
}
