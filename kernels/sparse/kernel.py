"""Sparse vectors in Triton: counts of tiles, their running sum, then one pass that compacts (or spreads) each tile.

Within a tile the place of an entry is the number of set bits in the words before its own, and in its own word below
its bit. No atomics and no order of arrival: equal input gives equal bytes. Entries move as integers of their size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fedpipe.kernels.bits.kernel import TILE, ones, tile
from fedpipe.kernels.common import Variant, later
from fedpipe.kernels.common import words as words_of

GROUP = 16  # tiles counted by one program
BLOCK = 1024  # indices scattered by one program


@triton.jit
def count_kernel(words, out, count, tiles, W: tl.constexpr, G: tl.constexpr):
    group = tl.program_id(0) * G + tl.arange(0, G)
    at = group[:, None] * W + tl.arange(0, W)[None, :]
    v = tl.load(words + at, mask=at < count, other=0)
    tl.store(out + group, tl.sum(ones(v), axis=1), mask=group < tiles)


@triton.jit
def places(words, ends, count, nnz, W: tl.constexpr, WIDE: tl.constexpr):
    """Of this program's tile: entries [W, 32], words with a set bit [W, 1], which entries are set [W, 32], the place
    of the tile's first value, and from there that of each entry. Words whose values would pass the last are left."""
    word, bit, at = tile(W, WIDE)
    w = tl.load(words + word, mask=word < count, other=0)
    some = (w != 0)[:, None]
    pid = tl.program_id(0)
    first = tl.load(ends + pid - 1, mask=pid > 0, other=0)
    upto = tl.cumsum(ones(w), axis=0)
    before = (upto - ones(w))[:, None]
    w = tl.where(upto <= tl.minimum(nnz - first, W * 32).to(tl.int32), w, 0)[:, None]
    return at, some, ((w >> bit[None, :]) & 1) != 0, first, before + ones(w & ((1 << bit) - 1)[None, :])


@triton.jit
def encode_kernel(
    x, words, ends, values, indices, n, count, nnz, W: tl.constexpr, WIDE: tl.constexpr, AT: tl.constexpr
):
    at, some, keep, first, place = places(words, ends, count, nnz, W, WIDE)
    v = tl.load(x + at, mask=some & (at < n))  # words without a set bit are not read
    tl.store(values + first + place, v, mask=keep)
    if AT:
        tl.store(indices + first + place, at.to(tl.int32), mask=keep)


@triton.jit
def decode_kernel(values, words, ends, x, n, count, nnz, W: tl.constexpr, WIDE: tl.constexpr):
    at, some, keep, first, place = places(words, ends, count, nnz, W, WIDE)
    tl.store(x + at, tl.load(values + first + place, mask=keep, other=0), mask=at < n)


@triton.jit
def scatter_kernel(indices, values, x, n, nnz, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    index = tl.load(indices + at, mask=at < nnz, other=-1)
    v = tl.load(values + at, mask=at < nnz, other=0)
    tl.store(x + index, v, mask=(index >= 0) & (index < n))


def _ends(words: Tensor) -> Tensor:
    """Set bits up to and with each tile, int64 [tiles]."""
    tiles = triton.cdiv(words.numel(), TILE)
    counts = torch.empty(tiles, dtype=torch.int32, device=words.device)
    count_kernel[(triton.cdiv(tiles, GROUP),)](words, counts, words.numel(), tiles, W=TILE, G=GROUP)
    return counts.cumsum(0, dtype=torch.int64)


def _encoded(x: Tensor, words: Tensor, nnz: int | None, at: bool) -> tuple[Tensor, Tensor]:
    """nnz unknown: room for an eighth of the entries is guessed and filled while the host waits for the number."""
    if not x.numel():
        return x.new_empty(0, dtype=torch.int32), x.new_empty(0)
    ends = _ends(words)
    if nnz is not None:
        return _compacted(x, words, ends, nnz, at)
    number, guess = later(ends[-1]), max(1024, x.numel() // 8)
    indices, values = _compacted(x, words, ends, guess, at)
    nnz = number()
    if nnz > guess:
        return _compacted(x, words, ends, nnz, at)
    if nnz < guess // 2:  # little of the room is used: it goes back
        return indices[:nnz].clone(), values[:nnz].clone()
    return indices[:nnz], values[:nnz]


def _compacted(x: Tensor, words: Tensor, ends: Tensor, most: int, at: bool) -> tuple[Tensor, Tensor]:
    n = x.numel()
    values = torch.empty(most, dtype=x.dtype, device=x.device)
    indices = torch.empty(most if at else 0, dtype=torch.int32, device=x.device)
    if most:
        encode_kernel[(ends.numel(),)](
            x, words, ends, values, indices, n, words.numel(), most, W=TILE, WIDE=n >= 2**31, AT=at
        )
    return indices, values


def encode(x: Tensor, words: Tensor, nnz: int | None = None) -> Tensor:
    return _encoded(x, words, nnz, at=False)[1]


def encode_indices(x: Tensor, words: Tensor, nnz: int | None = None) -> tuple[Tensor, Tensor]:
    return _encoded(x, words, nnz, at=True)


def decode(values: Tensor, words: Tensor, n: int) -> Tensor:
    out = torch.empty(n, dtype=values.dtype, device=values.device)
    if n:
        ends = _ends(words)
        decode_kernel[(ends.numel(),)](
            values, words, ends, out, n, words_of(n), values.numel(), W=TILE, WIDE=n >= 2**31
        )
    return out


def decode_indices(indices: Tensor, values: Tensor, n: int) -> Tensor:
    out = torch.zeros(n, dtype=values.dtype, device=values.device)
    if values.numel():
        scatter_kernel[(triton.cdiv(values.numel(), BLOCK),)](indices, values, out, n, values.numel(), B=BLOCK)
    return out


def _variant(kernel, size: str, wide: bool = False, **constants):
    types = dict.fromkeys(("x", "values"), f"*i{size}") | {"words": "*i32", "ends": "*i64", "indices": "*i32"}
    types |= {"n": "i64" if wide else "i32", "count": "i32", "nnz": "i32"}
    return Variant(kernel, types, {"W": TILE, "WIDE": wide, **constants}, aligned=("n",))


VARIANTS = {
    "count": Variant(
        count_kernel,
        {"words": "*i32", "out": "*i32", "count": "i32", "tiles": "i32"},
        {"W": TILE, "G": GROUP},
        aligned=("count",),
    ),
    "encode": _variant(encode_kernel, "32", AT=False),
    "encode, 16 bits": _variant(encode_kernel, "16", AT=False),
    "encode, wide": _variant(encode_kernel, "32", wide=True, AT=False),
    "encode_indices": _variant(encode_kernel, "32", AT=True),
    "decode": _variant(decode_kernel, "32"),
    "decode, 16 bits": _variant(decode_kernel, "16"),
    "decode, wide": _variant(decode_kernel, "32", wide=True),
    "decode_indices": Variant(
        scatter_kernel,
        {"indices": "*i32", "values": "*i32", "x": "*i32", "n": "i32", "nnz": "i32"},
        {"B": BLOCK},
        streaming=False,
    ),
}
